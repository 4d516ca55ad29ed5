"""The transformer's pointwise operations in plain PyTorch: the specification that the kernels must
meet, and what serves float64.

Arithmetic is fp32, whatever the inputs' dtype, and float64 for float64 x; one rounding to the dtype
of x at the end. The signatures are those of the public functions, which have the full docstrings,
without `backend`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import checks
from ..checks import compute_dtype


def ln_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The specification of `fastgrpo_kernels.ln_modulate`."""
    checks.check_sequence("x", x)
    scale, shift = checks.modulation("scale", scale, x), checks.modulation("shift", shift, x)
    dtype = compute_dtype(x)
    normed = F.layer_norm(x.to(dtype), x.shape[2:], eps=eps)
    return (normed * (1.0 + scale.to(dtype)) + shift.to(dtype)).to(x.dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The specification of `fastgrpo_kernels.gate_residual`."""
    checks.check_sequence("x", x)
    checks.check_like("y", y, x)
    return _gate_residual(x, y, checks.modulation("gate", gate, x))


def gate_residual_ln_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The specification of `fastgrpo_kernels.gate_residual_ln_modulate`."""
    checks.check_sequence("x", x)
    checks.check_like("y", y, x)
    residual = _gate_residual(x, y, None if gate is None else checks.modulation("gate", gate, x))
    return residual, ln_modulate(residual, scale, shift, eps=eps)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The specification of `fastgrpo_kernels.qk_norm_rope`."""
    checks.check_qk(q, k, q_weight, k_weight)
    checks.check_rotation(cos, sin, q, k)
    return _norm_rope(q, q_weight, cos, sin, eps), _norm_rope(k, k_weight, cos, sin, eps)


def _gate_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    dtype = compute_dtype(x)
    gated = y.to(dtype) if gate is None else gate.to(dtype) * y.to(dtype)
    return (x.to(dtype) + gated).to(x.dtype)


def _norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    """x [B, L, H, D] -> the same: RMSNorm over as many channels as there are weights, then the
    rotation of the first tokens.
    """
    dtype = compute_dtype(x)
    grouped = x.to(dtype).reshape(
        *x.shape[:2], x.shape[2] * x.shape[3] // weight.shape[0], weight.shape[0]
    )
    normed = F.rms_norm(grouped, weight.shape, weight.to(dtype), eps).reshape(x.shape)
    if cos is None or sin is None:
        return normed.to(x.dtype)
    turned, rest = normed.split([cos.shape[0], x.shape[1] - cos.shape[0]], dim=1)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    c, s = cos.detach().to(dtype)[:, None], sin.detach().to(dtype)[:, None]
    rotated = torch.stack((even * c - odd * s, even * s + odd * c), dim=-1).flatten(-2)
    return torch.cat((rotated, rest), dim=1).to(x.dtype)
