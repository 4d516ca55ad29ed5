"""How the trained network lies in memory: what backward keeps, compilation, sharding, in that
order; and the whole of it back again.

A block is a module whose class `_no_split_modules` of the network names (diffusers); a network
that names none is one block.
"""

from __future__ import annotations

import functools
import warnings
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
from fastgrpo.distributed.collectives import world_size

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
)
"""Operators that compute attention: torch's own, the flash-attn package's (2 and 3), diffusers'
around the latter. Not all need exist.
"""

COMPILATIONS = 64
"""Of blocks under `parallel.compile`, after which torch ends the run. Its own limit is 8;
HunyuanVideo's four kinds of blocks, with and without gradients, for texts of one length and then
of any, take 18.
"""


def shards(cfg: ParallelConfig, device: torch.device) -> bool:
    """Whether the parameters are sharded on this device: what `shard: auto` comes to.

    Raises:
        ValueError: settings that do not fit the number of ranks, or that need sharding where
            there is none.
    """
    full = cfg.shard == "full" or (
        cfg.shard == "auto" and world_size() > 1 and device.type == "cuda"
    )
    if world_size() % cfg.replicas:
        raise ValueError(
            f"parallel.replicas: expected a divisor of the {world_size()} processes, got {cfg.replicas}"
        )
    if not full and (cfg.replicas > 1 or cfg.cpu_offload):
        key = "replicas" if cfg.replicas > 1 else "cpu_offload"
        raise ValueError(
            f"parallel.{key}: needs sharding, but shard {cfg.shard!r} with {world_size()} process(es) on {device.type} shards nothing; "
            "set parallel.shard to full"
        )
    return full


def prepare(
    network: nn.Module, cfg: ParallelConfig, device: torch.device, compute_dtype: torch.dtype
) -> None:
    """Make a network that lies on the CPU ready to train on `device`, in place, on all ranks
    together. Parameter names stay.

    Every rank gets rank 0's weights; the others' may be on the meta device. Where it is sharded,
    one block after the other goes to the device, whole, and a share of it stays: a model larger
    than a GPU never lies whole on one. Its parameters are then DTensors, fp32, that forward
    gathers in `compute_dtype`; backward leaves the gradients' mean over all ranks, reduced in
    fp32.

    Raises:
        ValueError: as `shards`.
    """
    blocks, sharded = blocks_of(network), shards(cfg, device)
    for block in blocks:
        if cfg.activations != "none":
            recompute(block, keep_attention=cfg.activations == "keep_attention")
    if cfg.compile:
        # Whatever kind of block and input it is compiled for, all count as compilations of one
        # function, `recompute`'s.
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, COMPILATIONS
        )
        # its forward, not its call: FSDP2's hooks stay outside. Equal blocks share one compilation
        for block in blocks:
            block.forward = torch.compile(block.forward, fullgraph=True)
    if not sharded:
        place(network, device)
        return
    # It warns once that diffusers' networks return views, which nothing here changes in place.
    warnings.filterwarnings(
        "ignore", message=r"FSDP2-wrapped module .* returned a view", category=UserWarning
    )
    options: dict[str, Any] = {
        "mesh": _mesh(device, cfg.replicas),
        # Never left to torch: it would keep the root's gathered between forwards, and a module's
        # parameters() are then not the optimizer's.
        "reshard_after_forward": True,
        # Inputs stay as they are: FSDP2 would round timesteps and rotary angles to bf16. Autocast
        # does what remains (trajectory.py).
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


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The outermost blocks of a network in their order, or the network itself."""
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
    """Let backward run the block's forward again instead of keeping what it needs; attention's
    outputs can be kept.

    The same operations on the same inputs: no bit of a gradient changes.
    """
    forward: Callable[..., Any] = block.forward
    options: dict[str, Any] = {
        "use_reentrant": False,
        "preserve_rng_state": False,
    }  # nothing in a forward is random
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
    """The overloads of those operators of `_ATTENTION` that this process has."""
    found = []
    for name in _ATTENTION:
        namespace, op = name.split("::")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        found += (
            [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
        )
    return found


def place(module: nn.Module, device: torch.device) -> None:
    """Move a module to `device`, but for what is sharded already, and give every rank rank 0's
    tensors.
    """
    for owner in module.modules():
        for name, tensor in [
            *owner.named_parameters(recurse=False),
            *owner.named_buffers(recurse=False),
        ]:
            if isinstance(tensor, DTensor):
                continue
            data = (
                torch.empty_like(tensor, device=device)
                if tensor.is_meta
                else tensor.detach().to(device)
            ).contiguous()
            if world_size() > 1:
                dist.broadcast(data, src=0)
            if not isinstance(tensor, nn.Parameter):
                owner._buffers[name] = data
            elif tensor.is_meta:
                owner._parameters[name] = nn.Parameter(data, requires_grad=tensor.requires_grad)
            else:
                tensor.data = data


@contextmanager
def gathered(network: nn.Module, keep: bool) -> Iterator[None]:
    """Let the parameters of a sharded network stay gathered between the forwards of a while (no
    backward in it); freed at its end.
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


def full_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The whole state dict, on the CPU, on rank 0; an empty one on the others. All ranks call it.
    It may share the network's memory.
    """
    weights: dict[str, Any] = get_model_state_dict(
        network, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return weights


def _mesh(device: torch.device, replicas: int) -> dist.DeviceMesh:
    if replicas == 1:
        return dist.init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    return dist.init_device_mesh(
        device.type, (replicas, world_size() // replicas), mesh_dim_names=("replicate", "shard")
    )
