"""The Triton kernels of `qk_norm_rope`, and their launchers. The formulas are those of
qk_norm_rope.py.

Forward: one program a token, its heads x channels in registers, programs of q and k in turn, so
that a token's angles come from memory once. A thread holds pairs of neighbouring channels: the tile
is loaded whole, 16 bytes a thread, and split into the even and the odd channels without leaving the
registers.

Backward: the forward keeps rstd: without it every program would wait for a second sum, with all its
values in registers. A program walks through one part of L and keeps its share of dweight in
registers; `column_sums` adds the parts up in a fixed order. The parts depend on L alone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ..dispatch import jit, tl, triton, triton_op
from ..triton_reduce import column_sums
from .layout import aligned, strided

MAX_PARTS, MIN_TOKENS = 264, 4
"""Parts of L in a backward, for q and for k each: 528 programs, four for each of an H100's 132 SMs.
Tokens of a part: one of few tokens costs more than it brings.
"""
PIECE_VALUES = 40
"""Values of a token in one thread's registers in the forward, at most, up to 16 warps."""
VALUES, MAX_VALUES = 16, 32
"""The same in the backward: VALUES with up to 8 warps, then MAX_VALUES."""


# Kernels.


@jit
def _qk_norm_rope_fwd_kernel(
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    q_out,
    k_out,
    q_rstd,
    k_rstd,
    Lq,
    Lk,
    R,
    q_b,
    q_l,
    k_b,
    k_l,
    angle_l,
    angle_i,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    ACROSS: tl.constexpr,
    HEADS: tl.constexpr,
    TAIL: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    program = tl.program_id(0)
    sample, place = (program // (Lq + Lk)).to(tl.int64), program % (Lq + Lk)
    # q and k in turn as far as both go, then the rest of the longer one.
    both = tl.minimum(Lq, Lk)
    paired = place < 2 * both
    token = tl.where(paired, place // 2, place - both).to(tl.int64)
    if tl.where(paired, place % 2 == 0, Lq > Lk):
        row = sample * Lq + token
        x, weight, out, rstds = q + sample * q_b + token * q_l, q_weight, q_out, q_rstd
    else:
        row = sample * Lk + token
        x, weight, out, rstds = k + sample * k_b + token * k_l, k_weight, k_out, k_rstd

    out += row * (H * D)
    angles = None
    if cos is not None:
        angles = _angles(cos, sin, token, R, angle_l, angle_i, D, CHANNELS)
    head = _piece(x, 0, H, D, HEADS, CHANNELS)
    if TAIL:
        tail = _piece(x, HEADS, H, D, TAIL, CHANNELS)
    if ACROSS:
        squares = head * head
        if TAIL:  # what a thread has of both pieces, then all threads
            shape: tl.constexpr = (HEADS // TAIL, TAIL, CHANNELS)
            squares = tl.sum(tl.reshape(squares, shape), axis=0) + tail * tail
        rstd = tl.rsqrt(tl.sum(squares) / (H * D) + eps)
        tl.store(rstds + row, rstd)
        _finish(head, rstd, weight, angles, out, 0, H, D, ACROSS, HEADS, CHANNELS)
        if TAIL:
            _finish(tail, rstd, weight, angles, out, HEADS, H, D, ACROSS, TAIL, CHANNELS)
    else:
        rstds += row * H
        rstd = _rstd_per_head(head, rstds, 0, H, D, eps, HEADS)
        _finish(head, rstd, weight, angles, out, 0, H, D, ACROSS, HEADS, CHANNELS)
        if TAIL:
            rstd = _rstd_per_head(tail, rstds, HEADS, H, D, eps, TAIL)
            _finish(tail, rstd, weight, angles, out, HEADS, H, D, ACROSS, TAIL, CHANNELS)


@jit
def _piece(
    x,
    FIRST: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """HEADS heads of a token from head FIRST on, fp32 [HEADS, CHANNELS]."""
    offsets, mask = _tile(FIRST, H, D, HEADS, CHANNELS)
    return tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)


@jit
def _rstd_per_head(
    piece, rstds, FIRST: tl.constexpr, H: tl.constexpr, D: tl.constexpr, eps, HEADS: tl.constexpr
):
    """1 / root mean square of each head of a piece, [HEADS, 1], and stored."""
    rstd = tl.rsqrt(tl.sum(piece * piece, axis=1) / D + eps)
    heads = FIRST + tl.arange(0, HEADS)
    tl.store(rstds + heads, rstd, mask=heads < H)
    return rstd[:, None]


@jit
def _finish(
    piece,
    rstd,
    weight,
    angles,
    out,
    FIRST: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    ACROSS: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Scale, weigh and turn a piece, and write it."""
    offsets, mask = _tile(FIRST, H, D, HEADS, CHANNELS)
    weight_even, weight_odd = _weight(weight, offsets, mask, ACROSS, HEADS, CHANNELS)
    even, odd = _split(piece, HEADS, CHANNELS)
    even, odd = even * rstd * weight_even, odd * rstd * weight_odd
    if angles is not None:
        c, s = angles
        even, odd = even * c - odd * s, even * s + odd * c
    tl.store(out + offsets, _join(even, odd, HEADS, CHANNELS), mask=mask)


@jit
def _qk_norm_rope_bwd_kernel(
    dq_out,
    dk_out,
    q,
    k,
    q_weight,
    k_weight,
    cos,
    sin,
    q_rstd,
    k_rstd,
    dq,
    dk,
    partials,
    Lq,
    Lk,
    R,
    num_parts,
    part_tokens,
    dq_b,
    dq_l,
    dk_b,
    dk_l,
    q_b,
    q_l,
    k_b,
    k_l,
    angle_l,
    angle_i,
    H: tl.constexpr,
    D: tl.constexpr,
    ACROSS: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr,
):
    program = tl.program_id(0)
    part = (program // 2).to(tl.int64)  # of q where the program is even, of k where it is odd
    sample, first = part // num_parts, part % num_parts * part_tokens
    WIDTH: tl.constexpr = H * D if ACROSS else D
    partial = partials + part * WIDTH
    if program % 2 == 0:
        first_row, last = sample * Lq, tl.minimum(first + part_tokens, Lq)
        dout, x = dq_out + sample * dq_b, q + sample * q_b
        dout_l, x_l = dq_l.to(tl.int64), q_l.to(tl.int64)
        weight, rstds, dx = q_weight, q_rstd, dq
    else:
        first_row, last = sample * Lk, tl.minimum(first + part_tokens, Lk)
        dout, x = dk_out + sample * dk_b, k + sample * k_b
        dout_l, x_l = dk_l.to(tl.int64), k_l.to(tl.int64)
        weight, rstds, dx = k_weight, k_rstd, dk
        partial += tl.num_programs(0) // 2 * WIDTH

    heads = tl.arange(0, HEADS)
    offsets, mask = _tile(0, H, D, HEADS, CHANNELS)
    dweight_even = tl.zeros((HEADS, CHANNELS // 2), tl.float32)
    dweight_odd = tl.zeros((HEADS, CHANNELS // 2), tl.float32)
    for token in range(first, last):
        row = first_row + token
        if ACROSS:
            rstd = tl.load(rstds + row)
        else:
            rstd = tl.load(rstds + row * H + heads, mask=heads < H, other=0.0)[:, None]
        dout_tile = tl.load(dout + token * dout_l + offsets, mask=mask, other=0.0).to(tl.float32)
        x_tile = tl.load(x + token * x_l + offsets, mask=mask, other=0.0).to(tl.float32)
        even, odd = _split(dout_tile, HEADS, CHANNELS)
        x_even, x_odd = _split(x_tile, HEADS, CHANNELS)
        if cos is not None:
            c, s = _angles(cos, sin, token, R, angle_l, angle_i, D, CHANNELS)
            even, odd = even * c + odd * s, odd * c - even * s
        x_even, x_odd = x_even * rstd, x_odd * rstd
        if NEEDS_WEIGHTS:
            dweight_even += even * x_even
            dweight_odd += odd * x_odd
        # Read again for each token, from the cache: held through the loop it costs a program per SM
        # its registers.
        weight_even, weight_odd = _weight(weight, offsets, mask, ACROSS, HEADS, CHANNELS)
        even, odd = even * weight_even, odd * weight_odd
        dot = even * x_even + odd * x_odd
        mean_dot = tl.sum(dot) / (H * D) if ACROSS else (tl.sum(dot, axis=1) / D)[:, None]
        dx_even, dx_odd = rstd * (even - x_even * mean_dot), rstd * (odd - x_odd * mean_dot)
        tl.store(dx + row * (H * D) + offsets, _join(dx_even, dx_odd, HEADS, CHANNELS), mask=mask)
    if NEEDS_WEIGHTS:
        dweight = _join(dweight_even, dweight_odd, HEADS, CHANNELS)
        if ACROSS:
            tl.store(partial + offsets, dweight, mask=mask)
        else:
            channels = tl.arange(0, CHANNELS)
            tl.store(partial + channels, tl.sum(dweight, axis=0), mask=channels < D)


@jit
def _tile(
    FIRST: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Offsets of a token's values from head FIRST on, [HEADS, CHANNELS], and the mask of those that
    exist.
    """
    heads, channels = FIRST + tl.arange(0, HEADS)[:, None], tl.arange(0, CHANNELS)[None, :]
    return heads * D + channels, (heads < H) & (channels < D)


@jit
def _split(tile, HEADS: tl.constexpr, CHANNELS: tl.constexpr):
    """Even and odd channels of a tile."""
    return tl.split(tl.reshape(tile, (HEADS, CHANNELS // 2, 2)))


@jit
def _join(even, odd, HEADS: tl.constexpr, CHANNELS: tl.constexpr):
    """The inverse of `_split`."""
    return tl.reshape(tl.join(even, odd), (HEADS, CHANNELS))


@jit
def _weight(
    weight, offsets, mask, ACROSS: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr
):
    """The weights of the even and of the odd channels. One [D] is read once per head, in the tile's
    own layout.
    """
    if not ACROSS:
        offsets = tl.broadcast_to(tl.arange(0, CHANNELS)[None, :], (HEADS, CHANNELS))
    tile = tl.load(weight + offsets, mask=mask, other=0.0, eviction_policy="evict_last")
    return _split(tile.to(tl.float32), HEADS, CHANNELS)


@jit
def _angles(cos, sin, token, R, angle_l, angle_i, D: tl.constexpr, CHANNELS: tl.constexpr):
    """cos and sin of a token's pairs, [1, CHANNELS / 2]; 1 and 0, which change nothing, from token
    R on.
    """
    pairs = tl.arange(0, CHANNELS // 2)
    turned = (pairs < D // 2) & (token < R)
    offsets = token * angle_l + pairs * angle_i
    c = tl.load(cos + offsets, mask=turned, other=1.0, eviction_policy="evict_last")
    s = tl.load(sin + offsets, mask=turned, other=0.0, eviction_policy="evict_last")
    return c[None, :], s[None, :]


# Launchers.


def _token_constants(q: Tensor, weight: Tensor) -> dict[str, Any]:
    """Constants of both kernels: a formula of H and D alone."""
    H, D = q.shape[2:]
    HEADS, CHANNELS = triton.next_power_of_2(H), triton.next_power_of_2(D)
    per_lane = HEADS * CHANNELS // 32
    num_warps = min(max(min(per_lane // VALUES, 8), per_lane // MAX_VALUES, 1), 32)
    constants = {"H": H, "D": D, "ACROSS": weight.shape[0] == H * D}
    return {**constants, "HEADS": HEADS, "CHANNELS": CHANNELS, "num_warps": num_warps}


def _piece_constants(q: Tensor, weight: Tensor) -> dict[str, Any]:
    """Constants of the forward kernel. A token's heads are two pieces of powers of two, 12 = 8 + 4,
    24 = 16 + 8, 40 = 32 + 8: in one of 16, 32 or 64 a quarter or more of the lanes would be idle.
    """
    constants = _token_constants(q, weight)
    H, CHANNELS = constants["H"], constants["CHANNELS"]
    head = 1 << H.bit_length() - 1
    tail = triton.next_power_of_2(H - head) if head < H else 0
    num_warps = min(triton.next_power_of_2(triton.cdiv(H * CHANNELS, 32 * PIECE_VALUES)), 16)
    return {**constants, "HEADS": head, "TAIL": tail, "num_warps": num_warps}


def _max_registers(q: Tensor, constants: dict[str, Any]) -> int:
    """Registers that a thread of the backward kernel may use.

    With 16-bit q and k the least that costs no spill, so that two or more programs fit an SM and
    one loads while another waits for its sum; fp32 needs more, and has twice the bytes under way.
    """
    threads = 32 * constants["num_warps"]
    values = constants["HEADS"] * constants["CHANNELS"] // threads
    wanted = 255 if q.element_size() > 2 or values > MAX_VALUES else 96 if values <= VALUES else 128
    return min(wanted, 65536 // threads)


def _strides(*tensors: Tensor) -> tuple[list[Tensor], list[int]]:
    """Tensors [B, L, H, D] as the kernels may read them; their strides of samples and tokens."""
    laid = [strided(x.flatten(2)) for x in tensors]
    return [x for x, _, _ in laid if x is not None], [step for _, *steps in laid for step in steps]


def _angle_sizes(cos: Tensor | None) -> tuple[int, ...]:
    """R, and the strides of both tables."""
    return (0, 0, 0) if cos is None else (cos.shape[0], *cos.stride())


def empty_outputs(q: Tensor, k: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q', k', and fp32 [B, L, 1 or H] for each: 1 / root mean square; not yet written."""
    groups = q.shape[2] * q.shape[3] // weight.shape[0]
    q_rstd, k_rstd = (x.new_empty((*x.shape[:2], groups), dtype=torch.float32) for x in (q, k))
    return q.new_empty(q.shape), k.new_empty(k.shape), q_rstd, k_rstd


@triton_op("qk_norm_rope")
def forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q', k', contiguous, and 1 / root mean square of each row of q and of k. Both weights have one
    dtype; cos and sin are fp32 and have the same strides.
    """
    outputs, programs = empty_outputs(q, k, q_weight), q.shape[0] * (q.shape[1] + k.shape[1])
    if programs:
        operands, strides = _strides(q, k)
        weights = aligned(q_weight), aligned(k_weight)
        sizes = (q.shape[1], k.shape[1], *_angle_sizes(cos)[:1], *strides, *_angle_sizes(cos)[1:])
        with torch.cuda.device_of(q):
            _qk_norm_rope_fwd_kernel[(programs,)](
                *(*operands, *weights, cos, sin, *outputs, *sizes, eps),
                **_piece_constants(q, q_weight),
            )
    return outputs


@triton_op("qk_norm_rope_backward")
def backward(
    gradients: list[Tensor], saved: list[Tensor | None], needs_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and their weights; the last two are empty, [0], unless needs_weights.

    Args:
        gradients: those of q' and k'.
        saved: q, k, q_weight, k_weight, cos, sin and 1 / root mean square of q and of k.
    """
    q, k, q_weight, k_weight, cos, sin, *rstds = cast("list[Any]", saved)
    dq, dk, longest = q.new_empty(q.shape), k.new_empty(k.shape), max(q.shape[1], k.shape[1])
    part_tokens = max(MIN_TOKENS, triton.cdiv(longest, MAX_PARTS)) if needs_weights else 1
    num_parts, width = triton.cdiv(longest, part_tokens), q_weight.shape[0] if needs_weights else 0
    partials = q.new_empty((2, q.shape[0] * num_parts, width), dtype=torch.float32)
    if partials.shape[1]:
        operands, strides = _strides(*gradients, q, k)
        weights, constants = (aligned(q_weight), aligned(k_weight)), _token_constants(q, q_weight)
        R, *angle_strides = _angle_sizes(cos)
        tensors = (*operands, *weights, cos, sin, *rstds, dq, dk, partials)
        sizes = (q.shape[1], k.shape[1], R, num_parts, part_tokens, *strides, *angle_strides)
        with torch.cuda.device_of(q):
            _qk_norm_rope_bwd_kernel[(2 * partials.shape[1],)](
                *(*tensors, *sizes),
                **constants,
                NEEDS_WEIGHTS=needs_weights,
                maxnreg=_max_registers(q, constants),
            )
    dq_weight, dk_weight = column_sums(partials[:, None], q_weight.dtype)
    return dq, dk, dq_weight[0], dk_weight[0]
