"""The Triton kernels of `gate_residual`, `ln_modulate` and `gate_residual_ln_modulate`, and their
launchers. The formulas are those of gate_residual_ln_modulate.py.

One pair of kernels serves the three functions: parts that a call does not have are left out when
the kernel is compiled. So the fused op has the bits of the two ops one after the other: it
normalises the residual as it is stored, in the same arithmetic.

Forward: one program per row. The row stays in registers, so the variance is that of the differences
(two passes, one read). Arithmetic is fp32 without fused multiply-adds, in an order that only x's
dtype and C decide.

Backward: a program walks through the rows of one part of L and keeps its share of the sums in
registers; `column_sum` adds the parts up. The parts depend only on L, so no gradient depends on
what else is in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import jit, tl, triton, triton_op
from ..triton_reduce import column_sum
from .layout import aligned, row_constants, stages, strided

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


def empty_outputs(
    x: Tensor, y: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual, modulated and statistics, not yet written; [0] for what the call does not have."""
    return (
        x.new_empty(0 if y is None else x.shape),
        x.new_empty(0 if scale is None else x.shape),
        x.new_empty(0 if scale is None else (*x.shape[:2], 2), dtype=torch.float32),
    )


@triton_op("gate_residual_ln_modulate")
def forward(
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
    outputs = empty_outputs(x, y, scale)
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


@triton_op("gate_residual_ln_modulate_backward")
def backward(
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
    like, modulation = first_given(dmodulated, dresidual), first_given(scale, gate)
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
    dy = torch.empty_like(y) if y is not None and needs_dy(y, gate, like) else None
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


def first_given(one: Tensor | None, other: Tensor | None) -> Tensor:
    """The first that is not None."""
    tensor = other if one is None else one
    assert tensor is not None
    return tensor


def needs_dy(y: Tensor, gate: Tensor | None, like: Tensor) -> bool:
    """Whether y's gradient differs from x's: it has a gate, or another dtype."""
    return gate is not None or y.dtype != like.dtype
