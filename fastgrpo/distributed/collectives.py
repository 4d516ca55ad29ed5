"""The processes of a job: one per device, started by torchrun, or a single one.

Everything that crosses ranks goes through this file.
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
from fastgrpo.errors import UserError

CPU = torch.device("cpu")
_PACKAGES = (Path(__file__).resolve().parents[1], Path(fastgrpo_kernels.__file__).resolve().parent)


def world_size() -> int:
    """Number of processes of this job, also before `start`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, also before `start`; rank 0 writes the files."""
    return int(os.environ.get("RANK", "0"))


def start(runtime: RuntimeConfig) -> torch.device:
    """Join the other ranks, all with the same code, and choose this rank's device.

    gloo serves CPU tensors and objects, NCCL the GPU's. A process started without torchrun is a
    world of one.

    Raises:
        UserError: A GPU is asked for and there is none. Or, on all ranks: names the ranks that have
            other sources, another Python, torch or diffusers.
        RuntimeError: Names a rank that did not join within `timeout_minutes`.
    """
    if runtime.num_threads:
        torch.set_num_threads(runtime.num_threads)
    use_cuda = torch.cuda.is_available() if runtime.device == "auto" else runtime.device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise UserError(
            "runtime.device: expected a CUDA GPU for 'cuda', got a machine without one; "
            "use cpu or auto"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else CPU
    if use_cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        _join(backend, datetime.timedelta(minutes=runtime.timeout_minutes))
        require_agreement("the code", code_version())
    return device


def _join(backend: str, timeout: datetime.timedelta) -> None:
    """Make the process group and check that all ranks have joined.

    A rank that is missing is named here. NCCL's first collective could not name it.
    """
    if "WORLD_SIZE" not in os.environ:
        store = dist.HashStore()
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
        return
    # NCCL's watchdog ends a process whose collective on the GPU waits too long. With this it also
    # says which ranks were missing.
    os.environ.setdefault("TORCH_NCCL_DESYNC_DEBUG", "1")
    with _waiting_for_ranks("the start of all processes"):
        dist.init_process_group(backend, timeout=timeout)
        gloo = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        # On rank 0 the barrier's error names the ranks that are missing.
        dist.monitored_barrier(gloo, timeout, wait_all_ranks=True)
        if gloo is not None:
            dist.destroy_process_group(gloo)


@contextmanager
def _waiting_for_ranks(awaited: str) -> Iterator[None]:
    """Name this rank and what it waited for in the error of a collective."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {rank()} of {world_size()} ({platform.node()}) waited in vain for {awaited}: "
            "another rank has failed, and its own message says why, or it took longer than "
            f"runtime.timeout_minutes ({error})"
        ) from error


def code_version() -> str:
    """What must be the same on every rank: a hash of this package's and the kernels' sources, and
    the versions of Python, torch and diffusers.
    """
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for source in sorted(package.rglob("*.py")):
            digest.update(f"{source.relative_to(package)}\0".encode() + source.read_bytes())
    diffusers = importlib.metadata.version("diffusers")
    return (
        f"sources {digest.hexdigest()[:12]}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, diffusers {diffusers}"
    )


def started() -> bool:
    """Whether this process has joined the others."""
    return dist.is_initialized()


def stop() -> None:
    """Leave the group; otherwise NCCL complains at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value: Any, awaited: str = "values of all ranks") -> list[Any]:
    """The value of every rank, in rank order, on every rank.

    Raises:
        RuntimeError: Names this rank and what it `awaited` in vain.
    """
    values: list[Any] = [None] * world_size()
    with _waiting_for_ranks(awaited):
        dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank."""
    return any(gather(flag))


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over ranks, in one reduction of one flat fp32 buffer.

    Gradients of sharded parameters (FSDP2) stay: each backward has averaged them already.
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
    """Scale all gradients down so that their joint 2-norm is at most `max_norm`.

    Args:
        parameters: Their gradients are all sharded over the same ranks, or none is.
        max_norm: The bound.

    Returns:
        The norm of the whole gradient before scaling, on every rank.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def require_agreement(name: str, value: object) -> None:
    """Check that all ranks have the same value.

    Raises:
        UserError: On all ranks. Names those whose value differs from rank 0's; shows it if it is
            short.
    """
    values = gather(value, f"{name} of all ranks")
    different = [r for r, other in enumerate(values) if other != values[0]]
    if different:
        first = different[0]
        shown = f": {values[0]!r} on rank 0, {values[first]!r} on rank {first}"
        raise UserError(
            f"{name}: expected the same on every rank, but ranks {different} differ from rank 0"
            + (shown if len(shown) < 400 else "")
        )
