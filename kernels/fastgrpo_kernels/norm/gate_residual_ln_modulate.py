"""The gated residual and the LayerNorm with modulation of a diffusion transformer, alone and fused.

    residual  = round(x + gate y)                              `gate_residual`
    modulated = LN(residual) (1 + scale) + shift               `ln_modulate`, whose residual is x

`gate_residual_ln_modulate` makes both in one pass. One pair of kernels serves the three functions:
parts that a call does not have are left out when the kernel is compiled. So the fused op has the
bits of the two ops one after the other: it normalises the residual as it is stored, in the same
arithmetic.

Shapes: x, y [B, L, C], B samples of L tokens of C channels; gate, scale, shift [B, 1 or L, C]; mean
and variance are over C. Forward: one program per row. The row stays in registers, so the variance
is that of the differences (two passes, one read). Arithmetic is fp32 without fused multiply-adds,
in an order that only x's dtype and C decide.

Backward, with xhat = (residual - mean) rstd and g = dmodulated (1 + scale):
    r      = dresidual + rstd (g - mean(g) - xhat mean(g xhat))
    dx     = r                        dy     = gate r               dgate = sum over L of y r
    dscale = sum over L of dmodulated xhat      dshift = sum over L of dmodulated
r stays in fp32, where the two ops would round it in between. A program walks through the rows of
one part of L and keeps its share of the sums in registers; `column_sum` adds the parts up. The
parts depend only on L, so no gradient depends on what else is in the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import jit, select_backend, tl, triton, triton_op
from ..triton_reduce import column_sum
from . import reference
from .layout import aligned, modulations, row_constants, stages, strided

FORWARD_VALUES, BACKWARD_VALUES, FUSED_BACKWARD_VALUES = 40, 16, 24
"""Channels of a row in one thread's registers, at most. The fused backward keeps three sums, which
want more registers than 16 warps can have; for the same reason it reads scale and gate again for
each row.
"""
MAX_PARTS = 528
"""Parts of L in a backward: four programs for each of an H100's 132 SMs."""
MIN_ROWS = 4
"""Rows of a part: writing and reading its sums costs as much as several rows."""


# Kernels. Only the parts whose pointers are not None are compiled.


