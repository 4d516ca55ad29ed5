"""Processes: one a device, started by torchrun, or one alone. Everything that crosses ranks goes
through this file.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastgrpo_kernels
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgrpo.config import RuntimeConfig

_PACKAGES = (Path(__file__).resolve().parents[1], Path(fastgrpo_kernels.__file__).resolve().parent)


def world_size() -> int:
    """Processes of this job, also before `start`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, also before `start`; rank 0 writes the files."""
    return int(os.environ.get("RANK", "0"))


def start(runtime: RuntimeConfig) -> torch.device:
    """Join the other ranks, all with the same code, and choose this rank's device.

    gloo serves CPU tensors and objects, NCCL the GPU's; a process started without torchrun is a
    world of one.

    Raises:
        ValueError: a GPU is asked for and there is none. RuntimeError: a rank did not come
            within `timeout_minutes`, or has other sources, another Python, torch or diffusers;
            it is named.
    """
    if runtime.num_threads:
        torch.set_num_threads(runtime.num_threads)
    use_cuda = torch.cuda.is_available() if runtime.device == "auto" else runtime.device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise ValueError(
            "runtime.device: expected a CUDA GPU for 'cuda', found none; use cpu or auto"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join(
            "cpu:gloo,cuda:nccl" if use_cuda else "gloo",
            datetime.timedelta(minutes=runtime.timeout_minutes),
        )
        require_agreement("the code", code_version())
    return device


def _join(backend: str, timeout: datetime.timedelta) -> None:
    """Make the process group and see that all have come: what is awaited in vain here has a name,
    in NCCL's first collective it has not.
    """
    if world_size() == 1 and "WORLD_SIZE" not in os.environ:
        dist.init_process_group(
            backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1
        )
        return
    # Of a collective on the GPU that waits too long, NCCL's watchdog ends the process; with this it
    # also says which ranks were not in it.
    os.environ.setdefault("TORCH_NCCL_DESYNC_DEBUG", "1")
    with _waiting_for_ranks("the start of all processes"):
        dist.init_process_group(backend, timeout=timeout)
        gloo = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        dist.monitored_barrier(
            gloo, timeout, wait_all_ranks=True
        )  # rank 0 names those that are missing
        if gloo is not None:
            dist.destroy_process_group(gloo)


@contextmanager
def _waiting_for_ranks(what: str) -> Iterator[None]:
    """Say in the error of a collective which rank this is, and what it waited for."""
    try:
        yield
    except RuntimeError as error:
        where = f"rank {rank()} of {world_size()} ({platform.node()})"
        raise RuntimeError(
            f"{where} waited in vain for {what}: another rank has failed, and its own message says why, or it took longer than "
            f"runtime.timeout_minutes ({error})"
        ) from error


def code_version() -> str:
    """What must be the same on every rank: a hash of this package's and the kernels' sources, and
    the versions of what they stand on.
    """
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for source in sorted(package.rglob("*.py")):
            digest.update(f"{source.relative_to(package)}\0".encode() + source.read_bytes())
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {importlib.metadata.version('diffusers')}"
    return f"sources {digest.hexdigest()[:12]}, {versions}"


def started() -> bool:
    """Whether this process has joined the others."""
    return dist.is_initialized()


def stop() -> None:
    """Leave the group; without it NCCL complains at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value: Any, what: str = "values of all ranks") -> list[Any]:
    """The value of every rank, in rank order, on every rank. RuntimeError names this rank and
    `what` it waited for in vain.
    """
    values: list[Any] = [None] * world_size()
    with _waiting_for_ranks(what):
        dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank."""
    return any(gather(flag))


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over ranks, in one reduction of one flat fp32 buffer.

    Of sharded parameters (FSDP2) each backward has averaged them already: there is nothing to do.
    """
    gradients = [
        p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)
    ]
    if world_size() == 1 or not gradients:
        return
    flat = torch.cat([g.reshape(-1).float() for g in gradients])
    with _waiting_for_ranks("the gradients of all ranks"):
        dist.all_reduce(flat)
    flat /= world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> float:
    """Scale all gradients down so that their joint 2-norm is at most `max_norm`; the norm before
    that, of the whole gradient on every rank.

    All gradients are sharded over the same ranks, or none is.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def require_agreement(name: str, value: object) -> None:
    """RuntimeError that names the ranks whose `value` differs from rank 0's; short ones are shown."""
    values = gather(value, f"{name} of all ranks")
    different = [r for r, other in enumerate(values) if other != values[0]]
    if different:
        shown = f": {values[0]!r} on rank 0, {values[different[0]]!r} on rank {different[0]}"
        raise RuntimeError(
            f"{name}: expected the same on every rank, but ranks {different} differ from rank 0{shown if len(shown) < 400 else ''}"
        )
