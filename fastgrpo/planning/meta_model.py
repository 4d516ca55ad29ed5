"""A generator on the meta device: FLOP and bytes of a forward pass, of a forward and backward pass
and of a decode, without weights or GPU.

diffusers' own modules run on tensors that have shapes and no data. Every operator's work and every
byte that lives is counted. Blocks that are alike are run once and counted as often as there are.
Where the meta device differs from a GPU, the GPU's behaviour is put in its place: attention keeps
no scores (FlashAttention's operator; cuDNN's costs the same), autocast casts, and the operations of
fastgrpo_kernels are Triton's.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fastgrpo_kernels import dispatch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from fastgrpo.distributed import sharding
from fastgrpo.errors import UserError
from fastgrpo.interfaces import Conditioning, Policy

META = torch.device("meta")
_ATTENTION = "scaled_dot_product_attention"
_16_BIT_UNDER_AUTOCAST = {
    *("linear", "conv1d", "conv2d", "conv3d", "matmul", "__matmul__", "mm", "bmm", "addmm"),
    *("baddbmm", "einsum", _ATTENTION),
}
_FP32_UNDER_AUTOCAST = {
    *("layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax", "exp", "pow", "rsqrt"),
    *("sum", "prod", "cumsum"),
}
"""What video transformers use of the lists of CUDA's autocast (ATen/autocast_mode.h)."""


class NotPlannableError(UserError):
    """The policy has no networks on the meta device (`Policy.load_meta`)."""


class Cost(NamedTuple):
    """What a computation costs.

    Attributes:
        linear: FLOP of matrix products and convolutions.
        attention: FLOP of attention.
        kept: Bytes that live on after the forward pass for the backward, the output included.
        work: Bytes that live besides `kept` at the worst moment.
        moved: Bytes that all other operators read and write: pointwise operations, norms, copies.
    """

    linear: float = 0.0
    attention: float = 0.0
    kept: float = 0.0
    work: float = 0.0
    moved: float = 0.0

    @property
    def flop(self) -> float:
        return self.linear + self.attention


@dataclass(frozen=True)
class Network:
    """Numbers of elements of the trained network: of all parameters, of the trained ones, of the
    largest block, and of what is in no block.
    """

    parameters: int
    trained: int
    block: int
    root: int
    num_blocks: int


def load_meta(policy: Policy) -> tuple[Any, Conditioning]:
    """Copy a policy onto the meta device; reads only configuration files.

    Returns:
        The copy, and the conditioning of one prompt on the meta device.

    Raises:
        NotPlannableError: The policy has no `load_meta`.
        FileNotFoundError, ValueError: The model cannot be had.
    """
    twin = copy.copy(policy)
    conditioning = twin.load_meta()
    if conditioning is None:
        raise NotPlannableError(
            f"policy: {type(policy).__name__} cannot be planned, since it has no method load_meta "
            "(fastgrpo/interfaces.py)"
        )
    twin.transformer.eval()
    return twin, {name: tensor.to(META) for name, tensor in conditioning.items()}


def network_of(transformer: nn.Module) -> Network:
    """Count a network's parameters."""
    blocks = sharding.blocks_of(transformer)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    total = sum(p.numel() for p in transformer.parameters())
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    return Network(total, trained, max(sizes), total - sum(sizes), len(blocks))


