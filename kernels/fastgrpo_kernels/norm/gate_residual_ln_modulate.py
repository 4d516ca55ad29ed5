"""The gated residual and the LayerNorm with modulation of a diffusion transformer, alone and fused.

    residual  = round(x + gate y)                              `gate_residual`
    modulated = LN(residual) (1 + scale) + shift               `ln_modulate`, whose residual is x

`gate_residual_ln_modulate` makes both in one pass, with the bits of the two ops one after the
other.

Shapes: x, y [B, L, C], B samples of L tokens of C channels; gate, scale, shift [B, 1 or L, C]; mean
and variance are over C. Arithmetic is fp32.

Backward, with xhat = (residual - mean) rstd and g = dmodulated (1 + scale):
    r      = dresidual + rstd (g - mean(g) - xhat mean(g xhat))
    dx     = r                        dy     = gate r               dgate = sum over L of y r
    dscale = sum over L of dmodulated xhat      dshift = sum over L of dmodulated
r stays in fp32, where the two ops would round it in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import call, register, select_backend
from . import reference
from .layout import modulations
from .triton_gate_residual_ln_modulate import empty_outputs, first_given, needs_dy


def _fake(x: Tensor, y: Tensor | None, gate: Any, scale: Tensor | None, *_: Any) -> Any:
    return empty_outputs(x, y, scale)


def _backward_fake(
    dresidual: Any, dmodulated: Any, residual: Any, statistics: Any, y: Any, *rest: Any
) -> tuple[Tensor, ...]:
    gate, scale, needed = rest
    like, modulation = first_given(dmodulated, dresidual), first_given(scale, gate)
    writes_dy = y is not None and needs_dy(y, gate, like)
    return (
        like.new_empty(0 if dmodulated is None else like.shape),
        y.new_empty(y.shape) if writes_dy else like.new_empty(0),
        *(
            modulation.new_empty(modulation.shape) if wanted else like.new_empty(0)
            for wanted in (needed[0], needed[1], needed[1])
        ),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, gate, scale, _, _ = inputs
    residual, _, statistics = output
    normed = (None, None) if scale is None else (x if y is None else residual, statistics)
    ctx.save_for_backward(*normed, y, gate, scale)
    ctx.set_materialize_grads(False)


def _backward(
    backend: str, ctx: Any, dresidual: Tensor | None, dmodulated: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    if dresidual is None and dmodulated is None:
        return (None,) * 6
    saved, (_, _, needs_gate, *needs) = ctx.saved_tensors, ctx.needs_input_grad
    y, gate, scale = saved[2:]
    dresidual = None if y is None else dresidual  # what arrives at an empty output
    dmodulated = None if scale is None else dmodulated
    needed = [needs_gate, dmodulated is not None and any(needs)]
    dx, dy, dgate, dscale, dshift = call(
        backend, "gate_residual_ln_modulate_backward", dresidual, dmodulated, *saved, needed
    )
    dx = dx if dresidual is None or dmodulated is not None else dresidual
    if y is None or not needs_dy(y, gate, dx):
        dy = None if y is None else dx
    params = (dscale, dshift) if needed[1] else (None, None)
    return dx, dy, dgate if needed[0] else None, *params, None


register("gate_residual_ln_modulate", _fake, _backward, _save)
register("gate_residual_ln_modulate_backward", _backward_fake)


def ln_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """LN(x) (1 + scale) + shift: LayerNorm over the channels in fp32, without weights of its own,
    and the modulation.

    Differentiable in x, scale and shift; each gradient has its input's dtype, and sums over tokens
    are fp32. A sample's bits do not depend on the rest of the batch.

    In diffusers 0.42: `norm1`, `norm3` and `norm_out` with what follows them in
    WanTransformerBlock.forward and WanTransformer3DModel.forward; for HunyuanVideo the last lines
    of AdaLayerNormZero, AdaLayerNormZeroSingle and AdaLayerNormContinuous, and `norm2` and
    `norm2_context` with their modulation in HunyuanVideoTransformerBlock.forward. Wan's affine
    `norm2` (before the cross-attention) is scale = weight - 1, shift = bias.

    Args:
        x: tokens [B, L, C], any float dtype.
        scale, shift: [C], [B, C], or [B or 1, L or 1, C] (one per token: Wan 2.2 ti2v), any float
            dtypes; slices and chunks of a larger tensor are read where they lie.
        eps: added to the variance.
        backend: a forced backend, see `dispatch.py`.

    Returns:
        x's shape and dtype, rounded once from fp32 (float64 for float64 x).
    """
    selected = select_backend("ln_modulate", x, backend)
    if selected == "reference":
        return reference.ln_modulate(x, scale, shift, eps=eps)
    return _launch(selected, x, None, eps, scale=scale, shift=shift)[1]


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """x + gate y, the gated residual of a diffusion transformer.

    Differentiable in x, y and gate; each gradient has its input's dtype, and sums over tokens are
    fp32. A sample's bits do not depend on the rest of the batch.

    In diffusers 0.42: the lines `hidden_states = hidden_states + ... * gate` after the
    self-attention and the feed-forward of WanTransformerBlock.forward, of
    HunyuanVideoTransformerBlock.forward (both streams) and, after `proj_out`, of
    HunyuanVideoSingleTransformerBlock.forward.

    Args:
        x, y: tokens [B, L, C], any float dtypes (Wan under a bf16 attention: y bf16, gate fp32).
        gate: as scale of `ln_modulate`.
        backend: a forced backend, see `dispatch.py`.

    Returns:
        x's shape and dtype, rounded once from fp32 (float64 for float64 x).
    """
    selected = select_backend("gate_residual", x, backend)
    if selected == "reference":
        return reference.gate_residual(x, y, gate)
    return _launch(selected, x, y, 0.0, gate=gate)[0]


def gate_residual_ln_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`gate_residual`, and `ln_modulate` of its result, in one pass and with the same bits.

    Differentiable in x, y, gate, scale and shift; each gradient has its input's dtype. Between the
    LayerNorm and the residual gradients stay in fp32, so they are closer to the exact ones than
    those of the two ops.

    In diffusers 0.42: in WanTransformerBlock.forward from the gated residual of the self-attention
    to `norm2` (affine: scale = weight - 1, shift = bias), and from the residual of the
    cross-attention (gate None) to the modulated `norm3`; in HunyuanVideoTransformerBlock.forward
    step 3, "Modulation and residual connection", of either stream. A block's last residual can be
    fused with the next block's `norm1`.

    Args:
        x, y: tokens [B, L, C], any float dtypes.
        gate: as for `gate_residual`, or None for x + y.
        scale, shift, eps: as for `ln_modulate`, which reads the residual as stored.
        backend: a forced backend, see `dispatch.py`.

    Returns:
        Residual and modulated, both in x's shape and dtype.
    """
    selected = select_backend("gate_residual_ln_modulate", x, backend)
    if selected == "reference":
        return reference.gate_residual_ln_modulate(x, y, gate, scale, shift, eps=eps)
    gates = {} if gate is None else {"gate": gate}
    return _launch(selected, x, y, eps, **gates, scale=scale, shift=shift)


def _launch(
    backend: str, x: Tensor, y: Tensor | None, eps: float, **given: Tensor
) -> tuple[Tensor, Tensor]:
    """Check the arguments, and call the op: residual and modulated."""
    checks.check_sequence("x", x)
    if y is not None:
        checks.check_like("y", y, x)
        y = (y.float() if y.dtype == torch.float64 else y).contiguous()
    views = modulations(x, given)
    gate, scale, shift = map(views.get, ("gate", "scale", "shift"))
    arguments = x.contiguous(), y, gate, scale, shift, eps
    residual, modulated, _ = call(backend, "gate_residual_ln_modulate", *arguments)
    return residual, modulated
