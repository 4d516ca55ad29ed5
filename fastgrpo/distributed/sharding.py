"""Loading, then activation checkpointing, compilation and sharding of the trained network.

A block is a module whose class the network's `_no_split_modules` names (diffusers). A network
without that list is one block.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastgrpo.config import ParallelConfig
from fastgrpo.distributed.collectives import failing_together, require_agreement, world_size
from fastgrpo.errors import UserError, require
from fastgrpo.interfaces import Policy

_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "flash_attn_3::_flash_attn_forward",
    "_diffusers_flash_attn_3::_flash_attn_forward",
    "fastgrpo::few_token_attention",
)
"""Operators that compute attention: torch's own, those of the flash-attn packages 2 and 3,
diffusers' wrapper of the latter, and fastgrpo_kernels' for a CPU. Not all need to exist.
"""

COMPILATIONS = 64
"""Compilations of blocks under `parallel.compile` after which torch ends the run. torch's own limit
is 8; HunyuanVideo's four kinds of blocks, with and without gradients, for texts of one length and
then of any, take 18.
"""

_reduced_every_step: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The networks that `prepare` sharded with `reduce_every: step`."""


def shards(cfg: ParallelConfig, device: torch.device) -> bool:
    """Whether the parameters are sharded on this device; resolves `shard: auto`.

    Raises:
        UserError: Settings that do not fit the number of ranks, or that need sharding where
            nothing is sharded.
    """
    full = cfg.shard == "full" or (
        cfg.shard == "auto" and world_size() > 1 and device.type == "cuda"
    )
    divisor = f"a divisor of the {world_size()} processes"
    require(world_size() % cfg.replicas == 0, "parallel.replicas", divisor, cfg.replicas)
    if not full and (cfg.replicas > 1 or cfg.cpu_offload):
        key = "replicas" if cfg.replicas > 1 else "cpu_offload"
        raise UserError(
            f"parallel.{key}: needs sharding, but shard {cfg.shard!r} with {world_size()} "
            f"process(es) on {device.type} shards nothing; set parallel.shard to full"
        )
    return full


def load(
    policy: Policy, cfg: ParallelConfig, device: torch.device, compute_dtype: torch.dtype
) -> None:
    """Load a policy and `prepare` its network, on all ranks together.

    Raises:
        UserError: Also if loading failed on another rank, or another rank's network has other
            tensors.
        Exception: Whatever `Policy.load` raised on this rank.
    """
    with failing_together("loading the policy"):
        policy.load(device)
        network = policy.transformer
        tensors = [*network.named_parameters(), *network.named_buffers()]
    # Broadcasts of tensors that differ would hang or mix them up, and so would other gradients.
    shapes = [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in tensors]
    require_agreement("the tensors of the policy's transformer", shapes)
    prepare(network, cfg, device, compute_dtype)


def prepare(
    network: nn.Module, cfg: ParallelConfig, device: torch.device, compute_dtype: torch.dtype
) -> None:
    """Make a network ready to train on `device`, in place, on all ranks together.

    Every rank gets rank 0's weights. Parameter names stay. To shard, one block after the other
    moves to the device whole and leaves a share of it there, so a model larger than a GPU never
    lies whole on one. Its parameters are then fp32 DTensors that forward gathers in
    `compute_dtype`; backward leaves the mean of the gradients over all ranks, reduced in fp32.

    Args:
        network: On the CPU; on ranks above 0 it may be on the meta device.
        cfg: The `parallel` section.
        device: Where to train.
        compute_dtype: Of the forward pass.

    Raises:
        UserError: As `shards`.
    """
    blocks, sharded = blocks_of(network), shards(cfg, device)
    for block in blocks:
        if cfg.activations != "none":
            recompute(block, keep_attention=cfg.activations == "keep_attention")
    if cfg.compile:
        # The compilations for all kinds of blocks and inputs count for one function, that of
        # `recompute`.
        limit = max(torch._dynamo.config.recompile_limit, COMPILATIONS)
        torch._dynamo.config.recompile_limit = limit
        # The forward, not the call: FSDP2's hooks stay outside. Equal blocks share a compilation.
        for block in blocks:
            block.forward = torch.compile(block.forward, fullgraph=True)
    if not sharded:
        place(network, device)
        return
    # FSDP2 warns that diffusers' networks return views; nothing here changes them in place.
    warnings.filterwarnings(
        "ignore", message=r"FSDP2-wrapped module .* returned a view", category=UserWarning
    )
    options: dict[str, Any] = {
        "mesh": _mesh(device, cfg.replicas),
        # torch's default keeps the root's parameters gathered between forwards; they are then not
        # the optimizer's.
        "reshard_after_forward": True,
        # Inputs stay as they are: FSDP2 would round timesteps and rotary angles to bf16. Autocast
        # (training/trajectory.py) does the rest.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy()
        if cfg.cpu_offload and device.type == "cuda"
        else OffloadPolicy(),
    }
    for module in [*(block for block in blocks if block is not network), network]:
        place(module, device)
        fully_shard(module, **options)
    if cfg.reduce_every == "step":
        _reduced_every_step.add(network)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The outermost blocks of a network in order, or the network itself."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    blocks: list[nn.Module] = []

    def collect(module: nn.Module) -> None:
        for child in module.children():
            if type(child).__name__ in names:
                blocks.append(child)
            else:
                collect(child)

    collect(network)
    return blocks or [network]