def velocity_cost(
    policy: Any,
    conditioning: Conditioning,
    latents: Tensor,
    compute_dtype: torch.dtype,
    *,
    activations: str | None,
    gathered: bool,
) -> Cost:
    """Cost of one branch's velocity.

    Args:
        policy: As `load_meta` makes it.
        conditioning: Of one prompt, on the meta device.
        latents: [B, *latent_shape] on the meta device.
        compute_dtype: dtype of the forward pass.
        activations: `ParallelConfig.activations` for a forward and backward pass; None for only a
            forward pass.
        gathered: Whether the parameters are in `compute_dtype`, as FSDP2 gathers them, or fp32
            master weights that autocast casts.
    """
    conditioning = {name: t.expand(len(latents), *t.shape[1:]) for name, t in conditioning.items()}
    lists = lists_of_blocks(policy.transformer)

    def cost(lengths: Mapping[str, int]) -> Cost:
        with _first_blocks(policy, lengths):
            network = policy.transformer
            for block in sharding.blocks_of(network) if activations not in (None, "none") else ():
                # Function modes do not reach what the backward pass computes again.
                block.forward = _as_on_a_gpu(block.forward, compute_dtype)
                sharding.recompute(block, keep_attention=activations == "keep_attention")
            for parameter in network.parameters() if gathered else ():
                parameter.data = parameter.data.to(compute_dtype)
            velocity = _as_on_a_gpu(policy.velocity, compute_dtype)
            return measure(
                lambda: velocity(latents, latents.new_empty(len(latents)), conditioning),
                [*network.parameters(), *network.buffers(), latents, *conditioning.values()],
                backward=activations is not None,
            )

    total = one = cost(dict.fromkeys(lists, 1))
    for name, length in lists.items():
        if length > 1:
            two = cost(dict.fromkeys(lists, 1) | {name: 2})
            sums = [t + (length - 1) * (b - a) for t, a, b in zip(total, one, two, strict=True)]
            # One block is at work at a time.
            total = Cost(*sums)._replace(work=max(total.work, two.work))
    return total


def decode_cost(policy: Any, latent_shape: tuple[int, ...]) -> Cost:
    """Cost of the decode of one video, as the policy is set to do it; `kept` are its frames."""
    latents = torch.empty(1, *latent_shape, device=META)
    vae: Any = vars(policy).get("vae")
    # Few tiles are quick to run, so a VAE that also tiles time is measured as it is.
    by_area = getattr(vae, "use_tiling", False) and not hasattr(vae, "tile_sample_min_num_frames")
    if by_area:
        vae.disable_tiling()
    try:
        with torch.no_grad(), _AttentionWithoutScores():
            cost = measure(lambda: policy.decode(latents), [latents], backward=False)
    finally:
        if by_area:
            vae.enable_tiling()
    if not by_area:
        return cost
    # All tiles' frames live until they are blended, and then the blended ones too.
    every, largest = share_of_tiles(vae, latent_shape)
    work = cost.work * largest + cost.kept * (every + 1)
    return Cost(cost.linear * every, cost.attention * every, cost.kept, work, cost.moved * every)


def share_of_tiles(vae: Any, latent_shape: tuple[int, ...]) -> tuple[float, float]:
    """The area of all tiles, and of the largest one, as shares of a video's area."""
    every = largest = 1.0
    for name, size in zip(("height", "width"), latent_shape[2:], strict=True):
        tile, stride = (
            getattr(vae, f"tile_sample_{key}_{name}") // vae.spatial_compression_ratio
            for key in ("min", "stride")
        )
        every *= sum(min(tile, size - start) for start in range(0, size, stride)) / size
        largest *= min(tile, size) / size
    return every, largest


def measure(call: Callable[[], Tensor], given: list[Tensor], backward: bool) -> Cost:
    """Run `call` on meta tensors and count.

    Gradients of parameters are not counted: each is released as soon as it exists.

    Args:
        call: The forward pass.
        given: Tensors that existed before.
        backward: Whether a backward pass from the output follows, or autograd is off.
    """

    def drop_gradient(leaf: Tensor) -> None:
        leaf.grad = None

    count = _Count(given)
    hooks = [
        tensor.register_post_accumulate_grad_hook(drop_gradient)
        for tensor in given
        if backward and tensor.requires_grad and tensor.is_leaf
    ]
    try:
        with count, torch.set_grad_enabled(backward):
            output = call()
            kept = count.bytes
            if backward:
                output.backward(torch.empty_like(output))
    finally:
        for hook in hooks:
            hook.remove()
    flop = count.flop["linear"], count.flop["attention"]
    return Cost(*flop, kept, count.peak - kept, count.moved)


