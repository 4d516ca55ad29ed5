"""The gated residual x + gate y, alone and with the LayerNorm and modulation that follow it,
forward and backward.

Shapes: x, y [B, L, C], B samples of L tokens of C channels. One program a row forward. The fused
op makes, in one pass,
    residual = round(x + gate y)          modulated = LN(residual) (1 + scale) + shift
and normalises the residual as it is stored, in the arithmetic of `ln_modulate.py`: the bits of
the two ops one after the other.

Backward of the fused op, with r = dresidual + the LayerNorm's gradient (see `ln_modulate.py`),
which stays in fp32 where the two ops would round it in between:
    dx = r      dy = gate r      dgate = sum over L of y r      dscale, dshift as in
    `ln_modulate.py`
Sums over L are made in two stages, by parts that depend on L alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import jit, select_backend, tl, triton_op
from . import reference
from .ln_modulate import (
    BACKWARD_VALUES,
    aligned,
    backward_shape,
    common_tokens,
    finish,
    forward_shape,
    layer_norm,
    layer_norm_grad,
    load_once,
    load_row,
    load_shared,
    new_gradients,
    row_values,
    strided,
)

FUSED_BACKWARD_VALUES = 24
"""As BACKWARD_VALUES: three sums want more registers than 16 warps can have. For the same reason
scale and gate are read anew for each row, and come with it.
"""


@jit
def _gate_residual_fwd_kernel(
    x, y, gate, out, L, gate_b, gate_l, C: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    program = tl.program_id(0)
    row, sample, token = (
        program.to(tl.int64),
        (program // L).to(tl.int64),
        (program % L).to(tl.int64),
    )
    cols = tl.max_contiguous(tl.arange(0, BLOCK), WIDTH)
    inside = cols < C
    gate_row = load_shared(gate + sample * gate_b + token * gate_l, cols, inside)
    added = gate_row * load_once(y + row * C, cols, inside)
    tl.store(out + row * C + cols, load_once(x + row * C, cols, inside) + added, mask=inside)


@jit
def _gate_residual_bwd_kernel(
    dout,
    y,
    gate,
    dy,
    dgate,
    L,
    num_parts,
    rows_per_part,
    gate_b,
    gate_l,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    NEEDS_GATE: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    sample, first = (program // num_parts).to(tl.int64), (program % num_parts) * rows_per_part
    cols = tl.arange(0, BLOCK)
    inside = cols < C
    gate += sample * gate_b
    gate_row = load_row(gate, cols, inside)
    dgate_sum = tl.zeros([BLOCK], tl.float32)
    for token in tl.range(first, tl.minimum(first + rows_per_part, L), num_stages=STAGES):
        row = sample * L + token
        if TOKENS:
            gate_row = load_row(gate + (row - sample * L) * gate_l, cols, inside)
        dout_row = load_row(dout + row * C, cols, inside)
        tl.store(dy + row * C + cols, gate_row * dout_row, mask=inside)
        if NEEDS_GATE:
            dgate_row = load_row(y + row * C, cols, inside) * dout_row
            if TOKENS:
                tl.store(dgate + row * C + cols, dgate_row, mask=inside)
            else:
                dgate_sum += dgate_row
    if NEEDS_GATE and not TOKENS:
        tl.store(dgate + program.to(tl.int64) * C + cols, dgate_sum, mask=inside)


@jit
def _gate_residual_ln_modulate_fwd_kernel(
    x,
    y,
    gate,
    scale,
    shift,
    residual,
    out,
    means,
    rstds,
    L,
    gate_b,
    gate_l,
    scale_b,
    scale_l,
    shift_b,
    shift_l,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
):
    program = tl.program_id(0)
    row, sample, token = (
        program.to(tl.int64),
        (program // L).to(tl.int64),
        (program % L).to(tl.int64),
    )
    cols = tl.max_contiguous(tl.arange(0, BLOCK), WIDTH)
    inside = cols < C
    added = load_once(y + row * C, cols, inside)
    if GATED:
        added = load_shared(gate + sample * gate_b + token * gate_l, cols, inside) * added
    stored = (load_once(x + row * C, cols, inside) + added).to(residual.dtype.element_ty)
    tl.store(residual + row * C + cols, stored, mask=inside)
    mean, rstd, normed = layer_norm(stored.to(tl.float32), inside, eps, C)
    scale_row = load_shared(scale + sample * scale_b + token * scale_l, cols, inside)
    shift_row = load_shared(shift + sample * shift_b + token * shift_l, cols, inside)
    tl.store(out + row * C + cols, normed * (1.0 + scale_row) + shift_row, mask=inside)
    tl.store(means + row, mean)
    tl.store(rstds + row, rstd)


@jit
def _gate_residual_ln_modulate_bwd_kernel(
    dresidual,
    dout,
    residual,
    means,
    rstds,
    y,
    gate,
    scale,
    dx,
    dy,
    dgate,
    dscale,
    dshift,
    L,
    num_parts,
    rows_per_part,
    gate_b,
    gate_l,
    scale_b,
    scale_l,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    GATED: tl.constexpr,
    WRITES_Y: tl.constexpr,
    NEEDS_GATE: tl.constexpr,
    NEEDS_PARAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    sample, first = (program // num_parts).to(tl.int64), (program % num_parts) * rows_per_part
    cols = tl.arange(0, BLOCK)
    inside = cols < C
    dgate_sum = tl.zeros([BLOCK], tl.float32)
    dscale_sum = tl.zeros([BLOCK], tl.float32)
    dshift_sum = tl.zeros([BLOCK], tl.float32)
    for token in tl.range(first, tl.minimum(first + rows_per_part, L), num_stages=STAGES):
        row = sample * L + token
        place = row - sample * L
        dout_row = load_row(dout + row * C, cols, inside)
        rstd = tl.load(rstds + row)
        normed = load_row(residual + row * C, cols, inside)
        normed = tl.where(inside, (normed - tl.load(means + row)) * rstd, 0.0)
        if NEEDS_PARAMS:
            if TOKENS:
                tl.store(dscale + row * C + cols, dout_row * normed, mask=inside)
                tl.store(dshift + row * C + cols, dout_row, mask=inside)
            else:
                dscale_sum += dout_row * normed
                dshift_sum += dout_row
        scale_row = load_row(scale + sample * scale_b + place * scale_l, cols, inside)
        grad_row = layer_norm_grad(dout_row * (1.0 + scale_row), normed, rstd, C)
        grad_row += load_row(dresidual + row * C, cols, inside)
        tl.store(dx + row * C + cols, grad_row, mask=inside)
        if NEEDS_GATE:
            dgate_row = load_row(y + row * C, cols, inside) * grad_row
            if TOKENS:
                tl.store(dgate + row * C + cols, dgate_row, mask=inside)
            else:
                dgate_sum += dgate_row
        if GATED:
            grad_row *= load_row(gate + sample * gate_b + place * gate_l, cols, inside)
        if WRITES_Y:
            tl.store(dy + row * C + cols, grad_row, mask=inside)
    part = program.to(tl.int64) * C
    if NEEDS_GATE and not TOKENS:
        tl.store(dgate + part + cols, dgate_sum, mask=inside)
    if NEEDS_PARAMS and not TOKENS:
        tl.store(dscale + part + cols, dscale_sum, mask=inside)
        tl.store(dshift + part + cols, dshift_sum, mask=inside)


# -------- x + gate y


@triton_op("gate_residual")
def _gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x, y [B, L, C]; gate [B, 1 or L, C]."""
    x, y = aligned(x), aligned(y)
    out = torch.empty_like(x)
    if x.numel():
        gate, gate_b, gate_l = strided(gate)
        with torch.cuda.device_of(x):
            _gate_residual_fwd_kernel[(x.shape[0] * x.shape[1],)](
                x, y, gate, out, x.shape[1], gate_b, gate_l, **forward_shape(x)
            )
    return out


