"""Processes: one a device, started by torchrun, or one alone. Everything that crosses ranks goes through this file."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.config import RuntimeConfig


def world_size() -> int:
    """Processes of this job, also before `start`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, also before `start`; rank 0 writes the files."""
    return int(os.environ.get("RANK", "0"))


def start(runtime: RuntimeConfig) -> torch.device:
    """Join the other ranks and choose this rank's device.

    gloo serves CPU tensors and objects, NCCL the GPU's; a process started without torchrun is a world of one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if runtime.num_threads:
        torch.set_num_threads(runtime.num_threads)
    use_cuda = torch.cuda.is_available() if runtime.device == "auto" else runtime.device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise ValueError("runtime.device: expected a CUDA GPU for 'cuda', found none; use cpu or auto")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=runtime.timeout_minutes)
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    return device


def started() -> bool:
    """Whether this process has joined the others."""
    return dist.is_initialized()


def stop() -> None:
    """Leave the group; without it NCCL complains at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """The value of every rank, in rank order, on every rank."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank."""
    return any(gather(flag))


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over ranks, in one reduction of one flat fp32 buffer."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1).float() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def require_agreement(name: str, value: object) -> None:
    """RuntimeError that names the ranks whose `value` differs from rank 0's."""
    values = gather(value)
    different = [r for r, other in enumerate(values) if other != values[0]]
    if different:
        raise RuntimeError(f"{name}: expected the same on every rank, but ranks {different} differ from rank 0")
