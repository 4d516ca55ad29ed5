"""The Triton kernels of `gate_residual`, `ln_modulate` and `gate_residual_ln_modulate`, and their
launchers. The formulas are those of gate_residual_ln_modulate.py.

One pair of kernels serves the three functions: parts that a call does not have are left out when
the kernel is compiled. So the fused op has the bits of the two ops one after the other: it
normalises the residual as it is stored, in the same arithmetic.

Forward: one program per row. The row stays in registers, so the variance is that of the differences
(two passes, one read). Arithmetic is fp32, its order decided by x's dtype and C alone; what is
fused to a multiply-add is written as such, and nothing else is.

Backward: a program walks through the rows of one part of L and keeps its share of the sums in
registers; `column_sums` adds the parts up. The parts depend only on L, so no gradient depends on
what else is in the batch. The sums over the tokens are not a second kernel, which would keep fewer
registers: it would read dmodulated and the residual again (and y, and dx), 5 tensors instead of 3
for `ln_modulate`, 10 instead of 6 for the fused op, where G7 (docs/performance.md) leaves 15 %.
Instead a thread has 12 channels, not 16 to 24, and a row's two sums are one wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import jit, tl, triton, triton_op
from ..triton_reduce import column_sums
from .layout import aligned, row_constants, stages, strided
from .triton_rows import (
    add,
    columns,
    fma,
    load,
    mul,
    plus_one,
    rounded,
    scaled,
    store,
    thread_sums,
    zeros,
)

FORWARD_VALUES, BACKWARD_VALUES = 40, 12
"""Channels of a row in one thread's registers, at most (more where 16 warps are too few). A
backward keeps up to three sums and four operands of each.
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
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
    THREADS: tl.constexpr,
):
    program = tl.program_id(0)
    row = program.to(tl.int64)
    sample, token = (program // L).to(tl.int64), (program % L).to(tl.int64)
    cols = columns(HEAD, TAIL, WIDTH)
    x_row = load(x + row * C, cols, C)
    if y is not None:
        y_row = load(y + row * C, cols, C)
        if gate is None:
            x_row = add(x_row, y_row)
        else:
            x_row = fma(load(gate + sample * gate_b + token * gate_l, cols, C), y_row, x_row)
        x_row = rounded(x_row, residual.dtype.element_ty)  # the LayerNorm sees it as stored
        store(residual + row * C, x_row, cols, C)
    if scale is not None:
        mean = tl.sum(thread_sums(x_row, WIDTH, THREADS), axis=0) * (1.0 / C)
        x_row = centred(x_row, mean, cols, C)
        variance = tl.sum(thread_sums(mul(x_row, x_row), WIDTH, THREADS), axis=0) * (1.0 / C)
        rstd = tl.rsqrt(variance + eps)
        scale_row = load(scale + sample * scale_b + token * scale_l, cols, C)
        shift_row = load(shift + sample * shift_b + token * shift_l, cols, C)
        out = fma(scaled(x_row, rstd), plus_one(scale_row), shift_row)
        store(modulated + row * C, out, cols, C)
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
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
    THREADS: tl.constexpr,
    TOKENS: tl.constexpr,
    RELOADS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    sample, first = (program // num_parts).to(tl.int64), (program % num_parts) * rows_per_part
    cols = columns(HEAD, TAIL, WIDTH)
    dgate_sum, dscale_sum, dshift_sum = zeros(cols), zeros(cols), zeros(cols)
    if not RELOADS:
        if scale is not None:
            scale_row = load(scale + sample * scale_b, cols, C)
        if gate is not None:
            gate_row = load(gate + sample * gate_b, cols, C)
    for token in tl.range(first, tl.minimum(first + rows_per_part, L), num_stages=STAGES):
        row = sample * L + token
        token_offset = row - sample * L  # int64
        if dmodulated is not None:
            grad_row = load(dmodulated + row * C, cols, C)
            mean, rstd = tl.load(statistics + 2 * row), tl.load(statistics + 2 * row + 1)
            normed = scaled(centred(load(residual + row * C, cols, C), mean, cols, C), rstd)
            if dscale is not None:
                if TOKENS:
                    store(dscale + row * C, mul(grad_row, normed), cols, C)
                    store(dshift + row * C, grad_row, cols, C)
                else:
                    dscale_sum = fma(grad_row, normed, dscale_sum)
                    dshift_sum = add(dshift_sum, grad_row)
            if RELOADS:
                scale_row = load(scale + sample * scale_b + token_offset * scale_l, cols, C)
            grad_row = layer_norm_grad(
                mul(grad_row, plus_one(scale_row)), normed, rstd, C, WIDTH, THREADS
            )
            if dresidual is not None:
                grad_row = add(grad_row, load(dresidual + row * C, cols, C))
            store(dx + row * C, grad_row, cols, C)
        else:
            grad_row = load(dresidual + row * C, cols, C)
        if dgate is not None:
            y_row = load(y + row * C, cols, C)
            if TOKENS:
                store(dgate + row * C, mul(y_row, grad_row), cols, C)
            else:
                dgate_sum = fma(y_row, grad_row, dgate_sum)
        if dy is not None:
            if gate is not None:
                if RELOADS:
                    gate_row = load(gate + sample * gate_b + token_offset * gate_l, cols, C)
                grad_row = mul(grad_row, gate_row)
            store(dy + row * C, grad_row, cols, C)
    part = program.to(tl.int64) * C
    if not TOKENS:
        if dgate is not None:
            store(dgate + part, dgate_sum, cols, C)
        if dscale is not None:
            store(dscale + part, dscale_sum, cols, C)
            store(dshift + part, dshift_sum, cols, C)


@jit
def centred(x, mean, cols, C: tl.constexpr):
    """x - mean, 0 beyond the row."""
    tail = None
    if cols[1] is not None:
        tail = tl.where(cols[1] < C, x[1] - mean, 0.0)
    return tl.where(cols[0] < C, x[0] - mean, 0.0), tail


@jit
def layer_norm_grad(
    grad, normed, rstd, C: tl.constexpr, WIDTH: tl.constexpr, THREADS: tl.constexpr
):
    """Gradient of a row before its LayerNorm, of which `grad` is that of the normalised row. The
    program waits once for both sums.
    """
    sums = (
        thread_sums(grad, WIDTH, THREADS),
        thread_sums(mul(grad, normed), WIDTH, THREADS),
    )
    mean_grad, mean_dot = tl.reduce(sums, 0, _add_pairs)
    mean_grad, mean_dot = mean_grad * (1.0 / C), mean_dot * (1.0 / C)
    tail = None
    if grad[1] is not None:
        tail = (grad[1] - mean_grad - normed[1] * mean_dot) * rstd
    return (grad[0] - mean_grad - normed[0] * mean_dot) * rstd, tail


@jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


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
        steps = (*gate_steps, *scale_steps, *shift_steps)
        with torch.cuda.device_of(x):
            _gate_residual_ln_modulate_fwd_kernel[(x.shape[0] * x.shape[1],)](
                *(x, y, gate, scale, shift, *outputs, x.shape[1], *steps, eps),
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
    # Multiply-adds may be fused: no other op need give these bits.
    constants = row_constants(like, BACKWARD_VALUES) | {"enable_fp_fusion": True}
    reloads = fused or tokens or (scale is not None and constants["num_warps"] == 16)
    if scale is not None and not fused:  # fewer than the compiler takes, but none spills
        constants["maxnreg"] = 64 if constants["num_warps"] == 16 else 80
    if any(needed) and not tokens:  # without a sum over L every row is a part
        rows = max(MIN_ROWS, triton.cdiv(L, MAX_PARTS))
    read = [dresidual, dmodulated, residual, y if needed[0] else None, *(scale, gate) * fused]
    num_stages = stages(like, constants, [t for t in read if t is not None]) if rows > 1 else 1
    num_parts = triton.cdiv(L, rows)

    dx = None if dmodulated is None else torch.empty_like(like)
    dy = torch.empty_like(y) if y is not None and needs_dy(y, gate, like) else None
    if tokens:
        sums = [like.new_empty(like.shape, dtype=modulation.dtype) if w else None for w in wanted]
    else:
        partials = like.new_empty((sum(wanted), B, num_parts, C), dtype=torch.float32)
        parts = iter(partials.unbind())
        sums = [next(parts) if w else None for w in wanted]
    if like.numel():
        gate, *gate_steps = strided(gate)
        scale, *scale_steps = strided(scale)
        inputs = (dresidual, dmodulated, residual, statistics, y, gate, scale)
        sizes = (L, num_parts, rows, *gate_steps, *scale_steps)
        with torch.cuda.device_of(like):
            _gate_residual_ln_modulate_bwd_kernel[(B * num_parts,)](
                *(*inputs, dx, dy, *sums, *sizes),
                TOKENS=tokens,
                RELOADS=reloads,
                STAGES=num_stages,
                **constants,
            )
    if not tokens:
        totals = iter(column_sums(partials, modulation.dtype))
        sums = [next(totals)[:, None] if w else None for w in wanted]
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