@_gate_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@triton_op("gate_residual_backward")
def _gate_residual_backward(
    dout: Tensor, y: Tensor, gate: Tensor, needs_gate: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of y and gate; the latter is empty, [0], unless needs_gate."""
    dout, y = aligned(dout), aligned(y)
    dy, tokens = torch.empty_like(y), gate.shape[1] != 1
    num_parts, rows, shape = backward_shape(y, tokens, needs_gate, BACKWARD_VALUES, [dout, y])
    written = new_gradients(y, [gate.dtype], [needs_gate], tokens, num_parts)
    if y.numel():
        gates, gate_b, gate_l = strided(gate)
        with torch.cuda.device_of(y):
            _gate_residual_bwd_kernel[(y.shape[0] * num_parts,)](
                dout,
                y,
                gates,
                dy,
                *written,
                y.shape[1],
                num_parts,
                rows,
                gate_b,
                gate_l,
                NEEDS_GATE=needs_gate,
                **shape,
            )
    return dy, finish(written, [gate.dtype], tokens)[0]


@_gate_residual_backward.register_fake
def _(dout: Tensor, y: Tensor, gate: Tensor, needs_gate: bool) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape if needs_gate else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None
    if not any(ctx.needs_input_grad[1:]):
        return dout, None, None
    dy, dgate = _gate_residual_backward(dout, *ctx.saved_tensors, ctx.needs_input_grad[2])
    return dout, dy, dgate if ctx.needs_input_grad[2] else None


_gate_residual.register_autograd(_backward, setup_context=_save)


# -------- with LayerNorm and modulation


@triton_op("gate_residual_ln_modulate")
def _gate_residual_ln_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y [B, L, C]; gate, scale, shift [B, 1 or L, C].

    Residual and modulated, and mean and 1 / standard deviation of the residual's rows, fp32 [B, L].
    """
    x, y = aligned(x), aligned(y)
    residual, out, means, rstds = (
        torch.empty_like(x),
        torch.empty_like(x),
        row_values(x),
        row_values(x),
    )
    if x.numel():
        (scale, scale_b, scale_l), (shift, shift_b, shift_l) = strided(scale), strided(shift)
        gates, gate_b, gate_l = (x, 0, 0) if gate is None else strided(gate)
        with torch.cuda.device_of(x):
            _gate_residual_ln_modulate_fwd_kernel[(means.numel(),)](
                x,
                y,
                gates,
                scale,
                shift,
                residual,
                out,
                means,
                rstds,
                x.shape[1],
                gate_b,
                gate_l,
                scale_b,
                scale_l,
                shift_b,
                shift_l,
                eps,
                GATED=gate is not None,
                **forward_shape(x),
            )
    return residual, out, means, rstds


@_gate_residual_ln_modulate.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), row_values(x), row_values(x)


