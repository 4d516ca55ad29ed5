"""What the operations of one transition share: their arguments, and in Triton the tiles, the mean,
the exact sum and the log-probability.

Every product and sum is rounded on its own (launch with enable_fp_fusion=False), in the order of
`reference.py`, and the sum over elements is exact, see `reference._exact_row_sum`: so neither
the tile nor the backend shows in the bits.

Shapes: B samples of P elements, T = ceil(P / TILE) tiles each. Programs are numbered sample by
sample, B T of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..checks import Coefficient
from ..dispatch import jit, tl, triton

TILE = 1024
"""Elements of a program, eight a thread: two 16-byte accesses in fp32, one in bf16."""
LAUNCH: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def transition_arguments(
    latents: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    a: Coefficient,
    b: Coefficient,
    std: Coefficient,
    guidance_scale: float,
    cfg_grad: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Checked, contiguous, and as the operations want them: velocities of one dtype of at most 32
    bits, coefficients fp32 [B].
    """
    checks.check_transition(latents, velocity, velocity_uncond, guidance_scale, cfg_grad)
    coefficients = checks.coefficients(a, b, std, latents)
    dtype = (
        velocity.dtype
        if velocity_uncond is None
        else torch.promote_types(velocity.dtype, velocity_uncond.dtype)
    )
    dtype = torch.float32 if dtype == torch.float64 else dtype
    if velocity_uncond is not None:
        velocity_uncond = (
            (velocity_uncond if cfg_grad == "both" else velocity_uncond.detach())
            .to(dtype)
            .contiguous()
        )
    return (
        latents.detach().contiguous(),
        velocity.to(dtype).contiguous(),
        velocity_uncond,
        *coefficients,
    )


# -------- a tile


@jit
def locate(num_tiles, P, TILE: tl.constexpr):
    """Of this program: the row, its tile's first element and that one's place in [B, P], all int64;
    lanes [TILE], and which are inside.
    """
    program = tl.program_id(0)
    row = (program // num_tiles).to(tl.int64)
    first = (program % num_tiles).to(tl.int64) * TILE
    lanes = tl.arange(0, TILE)
    return row, first, row * P + first, lanes, lanes < P - first


@jit
def transition_mean(
    latents,
    velocity,
    velocity_uncond,
    a,
    b,
    guidance_scale,
    offset,
    lanes,
    inside,
    GUIDED: tl.constexpr,
):
    """a x + b v of a tile, fp32, v = v_uncond + w (v_cond - v_uncond). a, b: scalars. The tile's
    place as from `locate`.
    """
    x = tl.load(latents + offset + lanes, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(velocity + offset + lanes, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        uncond = tl.load(velocity_uncond + offset + lanes, mask=inside, other=0.0).to(tl.float32)
        v = uncond + guidance_scale * (v - uncond)
    return a * x + b * v


@jit
def exact_sum(terms, std):
    """Sum of fp32 terms, each rounded to a multiple of 2^(2k - 24), k = floor(log2 std): float64,
    no order shows in its bits.
    """
    k = ((std.to(tl.int32, bitcast=True) >> 23) & 255) - 127
    magic = (((2 * k + 1051).to(tl.int64) << 52) | 0x8000000000000).to(
        tl.float64, bitcast=True
    )  # 1.5 * 2^(2k + 28)
    return tl.sum((terms.to(tl.float64) + magic) - magic)


# -------- the log-probability


@jit
def log_probs_of(
    partials, std, P, num_tiles, rows, present, NORMALIZED: tl.constexpr, COLUMNS: tl.constexpr
):
    """Log-probabilities, fp32, of these rows (int64) where present, from their tiles' sums [B, T];
    NaN where std == 0.
    """
    columns = tl.arange(0, COLUMNS)
    sums = tl.zeros(rows.shape, tl.float64)
    for start in range(0, num_tiles, COLUMNS):
        column = (start + columns)[None, :]
        mask = present[:, None] & (column < num_tiles)
        sums += tl.sum(
            tl.load(partials + rows[:, None] * num_tiles + column, mask=mask, other=0.0), axis=1
        )
    deviation = tl.load(std + rows, mask=present, other=1.0)
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
    present = rows < B
    tl.store(
        log_probs + rows,
        log_probs_of(partials, std, P, num_tiles, rows, present, NORMALIZED, COLUMNS),
        mask=present,
    )


def empty_partials(samples: Tensor) -> tuple[int, Tensor]:
    """P, and room for the tiles' sums, float64 [B, T]. Not for an empty batch."""
    batch, P = samples.shape[0], samples.numel() // samples.shape[0]
    return P, torch.empty(batch, triton.cdiv(P, TILE), dtype=torch.float64, device=samples.device)


def finishing_block(num_tiles: int) -> dict[str, int]:
    """Rows and columns of tiles' sums that a finishing program adds up at a time; a formula of T
    alone.
    """
    columns = min(triton.next_power_of_2(num_tiles), 2048)
    return {"ROWS": max(128 // columns, 1), "COLUMNS": columns}


def finish_log_probs(partials: Tensor, std: Tensor, P: int, normalized: bool) -> Tensor:
    """Log-probabilities, fp32 [B], from the tiles' sums, float64 [B, T]."""
    batch, num_tiles = partials.shape
    block = finishing_block(num_tiles)
    log_probs = torch.empty_like(std)
    grid = (triton.cdiv(batch, block["ROWS"]),)
    _log_prob_kernel[grid](
        partials, std, log_probs, P, num_tiles, batch, NORMALIZED=normalized, **block, **LAUNCH
    )
    return log_probs
