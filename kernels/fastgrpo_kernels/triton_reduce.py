"""Second stage of the Triton backward passes' sums over tokens: add partial sums up, always in the
same order.

In the first stage, in each op's own file, one program adds the rows of a part in its registers and
writes the result once; here the parts are added. There are no atomics, and the order depends on the
number of parts only: the same input gives the same bits, and a sample's gradient does not depend on
the rest of the batch.

Shapes: S sums (of scale, of shift ...) for each of B samples, N parts each, C channels. All of them
are one launch: a sum alone has too few programs for a GPU, and each launch would take as long as
several rows of the first stage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import jit, tl, triton

# Constants: a function of B would let the batch change the bits.
BLOCK_N = 64
BLOCK_C = 32
MAX_SUMS = 3
"""The kernel's results."""


@jit
def _column_sum_kernel(
    partials,
    first,
    second,
    third,
    B,
    num_parts,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    out = first
    if second is not None:  # noqa: SIM102 - what the compiler decides, then what the program does
        if program >= B:
            out = second
    if third is not None:  # noqa: SIM102
        if program >= 2 * B:
            out = third
    out += (program % B).to(tl.int64) * C
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    parts = tl.arange(0, BLOCK_N)
    mask = (columns < C)[None, :]
    base = partials + program.to(tl.int64) * num_parts * C
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, num_parts, BLOCK_N):
        part = (start + parts)[:, None]
        offsets = part.to(tl.int64) * C + columns[None, :]
        total += tl.load(base + offsets, mask=mask & (part < num_parts), other=0.0)
    tl.store(out + columns, tl.sum(total, axis=0), mask=columns < C)


def column_sums(partials: Tensor, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Sums over the parts, in a fixed order, in one launch on the tensor's device.

    Args:
        partials: [S, B, N, C], fp32, contiguous, S at most MAX_SUMS. N = 0 gives zeros.
        dtype: Of the results, each rounded to it once.

    Returns:
        S tensors [B, C], each with memory of its own.
    """
    S, B, N, C = partials.shape
    outputs = [torch.empty((B, C), dtype=dtype, device=partials.device) for _ in range(S)]
    if S * B * C:
        pointers = [*outputs, *[None] * (MAX_SUMS - S)]
        with torch.cuda.device_of(partials):
            _column_sum_kernel[(S * B, triton.cdiv(C, BLOCK_C))](
                *(partials, *pointers, B, N), C=C, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, num_warps=4
            )
    return outputs
