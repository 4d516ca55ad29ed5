"""Which backend serves a call, the switch that forces one, and how ops are registered.

    cuda        csrc/ on a GPU                  cpp         csrc/ on the CPU, vectorised
    triton      the kernels of this package     reference   plain PyTorch, on any device

Default order: on a GPU triton, cuda, reference; on a CPU cpp, reference; elsewhere, and for
float64, reference. The choice depends on device, dtype and what is installed, never on sizes, so
one backend serves `sde_step`, `sde_log_prob` and `grpo_loss`.

`backend="..."` forces a backend for one call; the environment variable FASTGRPO_KERNELS=..., read
at import, for every op that the backend has. A forced backend that cannot serve is a ValueError.
"""

from __future__ import annotations

import os
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BACKENDS = ("cuda", "cpp", "triton", "reference")
_CPU, _BOTH = ("cpp",), ("cpp", "cuda")
COMPILED = {
    **dict.fromkeys(("sde_step", "sde_log_prob", "clipped_ratio_loss", "grpo_loss"), _BOTH),
    **dict.fromkeys(("gate_residual", "ln_modulate", "gate_residual_ln_modulate"), _CPU),
    **dict.fromkeys(("qk_norm_rope", "bias_gelu", "few_token_attention"), _CPU),
}
"""The ops of csrc/, and the backends by which it has them."""
WITHOUT_TRITON = ("few_token_attention",)
"""Ops that this package has no Triton kernel for."""
_PARTS = ("gate_residual", "ln_modulate")
"""Ops that are `gate_residual_ln_modulate` without one of its halves."""
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
"""Namespace of the Triton ops in torch.ops: the name of this package, so that a copy of the folder
loaded under another name registers its own.
"""


def jit(function: Any) -> Any:
    """triton.jit, or the identity without Triton, so that the kernels' files can be imported."""
    return function if triton is None else triton.jit(function)


def triton_op(name: str) -> Any:
    """torch.library.custom_op for a launcher of Triton kernels, as torch.ops.<NAMESPACE>.<name>."""
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())


def register(name: str, fake: Any, backward: Any = None, setup_context: Any = None) -> None:
    """Give an op its fake and its backward: the Triton op and that of csrc/, as far as they exist.

    Args:
        name: The op's, without a namespace. `triton_op(name)` must have defined it, except for the
            ops WITHOUT_TRITON.
        fake: Shapes and dtypes of the results, from the arguments of the op.
        backward: backward(backend, ctx, *grads), or None for an op without a gradient. It may call
            `operation(backend, ...)` or `call(backend, ...)`.
        setup_context: As in torch.library.register_autograd.
    """
    without_triton = name.removesuffix("_backward") in WITHOUT_TRITON
    namespaces = {} if without_triton else {"triton": NAMESPACE}
    if has_library() and hasattr(torch.ops.fastgrpo, name):
        namespaces["cpp"] = "fastgrpo"  # and "cuda": the op has one backward
    for backend, namespace in namespaces.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
        if backward is not None:
            torch.library.register_autograd(
                f"{namespace}::{name}", partial(backward, backend), setup_context=setup_context
            )
    if "cpp" in namespaces:
        op, function = getattr(torch.ops.fastgrpo, name).default, None
        if backward is not None:
            function = _function(op, partial(backward, "cpp"), setup_context)
        _eager[name] = op, function


_eager: dict[str, tuple[Any, Any]] = {}
"""What `call` calls: an op of csrc/, and the autograd.Function around it, or None."""


