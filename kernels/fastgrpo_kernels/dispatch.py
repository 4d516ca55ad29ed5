"""Which backend serves a call, and the switch that forces one.

    cuda       csrc/ on a GPU              cpp    csrc/'s vectorised path on the CPU
    triton     the kernels of this folder  reference    plain PyTorch, everywhere, and always for float64

Of its own accord a call takes, on a GPU, triton, then cuda, then the reference; on a CPU cpp,
then the reference; the reference on any other device. The choice depends on device, dtype and
what is installed, never on sizes, so `sde_step`, `sde_log_prob` and `grpo_loss` are always
served by one backend.

`backend="..."` in a call forces a backend for it, and FASTGRPO_KERNELS=... in the
environment (read at import) for every operation that the backend has. A forced backend that cannot
serve is a ValueError that says why.
"""

from __future__ import annotations

import os
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("cuda", "cpp", "triton", "reference")
COMPILED = ("sde_step", "sde_log_prob", "clipped_ratio_loss", "grpo_loss")
"""The operations that csrc/ has."""
FORCED: str | None = os.environ.get("FASTGRPO_KERNELS") or None

triton: Any = None
tl: Any = None
_triton_error = ""
try:
    triton, tl = import_module("triton"), import_module("triton.language")
except ImportError as error:
    _triton_error = f"triton cannot be imported ({error})"

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
"""Triton read the variable when it was imported: its kernels run in NumPy, on the CPU."""


NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")
"""Namespace of the Triton ops in torch.ops: the package's name, so that a second copy of this folder,
loaded under another name, registers its own.
"""


def triton_op(name: str) -> Any:
    """torch.library.custom_op for a launcher of Triton kernels, as torch.ops.<NAMESPACE>.<name>."""
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())


def register(name: str, fake: Any, backward: Any = None, setup_context: Any = None) -> None:
    """Give an op its fake and its backward: the Triton op, and that of csrc/ where there is one.

    Args:
        name: The op's, without a namespace. `triton_op(name)` must have defined it.
        fake: Shapes and dtypes of the results, from the op's arguments.
        backward: backward(backend, ctx, *grads); None: no gradient. It is told the backend so that it
            can call `operation(backend, ...)`.
        setup_context: As in torch.library.register_autograd.
    """
    namespaces = {"triton": NAMESPACE}
    if has_library() and hasattr(torch.ops.fastgrpo, name):
        namespaces["cpp"] = "fastgrpo"
    for backend, namespace in namespaces.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
        if backward is not None:
            torch.library.register_autograd(
                f"{namespace}::{name}", partial(backward, backend), setup_context=setup_context
            )


def operation(backend: str, name: str) -> Any:
    """The op of this name in torch.ops, of any backend but the reference."""
    return getattr(getattr(torch.ops, NAMESPACE if backend == "triton" else "fastgrpo"), name)


def jit(function: Any) -> Any:
    """triton.jit, or nothing where there is no triton: the files of the kernels can be imported
    without it.
    """
    return function if triton is None else triton.jit(function)


def _load_library() -> str:
    """Load what setup.py has built beside this file; why it could not be, or nothing."""
    library, note = (Path(__file__).with_name(name) for name in ("_C.so", "_C.txt"))
    if torch._C._dispatch_has_kernel("fastgrpo::sde_step"):
        return "another copy of this package has loaded csrc/, whose ops exist once in a process"
    if not library.exists():
        words = note.read_text().strip() if note.exists() else "setup.py has not run"
        return f"csrc/ is not there: {words}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} cannot be loaded ({error})"
    return ""


_library_error = _load_library()
# Asked once: torch.compile cannot trace the question.
_registered = (
    {
        (op, device)
        for op in COMPILED
        for device in ("cpu", "cuda")
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgrpo::{op}", device.upper())
    }
    if not _library_error
    else set()
)


def select_backend(op: str, tensor: object, backend: str | None = None) -> str:
    """The backend that serves this call, one of BACKENDS.

    op: name of the operation. tensor: the argument whose device and dtype decide (anything else
    goes to the reference, whose checks have the words). backend: a forced backend, or
    None. ValueError: the backend is unknown, or cannot serve.
    """
    forced = backend or FORCED
    if forced is None:
        return next(name for name in _order(tensor) if not unsupported_reason(name, op, tensor))
    if forced not in BACKENDS:
        source = "backend" if backend else "FASTGRPO_KERNELS"
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {forced!r}")
    if backend is None and forced in ("cuda", "cpp") and op not in COMPILED:
        return next(name for name in _order(tensor) if not unsupported_reason(name, op, tensor))
    if reason := unsupported_reason(forced, op, tensor):
        raise ValueError(f"{op}: the backend {forced!r} cannot serve this call: {reason}")
    return forced


def unsupported_reason(backend: str, op: str, tensor: object) -> str:
    """Why a backend cannot serve an operation on this tensor; nothing if it can."""
    if backend == "reference" or not isinstance(tensor, Tensor):
        return ""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, this is {tensor.dtype}; the reference takes float64"
    device = tensor.device.type
    if backend == "triton":
        if triton is None:
            return _triton_error
        if device != "cuda" and not INTERPRETED:
            return f"Triton runs on a GPU (or under TRITON_INTERPRET=1, for tests), this tensor is on {tensor.device}"
        return ""
    wanted = "cuda" if backend == "cuda" else "cpu"
    if op not in COMPILED:
        return f"csrc/ has {', '.join(COMPILED)} alone"
    if device != wanted:
        return f"it takes {wanted} tensors, this one is on {tensor.device}"
    if _library_error:
        return _library_error
    if (op, wanted) not in _registered:
        return f"csrc/ was built without {wanted} (python -m fastgrpo_kernels says why)"
    return ""


def has_library() -> bool:
    """Whether csrc/'s operations are registered as torch.ops.fastgrpo.*."""
    return not _library_error


def _order(tensor: object) -> tuple[str, ...]:
    device = tensor.device.type if isinstance(tensor, Tensor) else "none"
    return {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpp", "reference")}.get(
        device, ("reference",)
    )
