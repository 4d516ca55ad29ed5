"""Second stage of the Triton backward passes' sums over tokens: add partial sums up, always in the
same order.

In the first stage, in each op's own file, one program adds the rows of a part in its registers and
writes the result once; here the parts are added. There are no atomics, and the order depends on the
number of parts only: the same input gives the same bits, and a sample's gradient does not depend on
the rest of the batch.

Shapes: B sums, N parts each, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import jit, tl, triton

# Constants: a function of B would let the batch change the bits.
BLOCK_N = 64
BLOCK_C = 32


@jit
def _column_sum_kernel(
    partials, out, num_parts, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    sample = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    parts = tl.arange(0, BLOCK_N)
    mask = (columns < C)[None, :]
    base = partials + sample * num_parts * C
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, num_parts, BLOCK_N):
        part = (start + parts)[:, None]
        offsets = part.to(tl.int64) * C + columns[None, :]
        total += tl.load(base + offsets, mask=mask & (part < num_parts), other=0.0)
    tl.store(out + sample * C + columns, tl.sum(total, axis=0), mask=columns < C)


def column_sum(partials: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum over the parts, in a fixed order.

    Args:
        partials: [B, N, C], fp32, contiguous. N = 0 gives zeros.
        dtype: Of the result, which is rounded to it once.

    Returns:
        [B, C].
    """
    B, N, C = partials.shape
    out = torch.empty((B, C), dtype=dtype, device=partials.device)
    if out.numel():
        _column_sum_kernel[(B, triton.cdiv(C, BLOCK_C))](
            partials, out, N, C=C, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, num_warps=4
        )
    return out
