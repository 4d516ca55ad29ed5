"""The Triton kernels of `bias_gelu`, and their launchers. The formulas are those of bias_gelu.py.

A program has COLUMNS columns, a warp's 16-byte loads of 16-bit values, and walks down rows, ROWS at
a time; the columns' biases stay in registers, and so does a backward's sum of the bias's gradient,
which `column_sums` completes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import jit, tl, triton, triton_op
from ..norm.layout import aligned
from ..triton_reduce import column_sums

COLUMNS, ROWS, NUM_WARPS = 256, 8, 4
"""A tile: 16 values in each thread."""
PROGRAMS = 16 * 132
"""Of a backward that sums, about: so many for each of an H100's SMs that no wave is half empty."""


@jit
def _bias_gelu_fwd_kernel(
    x, bias, out, M, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    columns, offsets, mask = _tile(tl.program_id(0), M, C, COLUMNS, ROWS, 0)
    h = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        h += tl.load(bias + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    power, _ = _powers(h)
    tl.store(out + offsets, h * (1.0 / (1.0 + power)), mask=mask)


@jit
def _bias_gelu_bwd_kernel(
    dout,
    x,
    bias,
    dx,
    dbias,
    M,
    tiles_per_part,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LARGE: tl.constexpr = 1e30,
):
    blocks = tl.cdiv(C, COLUMNS)
    part, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    if bias is not None:
        bias_row = tl.load(bias + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(part * tiles_per_part, (part + 1) * tiles_per_part):
        _, offsets, mask = _tile(block, M, C, COLUMNS, ROWS, tile)
        h = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            h += bias_row
        power, slope = _powers(h)
        gate = 1.0 / (1.0 + power)
        # 1 - gate would lose what is left near 1; infinity times 0 would be none.
        rest = tl.minimum(power, LARGE) * gate
        gradient = tl.load(dout + offsets, mask=mask, other=0.0).to(tl.float32)
        gradient *= gate + h * slope * (gate * rest)
        tl.store(dx + offsets, gradient, mask=mask)
        if dbias is not None:
            total += gradient
    if dbias is not None:
        place = dbias + part.to(tl.int64) * C + columns
        tl.store(place, tl.sum(total, axis=0), mask=columns < C)


@jit
def _tile(program, M, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, tile):
    """Columns, offsets and mask of the tile `tile` further down than that of this program, of which
    those of one band of rows come first.
    """
    blocks: tl.constexpr = tl.cdiv(C, COLUMNS)
    columns = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    rows = (program // blocks + tile) * ROWS + tl.arange(0, ROWS)
    offsets = rows.to(tl.int64)[:, None] * C + columns[None, :]
    return columns, offsets, (rows < M)[:, None] & (columns < C)[None, :]


@jit
def _powers(h):
    """exp(-2 u), of which sigmoid(2 u) = 1 / (1 + exp(-2 u)), and 2 du/dh."""
    # 2 sqrt(2 / pi), and that times 0.044715; both times log2(e) for the power of two.
    square = h * h
    power = tl.exp2(h * (square * -0.1029432395800235 - 2.302208198144325))
    return power, 1.5957691216057308 + square * 0.21406444881780076


@triton_op("bias_gelu")
def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., C] contiguous; bias [C] or None."""
    C = x.shape[-1]
    x, out, M = aligned(x), torch.empty_like(x), x.numel() // C
    if M:
        grid = (triton.cdiv(M, ROWS) * triton.cdiv(C, COLUMNS),)
        with torch.cuda.device_of(x):
            _bias_gelu_fwd_kernel[grid](
                *(x, None if bias is None else aligned(bias), out, M),
                **{"C": C, "COLUMNS": COLUMNS, "ROWS": ROWS, "num_warps": NUM_WARPS},
            )
    return out


@triton_op("bias_gelu_backward")
def backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of bias; the latter is empty, [0], unless needed."""
    needed = bias is not None and needs_bias
    C = x.shape[-1]
    M, blocks = x.numel() // C, triton.cdiv(C, COLUMNS)
    # Parts of the rows: a function of M and C. Without a sum every tile is one.
    tiles = max(1, triton.cdiv(triton.cdiv(M, ROWS), triton.cdiv(PROGRAMS, blocks)))
    tiles = tiles if needed else 1
    num_parts, dx = triton.cdiv(M, ROWS * tiles), torch.empty_like(x)
    partials = x.new_empty((int(needed), 1, num_parts, C), dtype=torch.float32)
    if M:
        with torch.cuda.device_of(x):
            _bias_gelu_bwd_kernel[(num_parts * blocks,)](
                *(aligned(dout), aligned(x), None if bias is None else aligned(bias), dx),
                *(partials if needed else None, M, tiles),
                **{"C": C, "COLUMNS": COLUMNS, "ROWS": ROWS, "num_warps": NUM_WARPS},
            )
    if bias is None or not needed:
        return dx, x.new_empty(0)
    (dbias,) = column_sums(partials, bias.dtype)
    return dx, dbias[0]
