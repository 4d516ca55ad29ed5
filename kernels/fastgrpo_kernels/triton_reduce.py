"""The second stage of the Triton backward passes' reductions over tokens: add partial sums up,
always in the same order.

Shapes: B sums to make, N parts each, C channels. In the first stage (each op's own file) one
program adds a part's rows in its registers and writes the result once; here the parts are added.
No atomics, and the order depends on N alone, so the same input gives the same bits and a
sample's gradient does not depend on what else is in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import jit, tl, triton

BLOCK_N, BLOCK_C, NUM_WARPS = (
    64,
    32,
    4,
)  # constants: a formula of B would let the batch change the bits


@jit
def _column_sum_kernel(
    partials, out, num_parts, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    sample = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    parts = tl.arange(0, BLOCK_N)
    inside = (cols < C)[None, :]
    base = partials + sample * num_parts * C
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, num_parts, BLOCK_N):
        part = (start + parts)[:, None]
        total += tl.load(
            base + part.to(tl.int64) * C + cols[None, :],
            mask=inside & (part < num_parts),
            other=0.0,
        )
    tl.store(out + sample * C + cols, tl.sum(total, axis=0), mask=cols < C)


def column_sum(partials: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum `partials` [B, N, C] (fp32, contiguous) over N in a fixed order; returns [B, C] in
    `dtype`, rounded once. N = 0 gives zeros.
    """
    B, N, C = partials.shape
    out = torch.empty((B, C), dtype=dtype, device=partials.device)
    if out.numel():
        _column_sum_kernel[(B, triton.cdiv(C, BLOCK_C))](
            partials, out, N, C=C, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS
        )
    return out
