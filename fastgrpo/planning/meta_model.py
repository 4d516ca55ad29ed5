"""A generator on the meta device: what a forward, a forward with backward and a decode cost in FLOP
and bytes, without weights or GPU.

diffusers' own modules run, on tensors that have shapes and no data, and every operator's work
and every byte that lives is counted. Blocks that are alike are run once and counted as often as
there are. What a GPU would do and the meta device does not is put in its place: attention keeps
no scores (FlashAttention's operator; cuDNN's costs the same), autocast casts, fastgrpo_kernels'
operations are Triton's.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from fastgrpo_kernels import dispatch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from fastgrpo.distributed import sharding
from fastgrpo.interfaces import Conditioning, Policy

META = torch.device("meta")
_BF16_UNDER_AUTOCAST = {
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "matmul",
    "__matmul__",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
}
_FP32_UNDER_AUTOCAST = {
    "layer_norm",
    "rms_norm",
    "group_norm",
    "softmax",
    "log_softmax",
    "exp",
    "pow",
    "rsqrt",
    "sum",
    "prod",
    "cumsum",
}
"""Of CUDA's autocast (ATen/autocast_mode.h), what video transformers use."""


@dataclass(frozen=True)
class Cost:
    """What some computation costs. FLOP of matrix products and convolutions, and of attention;
    bytes on the device.

    kept: what lives on after the forward for the backward, the output included. work: what lives
    besides at the worst moment.
    """

    linear: float = 0.0
    attention: float = 0.0
    kept: float = 0.0
    work: float = 0.0

    @property
    def flop(self) -> float:
        return self.linear + self.attention


@dataclass(frozen=True)
class Network:
    """The trained network in numbers: elements of all parameters, of the trained ones, of the
    largest block, and of what is in no block.
    """

    parameters: int
    trained: int
    block: int
    root: int
    num_blocks: int


# -------- the policy


def can_load_meta(policy: Policy) -> bool:
    """Whether a policy has the method that `load_meta` calls."""
    return callable(getattr(policy, "load_meta", None))


def load_meta(policy: Policy) -> tuple[Any, Conditioning]:
    """A copy of a policy with its networks on the meta device, and the conditioning of one prompt
    there; reads configuration files alone.

    The policy does it by a method `load_meta() -> Conditioning`, which sets `transformer` and
    what `decode` needs.

    Raises:
        ValueError: a policy without that method. FileNotFoundError, ValueError: a model that
            cannot be had.
    """
    if not can_load_meta(policy):
        raise ValueError(
            f"policy: {type(policy).__name__} has no method load_meta (fastgrpo/planning/meta_model.py), so that it cannot be planned"
        )
    twin: Any = copy.copy(policy)
    conditioning = twin.load_meta()
    twin.transformer.eval()
    return twin, {name: tensor.to(META) for name, tensor in conditioning.items()}


def network_of(transformer: nn.Module) -> Network:
    """Count a network's parameters."""
    blocks = sharding.blocks_of(transformer)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    total = sum(p.numel() for p in transformer.parameters())
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    return Network(total, trained, max(sizes), total - sum(sizes), len(blocks))


# -------- measuring


def velocity_cost(
    policy: Any,
    conditioning: Conditioning,
    latents: Tensor,
    compute_dtype: torch.dtype,
    *,
    activations: str | None,
    gathered: bool,
) -> Cost:
    """One branch's velocity of `latents` [B, *latent_shape], on the meta device.

    activations: of `ParallelConfig`, for a forward and a backward; None for a forward alone.
    gathered: whether the parameters are in `compute_dtype`, as FSDP2 gathers them, or fp32
    master weights that autocast casts.
    """
    lists = lists_of_blocks(policy.transformer)

    def cost(lengths: Mapping[str, int]) -> Cost:
        with ExitStack() as stack:
            stack.enter_context(
                _first_blocks(policy, lengths, activations, compute_dtype, gathered)
            )
            conditions = {
                name: tensor.expand(len(latents), *tensor.shape[1:])
                for name, tensor in conditioning.items()
            }
            return measure(
                _as_on_a_gpu(
                    lambda: policy.velocity(latents, latents.new_empty(len(latents)), conditions),
                    compute_dtype,
                ),
                [
                    *policy.transformer.parameters(),
                    *policy.transformer.buffers(),
                    latents,
                    *conditions.values(),
                ],
                backward=activations is not None,
            )

    one = cost(dict.fromkeys(lists, 1))
    linear, attention, kept, work = one.linear, one.attention, one.kept, one.work
    for name, length in lists.items():
        if length > 1:
            two = cost(dict.fromkeys(lists, 1) | {name: 2})
            linear += (length - 1) * (two.linear - one.linear)
            attention += (length - 1) * (two.attention - one.attention)
            kept += (length - 1) * (two.kept - one.kept)
            work = max(work, two.work)
    return Cost(linear, attention, kept, work)