class _Count(TorchDispatchMode):
    """Counts the FLOP of the operators that run under it, by the formulas of torch's
    FlopCounterMode (which itself takes several times as long), and the bytes of the storages that
    they make and that are not freed yet, now and at most. Of operators without FLOP it counts the
    bytes that they read and write.
    """

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.flop: Counter[str] = Counter()
        self.bytes = self.peak = self.moved = 0
        # Held, so that no other storage gets their addresses.
        self._given = [tensor.untyped_storage() for tensor in given]
        self._known = {storage._cdata for storage in self._given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            kind = "attention" if "attention" in func._overloadpacket.__name__ else "linear"
            self.flop[kind] += formula(*args, **kwargs, out_val=out)
        elif not (func.is_view or "empty" in func._overloadpacket.__name__):
            # What is expanded is read once.
            touched = filter(torch.is_tensor, tree_leaves((args, kwargs, out)))
            self.moved += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in touched)
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                free = functools.partial(self._free, storage._cdata, storage.nbytes())
                weakref.finalize(storage, free).atexit = False
        return out

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.bytes -= size


def lists_of_blocks(network: nn.Module) -> dict[str, int]:
    """Name and length of each list of blocks that are alike; none if the network is one block."""
    blocks = {id(block) for block in sharding.blocks_of(network)}
    return {
        name: len(module)
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(id(block) in blocks for block in module)
    }


@contextmanager
def _first_blocks(policy: Any, lengths: Mapping[str, int]) -> Iterator[None]:
    """Give the policy a copy of its network that has only the first blocks of each list."""
    whole = policy.transformer
    kept = {name: whole.get_submodule(name)._modules for name in lengths}
    for name, modules in kept.items():
        whole.get_submodule(name)._modules = dict(list(modules.items())[: lengths[name]])
    try:
        policy.transformer = copy.deepcopy(whole)
    finally:
        for name, modules in kept.items():
            whole.get_submodule(name)._modules = modules
    try:
        yield
    finally:
        policy.transformer = whole


def _as_on_a_gpu(function: Callable[..., Any], compute_dtype: torch.dtype) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # The last mode acts first.
        with _triton_operations(), _AttentionWithoutScores(), _Autocast(compute_dtype):
            return function(*args, **kwargs)

    return run


@contextmanager
def _triton_operations() -> Iterator[None]:
    """Let Triton's operators serve meta tensors; they keep less for the backward pass than the
    reference.
    """
    order, unsupported_reason = dispatch._order, dispatch.unsupported_reason

    def on_meta(tensor: object) -> bool:
        return isinstance(tensor, Tensor) and tensor.is_meta

    dispatch._order = lambda tensor: ("triton",) if on_meta(tensor) else order(tensor)
    dispatch.unsupported_reason = lambda backend, op, tensor: (
        "" if on_meta(tensor) else unsupported_reason(backend, op, tensor)
    )
    try:
        yield
    finally:
        dispatch._order, dispatch.unsupported_reason = order, unsupported_reason


class _AttentionWithoutScores(TorchFunctionMode):
    """Serves scaled_dot_product_attention by FlashAttention's operator: torch's own choice on the
    meta device would keep every score.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == _ATTENTION:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            q, k, v = (named[name] for name in ("query", "key", "value"))
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return func(*args, **kwargs)


class _Autocast(TorchFunctionMode):
    """Casts as CUDA's autocast does, without its cache; there is none for the meta device."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.dtype != torch.float32:
            if name in _FP32_UNDER_AUTOCAST:
                args, kwargs = _cast((args, kwargs), torch.float32)
            elif name in _16_BIT_UNDER_AUTOCAST:
                args, kwargs = _cast((args, kwargs), self.dtype)
        return func(*args, **kwargs)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(cast, tree)