@triton_op("gate_residual_ln_modulate_backward")
def _gate_residual_ln_modulate_backward(
    dresidual: Tensor,
    dout: Tensor,
    residual: Tensor,
    means: Tensor,
    rstds: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift_dtype: torch.dtype,
    needs_gate: bool,
    needs_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, gate, scale and shift.

    Empty, [0]: that of y where x's serves, that of gate unless needs_gate, the last two unless
    needs_params.
    """
    dresidual, dout, residual, y = aligned(dresidual), aligned(dout), aligned(residual), aligned(y)
    tokens, writes_y = scale.shape[1] != 1, gate is not None or y.dtype != residual.dtype
    dx, dy = torch.empty_like(residual), torch.empty_like(y) if writes_y else y.new_empty(0)
    dtypes, needed = (
        [scale.dtype if gate is None else gate.dtype, scale.dtype, shift_dtype],
        [needs_gate, needs_params, needs_params],
    )
    operands = [
        dresidual,
        dout,
        residual,
        scale,
        *[y] * needs_gate,
        *([] if gate is None else [gate]),
    ]
    num_parts, rows, shape = backward_shape(y, tokens, any(needed), FUSED_BACKWARD_VALUES, operands)
    written = new_gradients(y, dtypes, needed, tokens, num_parts)
    if y.numel():
        scales, scale_b, scale_l = strided(scale)
        gates, gate_b, gate_l = (scales, 0, 0) if gate is None else strided(gate)
        with torch.cuda.device_of(y):
            _gate_residual_ln_modulate_bwd_kernel[(y.shape[0] * num_parts,)](
                dresidual,
                dout,
                residual,
                means,
                rstds,
                y,
                gates,
                scales,
                dx,
                dy,
                *written,
                y.shape[1],
                num_parts,
                rows,
                gate_b,
                gate_l,
                scale_b,
                scale_l,
                GATED=gate is not None,
                WRITES_Y=writes_y,
                NEEDS_GATE=needs_gate,
                NEEDS_PARAMS=needs_params,
                **shape,
            )
    dgate, dscale, dshift = finish(written, dtypes, tokens)
    return dx, dy, dgate, dscale, dshift


@_gate_residual_ln_modulate_backward.register_fake
def _(
    dresidual: Tensor,
    dout: Tensor,
    residual: Tensor,
    means: Tensor,
    rstds: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift_dtype: torch.dtype,
    needs_gate: bool,
    needs_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy = y.new_empty(y.shape if gate is not None or y.dtype != residual.dtype else (0,))
    dgate = (scale if gate is None else gate).new_empty(scale.shape if needs_gate else (0,))
    shape = scale.shape if needs_params else (0,)
    return (
        residual.new_empty(residual.shape),
        dy,
        dgate,
        scale.new_empty(shape),
        scale.new_empty(shape, dtype=shift_dtype),
    )


def _save_fused(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    _, y, gate, scale, shift, _ = inputs
    residual, _, means, rstds = output
    ctx.save_for_backward(residual, means, rstds, y, gate, scale)
    ctx.shift_dtype = shift.dtype
    ctx.set_materialize_grads(False)


def _backward_fused(
    ctx: Any, dresidual: Tensor | None, dout: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    residual, *saved = ctx.saved_tensors
    if dresidual is None and dout is None:
        return (None,) * 6
    dresidual = torch.zeros_like(residual) if dresidual is None else dresidual
    dout = torch.zeros_like(residual) if dout is None else dout
    needs_gate, needs_params = (
        ctx.needs_input_grad[2],
        ctx.needs_input_grad[3] or ctx.needs_input_grad[4],
    )
    dx, dy, dgate, dscale, dshift = _gate_residual_ln_modulate_backward(
        dresidual, dout, residual, *saved, ctx.shift_dtype, needs_gate, needs_params
    )
    dy = dx if saved[3] is None and saved[2].dtype == dx.dtype else dy
    return (
        dx,
        dy,
        dgate if needs_gate else None,
        *((dscale, dshift) if needs_params else (None, None)),
        None,
    )


_gate_residual_ln_modulate.register_autograd(_backward_fused, setup_context=_save_fused)


# -------- the public functions


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """x + gate y, the gated residual of a diffusion transformer.

    x, y: [B, L, C] tokens, any float dtypes (Wan under a bf16 attention: y bf16, gate fp32).
    gate: [C], [B, C], or [B or 1, L or 1, C] (one a token: Wan 2.2 ti2v), any float dtype;
    slices and chunks of a larger tensor are read where they lie. backend: a forced
    backend, see `dispatch.py`. Returns x's shape and dtype, rounded once from fp32 (float64 for
    float64 x). Differentiable in x, y and gate; each gradient has its input's dtype, and sums
    over tokens are fp32. A sample's bits do not depend on the rest of the batch. ValueError: a
    shape, dtype or device that does not fit, or a backend that cannot serve.

    In diffusers 0.42: the lines `hidden_states = hidden_states + ... * gate` after the
    self-attention and the feed-forward of WanTransformerBlock.forward, of
    HunyuanVideoTransformerBlock.forward (both streams) and, after `proj_out`, of
    HunyuanVideoSingleTransformerBlock.forward.
    """
    if select_backend("gate_residual", x, backend) == "reference":
        return reference.gate_residual(x, y, gate)
    checks.check_sequence("x", x)
    checks.check_like("y", y, x)
    return _gate_residual(x.contiguous(), y.contiguous(), *common_tokens(x, gate=gate))


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
    """`gate_residual` and `ln_modulate` of its result, in one pass and with the same bits:
    (residual, modulated).

    x, y: [B, L, C] tokens, any float dtypes. gate: as for `gate_residual`, or None for x + y.
    scale, shift, eps: as for `ln_modulate`, which reads the residual as stored. backend:
    a forced backend, see `dispatch.py`. Returns both in x's shape and dtype. Differentiable in x,
    y, gate, scale and shift; each gradient has its input's dtype. Between the LayerNorm and the
    residual gradients stay in fp32, so they are closer to the exact ones than the two ops'.
    ValueError: a shape, dtype or device that does not fit, or a backend that cannot serve.

    In diffusers 0.42: in WanTransformerBlock.forward from the gated residual of the
    self-attention to `norm2` (affine: scale = weight - 1, shift = bias), and from the residual
    of the cross-attention (gate None) to the modulated `norm3`; in
    HunyuanVideoTransformerBlock.forward step 3, "Modulation and residual connection", of either
    stream. A block's last residual can be fused with the next block's `norm1`.
    """
    if select_backend("gate_residual_ln_modulate", x, backend) == "reference":
        return reference.gate_residual_ln_modulate(x, y, gate, scale, shift, eps=eps)
    checks.check_sequence("x", x)
    checks.check_like("y", y, x)
    *gates, scale, shift = common_tokens(x, gate=gate, scale=scale, shift=shift)
    return _gate_residual_ln_modulate(
        x.contiguous(), y.contiguous(), gates[0] if gates else None, scale, shift, eps
    )[:2]