def decode_cost(policy: Any, latent_shape: tuple[int, ...]) -> Cost:
    """The decode of one video, as the policy is set to do it; `kept` are its frames."""
    latents, vae = (
        torch.empty(1, *latent_shape, device=META),
        cast(Any, getattr(policy, "vae", None)),
    )
    tiles = _share_of_tiles(vae, latent_shape) if getattr(vae, "use_tiling", False) else None
    if tiles:
        vae.disable_tiling()
    try:
        with torch.no_grad(), _attention_without_scores():
            cost = measure(lambda: policy.decode(latents), [latents], backward=False)
    finally:
        if tiles:
            vae.enable_tiling()
    if tiles is None:
        return cost
    every, largest = (
        tiles  # all tiles' frames live until they are blended, and then the blended ones too
    )
    return Cost(
        cost.linear * every,
        cost.attention * every,
        cost.kept,
        cost.work * largest + cost.kept * (every + 1),
    )


def _share_of_tiles(vae: Any, latent_shape: tuple[int, ...]) -> tuple[float, float] | None:
    """Area of all tiles and of the largest one, of a video's; None where a decode tiles time as
    well, which few tiles make quick to run.
    """
    if hasattr(vae, "tile_sample_min_num_frames"):
        return None
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
    """Run `call` on meta tensors, with a backward from its output or without autograd. Gradients of
    parameters are not counted: each is let go of as soon as it is there.

    given: tensors that were there before.
    """
    count = _Count(given)
    leaves = [tensor for tensor in given if tensor.requires_grad and tensor.is_leaf]
    hooks = [leaf.register_post_accumulate_grad_hook(_drop_gradient) for leaf in leaves if backward]
    try:
        with count, torch.set_grad_enabled(backward):
            output = call()
            kept = count.bytes
            if backward:
                output.backward(torch.empty_like(output))
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(float(count.linear), float(count.attention), float(kept), float(count.peak - kept))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Count(TorchDispatchMode):
    """FLOP of the operators that run under it, by the formulas of torch's FlopCounterMode, which
    itself takes several times as long; and the bytes of the storages that they make and that are
    not freed yet, now and at most.
    """

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.linear = self.attention = self.bytes = self.peak = 0
        self._given = [
            tensor.untyped_storage() for tensor in given
        ]  # held, so that no other storage gets their addresses
        self._known = {storage._cdata for storage in self._given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flop = formula(*args, **kwargs, out_val=out)
            is_attention = "attention" in func._overloadpacket.__name__
            self.attention += flop if is_attention else 0
            self.linear += 0 if is_attention else flop
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, Tensor)
                and (storage := tensor.untyped_storage())._cdata not in self._known
            ):
                self._known.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(
                    storage, self._freed, storage._cdata, storage.nbytes()
                ).atexit = False
        return out

    def _freed(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.bytes -= size


# -------- blocks


def lists_of_blocks(network: nn.Module) -> dict[str, int]:
    """Name and length of each list of blocks that are alike; nothing where the network is one
    block.
    """
    blocks = {id(block) for block in sharding.blocks_of(network)}
    lists = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    return {
        name: len(module)
        for name, module in lists.items()
        if len(module) and all(id(block) in blocks for block in module)
    }


@contextmanager
def _first_blocks(
    policy: Any,
    lengths: Mapping[str, int],
    activations: str | None,
    compute_dtype: torch.dtype,
    gathered: bool,
) -> Iterator[None]:
    """Let the policy have a network of the first blocks of each list, prepared as for training."""
    whole = policy.transformer
    kept = {name: module._modules for name, module in whole.named_modules() if name in lengths}
    for name, modules in kept.items():
        whole.get_submodule(name)._modules = dict(list(modules.items())[: lengths[name]])
    try:
        policy.transformer = copy.deepcopy(whole)
    finally:
        for name, modules in kept.items():
            whole.get_submodule(name)._modules = modules
    try:
        for block in (
            sharding.blocks_of(policy.transformer) if activations not in (None, "none") else ()
        ):
            block.forward = _as_on_a_gpu(
                block.forward, compute_dtype
            )  # function modes do not reach what backward computes again
            sharding.recompute(block, keep_attention=activations == "keep_attention")
        for parameter in policy.transformer.parameters() if gathered else ():
            parameter.data = parameter.data.to(compute_dtype)
        yield
    finally:
        policy.transformer = whole


# -------- in a GPU's place


def _as_on_a_gpu(function: Callable[..., Any], compute_dtype: torch.dtype) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with (
            _triton_operations(),
            _attention_without_scores(),
            _Autocast(compute_dtype),
        ):  # the last one acts first
            return function(*args, **kwargs)

    return run


@contextmanager
def _triton_operations() -> Iterator[None]:
    """Let fastgrpo_kernels serve meta tensors with Triton's operators, which keep less for the
    backward than the reference.
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


class _attention_without_scores(TorchFunctionMode):
    """scaled_dot_product_attention by FlashAttention's operator: on the meta device torch's own
    choice would keep every score.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            return torch.ops.aten._scaled_dot_product_flash_attention(
                named["query"], named["key"], named["value"]
            )[0]
        return func(*args, **kwargs)


class _Autocast(TorchFunctionMode):
    """What CUDA's autocast does, without its cache: there is none for the meta device."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        wanted = None
        if self.dtype != torch.float32:
            in_fp32 = name in _FP32_UNDER_AUTOCAST
            wanted = (
                torch.float32
                if in_fp32
                else self.dtype
                if name in _BF16_UNDER_AUTOCAST or name == _ATTENTION
                else None
            )
        if wanted is not None:
            args, kwargs = tree_map(lambda value: _cast(value, wanted), (args, kwargs))
        return func(*args, **kwargs)


_ATTENTION = "scaled_dot_product_attention"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
