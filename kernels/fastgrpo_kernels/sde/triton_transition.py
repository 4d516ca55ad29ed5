"""The parts of a Triton kernel that the ops of a transition share: tiles, mean, exact sum and
log-probability.

Every product and every sum is rounded on its own (launch with enable_fp_fusion=False), in the order
of `reference.py`, and the sum over elements is exact (`reference._exact_row_sum`): neither the tile
size nor the backend shows in the bits.

Shapes: B samples of P elements, T = ceil(P / TILE) tiles each. Program i serves tile i % T of
sample i // T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import jit, tl, triton

TILE = 2048
"""Elements per program, 16 per thread: four 16-byte accesses in fp32, two in bf16. At 480p the 683
programs of a step fit an H100 at once (72 registers a thread: 7 on each of 132 SMs); 1,365 of half
the size, with 55 registers, would not.
"""
LAUNCH: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@jit
def program_offsets(num_tiles, P, TILE: tl.constexpr):
    """The tile of this program.

    Returns:
        row: The sample. int64, as the next two.
        first: The tile's first element within the sample.
        base: The same element within [B, P].
        offsets: [TILE] int32, to be added to base.
        mask: [TILE], False beyond the end of the sample.
    """
    program = tl.program_id(0)
    row = (program // num_tiles).to(tl.int64)
    first = (program % num_tiles).to(tl.int64) * TILE
    offsets = tl.arange(0, TILE)
    return row, first, row * P + first, offsets, offsets < P - first


@jit
def transition_mean(
    latents,
    velocity,
    velocity_uncond,
    a,
    b,
    guidance_scale,
    base,
    offsets,
    mask,
    GUIDED: tl.constexpr,
):
    """a x + b v of one tile, fp32 [TILE], with v = v_uncond + w (v_cond - v_uncond). a, b: scalars.
    base, offsets, mask: from `program_offsets`.
    """
    x = tl.load(latents + base + offsets, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(velocity + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        uncond = tl.load(velocity_uncond + base + offsets, mask=mask, other=0.0).to(tl.float32)
        v = uncond + guidance_scale * (v - uncond)
    return a * x + b * v


@jit
def exact_sum(terms, std):
    """Sum of fp32 terms, float64, each rounded to a multiple of 2^(2k - 24), k = floor(log2 std):
    the order of the terms does not show in the bits.
    """
    k = ((std.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    # 1.5 * 2^(2k + 28): adding and subtracting it drops every bit below 2^(2k - 24).
    rounder = (((2 * k + 1051).to(tl.int64) << 52) | 0x8000000000000).to(tl.float64, bitcast=True)
    return tl.sum((terms.to(tl.float64) + rounder) - rounder)


@jit
def log_probs_of(
    partials, std, P, num_tiles, rows, valid, NORMALIZED: tl.constexpr, COLUMNS: tl.constexpr
):
    """Log-probabilities, fp32, of these rows (int64, where valid) from the sums of their tiles
    [B, T]. NaN where std == 0.
    """
    columns = tl.arange(0, COLUMNS)
    sums = tl.zeros(rows.shape, tl.float64)
    for start in range(0, num_tiles, COLUMNS):
        column = (start + columns)[None, :]
        mask = valid[:, None] & (column < num_tiles)
        sums += tl.sum(
            tl.load(partials + rows[:, None] * num_tiles + column, mask=mask, other=0.0), axis=1
        )
    deviation = tl.load(std + rows, mask=valid, other=1.0)
    stochastic = deviation > 0
    error = sums / P
    if NORMALIZED:
        s = tl.where(stochastic, deviation, 1.0).to(tl.float64)
        error = error / (2.0 * s * s) + tl.log(s) + 0.91893853320467274178  # ln(2 pi) / 2
    return tl.where(stochastic, (-error).to(tl.float32), float("nan"))


@jit
def _log_prob_kernel(
    partials,
    std,
    log_probs,
    P,
    num_tiles,
    B,
    NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows < B
    tl.store(
        log_probs + rows,
        log_probs_of(partials, std, P, num_tiles, rows, valid, NORMALIZED, COLUMNS),
        mask=valid,
    )


def empty_partials(samples: Tensor) -> tuple[int, Tensor]:
    """P, and an uninitialised tensor for the sums of the tiles, float64 [B, T]. B must not be 0."""
    batch, P = samples.shape[0], samples.numel() // samples.shape[0]
    return P, torch.empty(batch, triton.cdiv(P, TILE), dtype=torch.float64, device=samples.device)


def finishing_block(num_tiles: int) -> dict[str, int]:
    """How many rows and columns of the tiles' sums a finishing program adds up at a time: a
    function of T only, never of the batch.
    """
    columns = min(triton.next_power_of_2(num_tiles), 2048)
    return {"ROWS": max(128 // columns, 1), "COLUMNS": columns}


def finish_log_probs(partials: Tensor, std: Tensor, P: int, normalized: bool) -> Tensor:
    """Log-probabilities, fp32 [B], from the sums of the tiles, float64 [B, T]."""
    batch, num_tiles = partials.shape
    block = finishing_block(num_tiles)
    log_probs = torch.empty_like(std)
    grid = (triton.cdiv(batch, block["ROWS"]),)
    _log_prob_kernel[grid](
        partials, std, log_probs, P, num_tiles, batch, NORMALIZED=normalized, **block, **LAUNCH
    )
    return log_probs