def call(backend: str, name: str, *arguments: Any) -> Any:
    """Call an op that `register` knows, an op of csrc/ by the short way where there is one.

    torch.library enters a registered backward through Python at every call, also where nothing is
    to be differentiated. For an op on a few thousand values that takes longer than the op itself.
    """
    if backend == "triton" or torch.compiler.is_compiling():
        return operation(backend, name)(*arguments)
    op, function = _eager[name]
    if function is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return function.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _function(op: Any, backward: Any, setup_context: Any) -> Any:
    """An op with the backward that is registered for it, as an autograd.Function."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*arguments)
        setup_context(ctx, arguments, output)
        return output

    # The ops of a backward have no gradient themselves: a second derivative is refused, not zero.
    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(once_differentiable(backward)),
    }
    return type(f"{op.name()}", (torch.autograd.Function,), members)


def operation(backend: str, name: str) -> Any:
    """The op of this name in torch.ops, of any backend but the reference."""
    return getattr(getattr(torch.ops, NAMESPACE if backend == "triton" else "fastgrpo"), name)


def _load_library() -> str:
    """Load what setup.py has built beside this file. Returns the reason if that fails, or ""."""
    library, note = (Path(__file__).with_name(name) for name in ("_C.so", "_C.txt"))
    if torch._C._dispatch_has_kernel("fastgrpo::sde_step"):
        return "csrc/ is loaded by another copy of this package; its ops exist once per process"
    if not library.exists():
        return note.read_text().strip() if note.exists() else "csrc/ is not built (setup.py)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} cannot be loaded ({error})"
    return ""


def _is_registered(op: str, device: str) -> bool:
    """Whether the library has an op for a device. One that was built from an older csrc/ may not
    know the op, which torch's second question below takes for an error.
    """
    name = f"fastgrpo::{'gate_residual_ln_modulate' if op in _PARTS else op}"
    return torch._C._dispatch_has_kernel(name) and (
        torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())
    )


_library_error = _load_library()
# Asked once: torch.compile cannot trace the question.
_registered = {
    (op, device)
    for op in COMPILED
    for device in ("cpu", "cuda")
    if not _library_error and _is_registered(op, device)
}


def select_backend(op: str, tensor: object, backend: str | None = None) -> str:
    """The backend that serves a call.

    Args:
        op: Name of the op.
        tensor: The argument whose device and dtype decide. Anything but a tensor goes to the
            reference, which raises.
        backend: A forced backend, or None.

    Returns:
        One of BACKENDS.

    Raises:
        ValueError: The forced backend is unknown, or cannot serve.
    """
    forced = backend or FORCED
    if forced is not None and forced not in BACKENDS:
        source = "backend" if backend else "FASTGRPO_KERNELS"
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {forced!r}")
    # FASTGRPO_KERNELS=cuda says nothing of the ops that csrc/ does not have for CUDA.
    if forced is None or (backend is None and not _has(forced, op)):
        return next(name for name in _order(tensor) if not unsupported_reason(name, op, tensor))
    if reason := unsupported_reason(forced, op, tensor):
        raise ValueError(f"{op}: the backend {forced!r} cannot serve this call: {reason}")
    return forced


def _has(backend: str, op: str) -> bool:
    """True if a backend has an op, here or elsewhere."""
    if backend in _BOTH:
        return backend in COMPILED.get(op, ())
    return backend != "triton" or op not in WITHOUT_TRITON


def unsupported_reason(backend: str, op: str, tensor: object) -> str:
    """The reason why a backend cannot serve an op on this tensor; "" if it can."""
    if backend == "reference" or not isinstance(tensor, Tensor):
        return ""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"expected float32, bfloat16 or float16, got {tensor.dtype}"
    device = tensor.device.type
    if backend == "triton":
        if not _has(backend, op):
            return f"there is no Triton kernel for {op}"
        if device != "cuda" and not INTERPRETED:
            return f"Triton needs a GPU or TRITON_INTERPRET=1, got a tensor on {tensor.device}"
        return _triton_error
    wanted = "cuda" if backend == "cuda" else "cpu"
    if backend not in COMPILED.get(op, ()):
        has = [name for name, backends in COMPILED.items() if backend in backends]
        return f"csrc/ has only {', '.join(has)} for {wanted}"
    if device != wanted:
        return f"expected {wanted} tensors, got one on {tensor.device}"
    if not _library_error and (op, wanted) not in _registered:
        see = f"see python -m {__name__.rpartition('.')[0]}"
        return f"csrc/ was built without {wanted}, or before it had {op}: {see}"
    return _library_error


def has_library() -> bool:
    """True if this package has registered the ops of csrc/ as torch.ops.fastgrpo.*."""
    return not _library_error


_ORDERS = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpp", "reference")}


def _order(tensor: object) -> tuple[str, ...]:
    return _ORDERS.get(tensor.device.type if isinstance(tensor, Tensor) else "", ("reference",))