@jit
def _gate_residual_ln_modulate_fwd_kernel(
    x,
    y,
    gate,
    scale,
    shift,
    residual,
    modulated,
    statistics,
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
):
    program = tl.program_id(0)
    row = program.to(tl.int64)
    sample, token = (program // L).to(tl.int64), (program % L).to(tl.int64)
    cols = tl.max_contiguous(tl.arange(0, BLOCK), WIDTH)
    mask = cols < C
    x_row = _load_once(x + row * C, cols, mask)
    if y is not None:
        y_row = _load_once(y + row * C, cols, mask)
        if gate is not None:
            y_row = _load_shared(gate + sample * gate_b + token * gate_l, cols, mask) * y_row
        stored = (x_row + y_row).to(residual.dtype.element_ty)
        tl.store(residual + row * C + cols, stored, mask=mask)
        x_row = stored.to(tl.float32)  # the LayerNorm sees the residual as stored
    if scale is not None:
        mean, rstd, normed = _layer_norm(x_row, mask, eps, C)
        scale_row = _load_shared(scale + sample * scale_b + token * scale_l, cols, mask)
        shift_row = _load_shared(shift + sample * shift_b + token * shift_l, cols, mask)
        tl.store(modulated + row * C + cols, normed * (1.0 + scale_row) + shift_row, mask=mask)
        tl.store(statistics + 2 * row, mean)
        tl.store(statistics + 2 * row + 1, rstd)


@jit
def _gate_residual_ln_modulate_bwd_kernel(
    dresidual,
    dmodulated,
    residual,
    statistics,
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
    RELOADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    sample, first = (program // num_parts).to(tl.int64), (program % num_parts) * rows_per_part
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    dgate_sum = tl.zeros([BLOCK], tl.float32)
    dscale_sum = tl.zeros([BLOCK], tl.float32)
    dshift_sum = tl.zeros([BLOCK], tl.float32)
    if not RELOADS:
        if scale is not None:
            scale_row = _load_row(scale + sample * scale_b, cols, mask)
        if gate is not None:
            gate_row = _load_row(gate + sample * gate_b, cols, mask)
    for token in tl.range(first, tl.minimum(first + rows_per_part, L), num_stages=STAGES):
        row = sample * L + token
        token_offset = row - sample * L  # int64
        if dmodulated is not None:
            dmodulated_row = _load_row(dmodulated + row * C, cols, mask)
            rstd = tl.load(statistics + 2 * row + 1)
            normed = _load_row(residual + row * C, cols, mask)
            normed = tl.where(mask, (normed - tl.load(statistics + 2 * row)) * rstd, 0.0)
            if dscale is not None:
                if TOKENS:
                    tl.store(dscale + row * C + cols, dmodulated_row * normed, mask=mask)
                    tl.store(dshift + row * C + cols, dmodulated_row, mask=mask)
                else:
                    dscale_sum += dmodulated_row * normed
                    dshift_sum += dmodulated_row
            if RELOADS:
                scale_place = scale + sample * scale_b + token_offset * scale_l
                scale_row = _load_row(scale_place, cols, mask)
            grad_row = _layer_norm_grad(dmodulated_row * (1.0 + scale_row), normed, rstd, C)
            if dresidual is not None:
                grad_row += _load_row(dresidual + row * C, cols, mask)
            tl.store(dx + row * C + cols, grad_row, mask=mask)
        else:
            grad_row = _load_row(dresidual + row * C, cols, mask)
        if dgate is not None:
            dgate_row = _load_row(y + row * C, cols, mask) * grad_row
            if TOKENS:
                tl.store(dgate + row * C + cols, dgate_row, mask=mask)
            else:
                dgate_sum += dgate_row
        if dy is not None:
            if gate is not None:
                if RELOADS:
                    gate_place = gate + sample * gate_b + token_offset * gate_l
                    gate_row = _load_row(gate_place, cols, mask)
                grad_row *= gate_row
            tl.store(dy + row * C + cols, grad_row, mask=mask)
    part = program.to(tl.int64) * C
    if not TOKENS:
        if dgate is not None:
            tl.store(dgate + part + cols, dgate_sum, mask=mask)
        if dscale is not None:
            tl.store(dscale + part + cols, dscale_sum, mask=mask)
            tl.store(dshift + part + cols, dshift_sum, mask=mask)


@jit
def _load_row(pointer, cols, mask):
    """A row in fp32, 0 outside the mask."""
    return tl.load(pointer + cols, mask=mask, other=0.0).to(tl.float32)


@jit
def _load_once(pointer, cols, mask):
    """A row that no other program reads: it may leave the L1 cache first."""
    row = tl.load(pointer + cols, mask=mask, other=0.0, eviction_policy="evict_first")
    return row.to(tl.float32)


@jit
def _load_shared(pointer, cols, mask):
    """A row that many programs read."""
    row = tl.load(pointer + cols, mask=mask, other=0.0, eviction_policy="evict_last")
    return row.to(tl.float32)


@jit
def _layer_norm(x, mask, eps, C: tl.constexpr):
    """Mean, 1 / sqrt(var + eps) and the normalised row of x (fp32, 0 outside the mask)."""
    mean = tl.div_rn(tl.sum(x, axis=0), C * 1.0)
    centred = tl.where(mask, x - mean, 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, axis=0), C * 1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    return mean, rstd, centred * rstd


@jit
def _layer_norm_grad(dnormed, normed, rstd, C: tl.constexpr):
    """Gradient of a row before its LayerNorm; both rows are fp32 and 0 outside the mask."""
    mean_grad = tl.div_rn(tl.sum(dnormed, axis=0), C * 1.0)
    mean_dot = tl.div_rn(tl.sum(dnormed * normed, axis=0), C * 1.0)
    return (dnormed - mean_grad - normed * mean_dot) * rstd


# Launchers.


def _outputs(x: Tensor, y: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Residual, modulated and statistics, not yet written; [0] for what the call does not have."""
    return (
        x.new_empty(0 if y is None else x.shape),
        x.new_empty(0 if scale is None else x.shape),
        x.new_empty(0 if scale is None else (*x.shape[:2], 2), dtype=torch.float32),
    )


@triton_op("gate_residual_ln_modulate")
def _forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y [B, L, C]; gate, scale, shift [B, 1 or L, C], all of one length and one dtype.

    Returns:
        Residual (empty without y), modulated (empty without scale), both like x, and fp32
        [B, L, 2]: mean and 1 / standard deviation of the residual's rows (empty without scale).
    """
    x, y = aligned(x), None if y is None else aligned(y)
    outputs = _outputs(x, y, scale)
    if x.numel():
        gate, *gate_steps = strided(gate)
        scale, *scale_steps = strided(scale)
        shift, *shift_steps = strided(shift)
        # WIDTH, the channels that a thread loads at once, is x's for every operand: the compiler
        # lays a row out by the widest load of the kernel, the order of the row's sums follows the
        # layout, and no other operand's dtype may change it.
        width = 16 // x.element_size()
        steps = (*gate_steps, *scale_steps, *shift_steps)
        with torch.cuda.device_of(x):
            _gate_residual_ln_modulate_fwd_kernel[(x.shape[0] * x.shape[1],)](
                *(x, y, gate, scale, shift, *outputs, x.shape[1], *steps, eps),
                WIDTH=width,
                **row_constants(x, FORWARD_VALUES),
            )
    return outputs


@_forward.register_fake
def _(x: Tensor, y: Tensor | None, gate: Any, scale: Tensor | None, *_: Any) -> Any:
    return _outputs(x, y, scale)


@triton_op("gate_residual_ln_modulate_backward")
def _backward(
    dresidual: Tensor | None,
    dmodulated: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, gate, scale and shift, from what the forward saved.

    Args:
        needed: whether those of gate and of scale and shift are.

    Returns:
        Empty ([0]) are: an x's gradient that is dresidual, a y's that is x's, and what is not
        needed.
    """
    given = [None if d is None else aligned(d) for d in (dresidual, dmodulated, residual, y)]
    dresidual, dmodulated, residual, y = given
    like, modulation = _first(dmodulated, dresidual), _first(scale, gate)
    tokens, fused = modulation.shape[1] != 1, y is not None and scale is not None
    wanted = [needed[0], needed[1], needed[1]]

    (B, L, C), rows = like.shape, 1
    values = FUSED_BACKWARD_VALUES if fused else BACKWARD_VALUES
    constants = row_constants(like, values)
    if any(needed) and not tokens:  # without a sum over L every row is a part
        rows = max(MIN_ROWS, triton.cdiv(L, MAX_PARTS))
    read = [dresidual, dmodulated, residual, y if needed[0] else None, *(scale, gate) * fused]
    num_stages = stages(like, constants, [t for t in read if t is not None]) if rows > 1 else 1
    num_parts = triton.cdiv(L, rows)

    dx = None if dmodulated is None else torch.empty_like(like)
    dy = torch.empty_like(y) if y is not None and _writes_dy(y, gate, like) else None
    shape, dtype = ((B, L, C), modulation.dtype) if tokens else ((B, num_parts, C), torch.float32)
    sums = [like.new_empty(shape, dtype=dtype) if wants else None for wants in wanted]
    if like.numel():
        gate, *gate_steps = strided(gate)
        scale, *scale_steps = strided(scale)
        inputs = (dresidual, dmodulated, residual, statistics, y, gate, scale)
        sizes = (L, num_parts, rows, *gate_steps, *scale_steps)
        with torch.cuda.device_of(like):
            _gate_residual_ln_modulate_bwd_kernel[(B * num_parts,)](
                *(*inputs, dx, dy, *sums, *sizes),
                TOKENS=tokens,
                RELOADS=fused or tokens,
                STAGES=num_stages,
                **constants,
            )
    if not tokens:
        sums = [None if s is None else column_sum(s, modulation.dtype)[:, None] for s in sums]
    gradients = [like.new_empty(0) if d is None else d for d in (dx, dy, *sums)]
    return gradients[0], gradients[1], gradients[2], gradients[3], gradients[4]


@_backward.register_fake
def _(
    dresidual: Any, dmodulated: Any, residual: Any, statistics: Any, y: Any, *rest: Any
) -> tuple[Tensor, ...]:
    gate, scale, needed = rest
    like, modulation = _first(dmodulated, dresidual), _first(scale, gate)
    writes_dy = y is not None and _writes_dy(y, gate, like)
    return (
        like.new_empty(0 if dmodulated is None else like.shape),
        y.new_empty(y.shape) if writes_dy else like.new_empty(0),
        *(
            modulation.new_empty(modulation.shape) if wanted else like.new_empty(0)
            for wanted in (needed[0], needed[1], needed[1])
        ),
    )


def _first(one: Tensor | None, other: Tensor | None) -> Tensor:
    """The first that is not None."""
    tensor = other if one is None else one
    assert tensor is not None
    return tensor


def _writes_dy(y: Tensor, gate: Tensor | None, like: Tensor) -> bool:
    """Whether y's gradient differs from x's: it has a gate, or another dtype."""
    return gate is not None or y.dtype != like.dtype


# Autograd.


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, gate, scale, _, _ = inputs
    residual, _, statistics = output
    normed = (None, None) if scale is None else (x if y is None else residual, statistics)
    ctx.save_for_backward(*normed, y, gate, scale)
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, dresidual: Tensor | None, dmodulated: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    if dresidual is None and dmodulated is None:
        return (None,) * 6
    saved, (_, _, needs_gate, *needs) = ctx.saved_tensors, ctx.needs_input_grad
    y, gate, scale = saved[2:]
    dresidual = None if y is None else dresidual  # what arrives at an empty output
    dmodulated = None if scale is None else dmodulated
    needed = [needs_gate, dmodulated is not None and any(needs)]
    dx, dy, dgate, dscale, dshift = _backward(dresidual, dmodulated, *saved, needed)
    dx = dx if dresidual is None or dmodulated is not None else dresidual
    if y is None or not _writes_dy(y, gate, dx):
        dy = None if y is None else dx
    params = (dscale, dshift) if needed[1] else (None, None)
    return dx, dy, dgate if needed[0] else None, *params, None


_forward.register_autograd(_autograd, setup_context=_save)


# The public functions.


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
    if select_backend("ln_modulate", x, backend) == "reference":
        return reference.ln_modulate(x, scale, shift, eps=eps)
    return _launch(x, None, eps, scale=scale, shift=shift)[1]


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
    if select_backend("gate_residual", x, backend) == "reference":
        return reference.gate_residual(x, y, gate)
    return _launch(x, y, 0.0, gate=gate)[0]


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
    if select_backend("gate_residual_ln_modulate", x, backend) == "reference":
        return reference.gate_residual_ln_modulate(x, y, gate, scale, shift, eps=eps)
    gates = {} if gate is None else {"gate": gate}
    return _launch(x, y, eps, **gates, scale=scale, shift=shift)


def _launch(x: Tensor, y: Tensor | None, eps: float, **given: Tensor) -> tuple[Tensor, Tensor]:
    """Check the arguments, and call the op: residual and modulated."""
    checks.check_sequence("x", x)
    if y is not None:
        checks.check_like("y", y, x)
        y = y.contiguous()
    views = modulations(x, given)
    gate, scale, shift = map(views.get, ("gate", "scale", "shift"))
    return _forward(x.contiguous(), y, gate, scale, shift, eps)[:2]
