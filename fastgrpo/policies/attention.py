"""The attention backend of a diffusers transformer: how it is chosen, and which kernel serves."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastgrpo_kernels.patching import FusedProcessor
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.errors import UserError, require
from fastgrpo.policies.model_files import quiet_diffusers

_TORCH_FLASH = ("fa3", "fa4")
_CAST_BY_AUTOCAST = (
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
    *_TORCH_FLASH,
)
"""Backends that run through torch's scaled_dot_product_attention, whose arguments autocast casts
to one dtype.
"""


def set_attention(
    transformer: Any, name: str, device: torch.device, fused: bool, as_in_training: bool = True
) -> None:
    """Choose the attention of a transformer, and run it once forward and backward.

    Args:
        transformer: A model of diffusers; changed in place.
        name: A backend of diffusers, or `fa3`, `fa4`: FlashAttention-3 or -4 through torch.
        device: Where it will run.
        fused: Whether the fused operations of fastgrpo_kernels are in the blocks.
        as_in_training: As `DiffusersPolicy.attention_as_in_training`. It holds for every
            transformer of this process that has the same backend.

    Raises:
        UserError: The backend is unknown, not installed, has no backward, or cannot take what
            reaches it under autocast.
    """
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        attention_backend,
        dispatch_attention_fn,
    )

    names = [*_TORCH_FLASH, *sorted(backend.value for backend in AttentionBackendName)]
    require(name in names, "policy.attention", f"one of {', '.join(names)}", name)
    if device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        own = ", ".join(_CAST_BY_AUTOCAST)
        expected = f"one of {own} with runtime.deterministic (others do not heed it)"
        require(name in _CAST_BY_AUTOCAST, "policy.attention", expected, name)
    if device.type == "cuda" and not fused and name not in _CAST_BY_AUTOCAST:
        raise UserError(
            f"policy.attention: {name} takes q, k and v of one 16-bit dtype, but under autocast "
            "diffusers' norms of q and k give fp32; set policy.fused to true (or attention to "
            "native)"
        )
    try:
        backend = _activate(name)
        # attention_backend() ends the global choice that set_attention_backend also makes.
        with attention_backend(), quiet_diffusers():
            transformer.set_attention_backend(backend)
        _ask_alike(AttentionBackendName(backend), as_in_training)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        shape = 1, 16, 1, transformer.config.attention_head_dim
        q, k, v = (
            torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)
        )
        out = dispatch_attention_fn(q, k, v, backend=AttentionBackendName(backend))
        torch.autograd.grad(out.sum(), [q, k, v])
    # Any error of a package that is missing, too old, not for this device or without a backward.
    except Exception as error:
        raise UserError(
            f"policy.attention: {name} does not run forward and backward on {device}: {error}"
        ) from error


_plain: weakref.WeakKeyDictionary[Callable[..., Tensor], Callable[..., Tensor]] = (
    weakref.WeakKeyDictionary()
)
"""What each function of `_as_in_training` is made from; a user's own wrappers are none of them."""


def _ask_alike(backend: Any, alike: bool) -> None:
    """Let an AttentionBackendName of diffusers ask for the same with and without gradients, or not.

    The place is diffusers' registry, since plain and fused processors, of every transformer, get
    the function from there.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    functions = _AttentionBackendRegistry._backends
    plain = _plain.get(functions[backend], functions[backend])
    functions[backend] = _as_in_training(plain) if alike else plain


def _as_in_training(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An attention that is computed without gradients as it is with them.

    torch asks cuDNN and the memory-efficient kernel for the log-sum-exp of the scores only where a
    gradient is wanted. cuDNN plans the two requests apart, and may choose engines that round
    otherwise: rollout and update would not compute the same bits. What is asked for besides is
    4 bytes per head and query.
    """

    @functools.wraps(attend)
    def run(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        # A compiler does not trace requires_grad_ (and rounds as it likes: `parallel.compile`).
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return attend(query=query, key=key, value=value, **options)
        with torch.enable_grad(), saved_tensors_hooks(_keep_nothing, _keep_nothing):
            query = query.detach().requires_grad_()
            return attend(query=query, key=key, value=value, **options).detach()

    _plain[run] = attend
    return run


def _keep_nothing(_: Any) -> Any:
    """In place of a tensor that an operator saves for a backward that never comes."""


def _activate(name: str) -> str:
    """The backend of diffusers for `name`; switches on FlashAttention-3 or -4 in torch."""
    if name not in _TORCH_FLASH:
        return name
    torch.nn.attention.activate_flash_attention_impl(name.upper())
    return "_native_flash"


def describe_attention(
    transformer: Any,
    lengths: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    masked: bool = False,
) -> str:
    """Name what serves a transformer's attention: the backend, and the operators it comes down to.

    Args:
        transformer: A model of diffusers after `set_attention`.
        lengths: Number of queries and of keys, for each kind of attention.
        dtype: Of q, k and v.
        device: Where it runs.
        batch_size: Videos per forward pass.
        masked: Whether it gets a mask over the keys.
    """
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    config = transformer.config
    processors: list[Any] = [getattr(module, "processor", None) for module in transformer.modules()]
    processor = next(p for p in processors if hasattr(p, "_attention_backend"))
    backend = processor._attention_backend
    names: dict[str, None] = {}
    for num_queries, num_keys in lengths:
        q, k = (
            torch.zeros(
                (batch_size, n, config.num_attention_heads, config.attention_head_dim),
                dtype=dtype,
                device=device,
                requires_grad=True,
            )
            for n in (num_queries, num_keys)
        )
        mask = torch.ones(batch_size, 1, 1, num_keys, dtype=torch.bool, device=device)
        with _Operators() as operators:
            if isinstance(processor, FusedProcessor):
                processor.attention(q, k, k, mask if masked else None)
            else:
                dispatch_attention_fn(q, k, k, attn_mask=mask if masked else None, backend=backend)
        names |= dict.fromkeys(n for n in operators.names if re.search("attention|attn|flash", n))
    return f"{getattr(backend, 'value', backend)} ({', '.join(names) or 'no fused kernel'})"


class _Operators(TorchDispatchMode):
    """The names of the operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