def recompute(block: nn.Module, keep_attention: bool) -> None:
    """Let backward run the block's forward again instead of keeping its activations.

    The same operations on the same inputs: no bit of a gradient changes.

    Args:
        block: Its forward is replaced.
        keep_attention: Keep the outputs of attention.
    """
    forward: Callable[..., Any] = block.forward
    # Nothing in a forward is random, so no state of a generator is kept.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if keep_attention:
        options["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, attention_operators()
        )

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    block.forward = run


def attention_operators() -> list[Any]:
    """The overloads of the operators of `_ATTENTION` that exist in this process."""
    found = []
    for name in _ATTENTION:
        namespace, op = name.split("::")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        if packet is not None:
            found += [getattr(packet, overload) for overload in packet.overloads()]
    return found


def place(module: nn.Module, device: torch.device) -> None:
    """Move a module's tensors to `device`, with rank 0's values; sharded ones stay."""
    placed: dict[int, tuple[Tensor, nn.Parameter]] = {}  # with the tensors, whose ids stay theirs
    for owner in module.modules():
        parameters = [*owner.named_parameters(recurse=False)]
        for name, tensor in [*parameters, *owner.named_buffers(recurse=False)]:
            if isinstance(tensor, DTensor):
                continue
            if id(tensor) in placed:  # two modules share it
                owner._parameters[name] = placed[id(tensor)][1]
                continue
            if tensor.is_meta:
                data = torch.empty_like(tensor, device=device).contiguous()
            else:
                # Copied also where it is on the device: a tensor of a file lies at any address,
                # and on a CPU the same product has other bits at another alignment.
                data = tensor.detach().to(device, copy=True).contiguous()
            if world_size() > 1:
                dist.broadcast(data, src=0)
            if not isinstance(tensor, nn.Parameter):
                owner._buffers[name] = data
                continue
            parameter = tensor
            if tensor.is_meta:
                parameter = nn.Parameter(data, requires_grad=tensor.requires_grad)
                owner._parameters[name] = parameter
            else:
                tensor.data = data
            placed[id(tensor)] = tensor, parameter


@contextmanager
def gathered(network: nn.Module, keep: bool) -> Iterator[None]:
    """Keep the parameters of a sharded network gathered between forwards in a `with` block.

    No backward may run inside. The gathered copies are freed at the end.
    """
    parts = [module for module in network.modules() if keep and isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def reduce_gradients_if(network: nn.Module, is_last: bool) -> None:
    """Say before each pass of an optimizer step whether it is the last one.

    Of a network that was sharded with `reduce_every: step`, only the last pass reduces gradients
    over the ranks, those of the passes before it included; these stay on each rank whole and in
    fp32. Nothing changes for other networks.
    """
    if network in _reduced_every_step:
        assert isinstance(network, FSDPModule)
        network.set_requires_gradient_sync(is_last)


def full_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU of rank 0; empty on the others. All ranks call it.

    It may share the network's memory.
    """
    weights: dict[str, Any] = get_model_state_dict(
        network, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return weights


def _mesh(device: torch.device, replicas: int) -> dist.DeviceMesh:
    sizes = {"replicate": replicas, "shard": world_size() // replicas}
    if replicas == 1:
        del sizes["replicate"]
    return dist.init_device_mesh(device.type, (*sizes.values(),), mesh_dim_names=(*sizes,))
