"""The processes of a job: one per device, started by torchrun, or a single one.

Everything that crosses ranks goes through this file.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastgrpo_kernels
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout
from torch.distributed.tensor import DTensor

from fastgrpo.config import RuntimeConfig
from fastgrpo.errors import UserError, one_line

CPU = torch.device("cpu")
PATIENCE = 300.0
"""Seconds for which a rank that has failed waits for the others to hear of it."""
_ROLL_CALL = 5.0
"""Seconds within which ranks that wait for one that does not answer find each other."""
_PACKAGES = (Path(__file__).resolve().parents[1], Path(fastgrpo_kernels.__file__).resolve().parent)

_group: dist.ProcessGroup | None = None
"""Serves `gather` alone, so that a rank that has failed can answer there whatever the others do."""


class PeerFailed(RuntimeError):
    """Another rank has failed: raised by `gather` on all that have not."""


class FailedElsewhere(UserError):
    """Another rank's error in a block that all ranks run (`failing_together`)."""


class RanksLost(RuntimeError):
    """A collective failed: some rank did not answer."""


@dataclass(frozen=True)
class _Failure:
    """What a failed rank answers in `gather`."""

    message: str


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
        if runtime.deterministic:
            _use_deterministic_kernels()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        _join(backend, datetime.timedelta(minutes=runtime.timeout_minutes))
        require_agreement("the code", code_version())
    return device


def _use_deterministic_kernels() -> None:
    """Let a GPU compute the same bits at every run; before its first product and collective.

    SDPA then passes cuDNN by for FlashAttention-2, whose backward, as that of fa3 and fa4, adds up
    in one order only under this setting without `warn_only`. It holds for both phases, since the
    forward of fa3 depends on it too.
    """
    # Two workspaces would leave the order of sums in a product to chance; torch refuses them.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Reductions in NVLink's switches come in no order of ours.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)
    # It would write NaN into every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


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
    global _group
    with waiting_for_ranks("the start of all processes"):
        dist.init_process_group(backend, timeout=timeout)
        # Its ranks connect to each other here.
        _group = dist.new_group(backend="gloo", timeout=timeout)


@contextmanager
def waiting_for_ranks(awaited: str) -> Iterator[None]:
    """Name this rank, what it waited for and the ranks that did not answer in the error of a
    collective.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1:
            raise
        silent = ", ".join(map(str, _silent_ranks()))
        who = f"no answer from rank {silent}, which" if silent else "another rank"
        raise RanksLost(
            f"rank {rank()} of {world_size()} ({platform.node()}) waited in vain for {awaited}: "
            f"{who} has failed, and its own message says why, or is stopped, or took longer than "
            f"runtime.timeout_minutes ({error})"
        ) from error


def _silent_ranks() -> list[int]:
    """The ranks that do not wait in vain as this one does, as far as the store can tell.

    A collective fails on all ranks that wait, at about the same time. Each says so in the store.
    """
    silent: list[int] = []

    def call_the_roll() -> None:
        with suppress(RuntimeError, ValueError):
            store = _get_default_store()
            store.set(f"fastgrpo/waits/{rank()}", "")
            waits = {r: f"fastgrpo/waits/{r}" for r in range(world_size())}
            until = time.monotonic() + _ROLL_CALL
            while (missing := [r for r, key in waits.items() if not store.check([key])]) and (
                time.monotonic() < until
            ):
                time.sleep(0.1)
            silent.extend(missing)

    # On a thread, since the store may be in a process that is stopped.
    roll_call = threading.Thread(target=call_the_roll, daemon=True)
    roll_call.start()
    roll_call.join(2 * _ROLL_CALL)
    return silent or ([0] if roll_call.is_alive() else [])


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
    global _group
    _group = None
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value: Any, awaited: str = "values of all ranks") -> list[Any]:
    """The value of every rank, in rank order, on every rank.

    Raises:
        PeerFailed: Another rank has failed; names it and its error.
        RanksLost: Names this rank, what it `awaited` in vain, and who did not answer.
    """
    values: list[Any] = [None] * world_size()
    with waiting_for_ranks(awaited):
        dist.all_gather_object(values, value, group=_group)
    failures = {r: v.message for r, v in enumerate(values) if isinstance(v, _Failure)}
    if failures and not isinstance(value, _Failure):
        raise PeerFailed("; ".join(f"rank {r} failed: {text}" for r, text in failures.items()))
    return values


def report_failure(error: BaseException) -> None:
    """Tell the other ranks, in the next `gather` that they come to, that this one has failed. After
    it all ranks are at the same place.

    Nothing to do for a PeerFailed, which all ranks know of.

    Raises:
        RanksLost: They did not come within PATIENCE seconds, or `error` is one.
    """
    if isinstance(error, RanksLost):
        raise error
    if world_size() == 1 or isinstance(error, PeerFailed):
        return
    if _group is not None:
        _set_pg_timeout(datetime.timedelta(seconds=PATIENCE), _group)
    gather(_Failure(f"{type(error).__name__}: {one_line(error)}"), "the others to hear of an error")


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank."""
    return any(gather(flag))


@contextmanager
def failing_together(task: str) -> Iterator[None]:
    """A block that all ranks run; if it raises on some rank, it raises on every rank.

    The others would wait in their next collective for a rank that has left.

    Args:
        task: What the block does, for the message.

    Raises:
        FailedElsewhere: On a rank where the block itself went well; has another rank's error.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the others must hear of it
        problem = error
    text = None if problem is None else one_line(problem) or type(problem).__name__
    texts = gather(text, f"{task} on all ranks")
    if problem is not None:
        raise problem
    failed = [r for r, text in enumerate(texts) if text is not None]
    if failed:
        raise FailedElsewhere(f"{task}: failed on rank {failed[0]}: {texts[failed[0]]}")


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
    with waiting_for_ranks("the gradients of all ranks"):
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
