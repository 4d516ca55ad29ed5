"""RMSNorm of queries and keys, then the rotary embedding, both in one launch, forward and backward.

    y = x rstd weight,  rstd = 1 / sqrt(mean(x^2) + eps)         the mean over all of a token's channels, or over one head's
    out[2i] = y[2i] cos_i - y[2i+1] sin_i        out[2i+1] = y[2i] sin_i + y[2i+1] cos_i        for R tokens; out = y for the rest

Shapes: x is q [B, Lq, H, D] or k [B, Lk, H, D]; weight [H D] (across the heads: Wan) or [D] (per
head: HunyuanVideo); cos, sin [R, D/2]. Forward: one program a token, its heads x channels in
registers, programs of q and k in turn, so that a token's angles come from memory once. A thread
holds pairs of neighbouring channels: the tile is loaded whole, 16 bytes a thread, and split into
the even and the odd channels without leaving the registers.

Backward, with dy = the gradient turned back by the angle, xhat = x rstd and g = dy weight:
    dx = rstd (g - xhat mean(g xhat))        dweight = sum over B and L (and H, if per head) of
    dy xhat
The forward keeps rstd: without it every program would wait for a second sum, with all its values
in registers. A program walks through one part of L and keeps its share of dweight in registers;
`column_sum` adds the parts up in a fixed order. The parts depend on L alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import jit, select_backend, tl, triton, triton_op
from ..triton_reduce import column_sum
from . import reference
from .ln_modulate import aligned

# Parts of L in a backward, for q and for k each: 528 programs, four for each of an H100's 132 SMs.
# A part of few tokens costs more than it brings.
MAX_PARTS, MIN_TOKENS = 264, 4
VALUES, MAX_VALUES = (
    16,
    32,
)  # of a token in one thread's registers: VALUES with up to 8 warps, then MAX_VALUES


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
        _norm_rope(
            q + sample * q_b + token * q_l,
            q_weight,
            cos,
            sin,
            q_out + row * (H * D),
            q_rstd,
            row,
            token,
            R,
            angle_l,
            angle_i,
            eps,
            H,
            D,
            ACROSS,
            HEADS,
            CHANNELS,
        )
    else:
        row = sample * Lk + token
        _norm_rope(
            k + sample * k_b + token * k_l,
            k_weight,
            cos,
            sin,
            k_out + row * (H * D),
            k_rstd,
            row,
            token,
            R,
            angle_l,
            angle_i,
            eps,
            H,
            D,
            ACROSS,
            HEADS,
            CHANNELS,
        )


@jit
def _norm_rope(
    x,
    weight,
    cos,
    sin,
    out,
    rstds,
    row,
    token,
    R,
    angle_l,
    angle_i,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    ACROSS: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One token: x and out point at it, rstds at the first token of the first sample."""
    heads = tl.arange(0, HEADS)
    lanes, inside = _tile(H, D, HEADS, CHANNELS)
    x_tile = tl.load(x + lanes, mask=inside, other=0.0).to(tl.float32)
    weight_even, weight_odd = _weight(weight, lanes, inside, D, ACROSS, HEADS, CHANNELS)
    if ACROSS:
        rstd = tl.rsqrt(tl.sum(x_tile * x_tile) / (H * D) + eps)
        scale = rstd
    else:
        rstd = tl.rsqrt(tl.sum(x_tile * x_tile, axis=1) / D + eps)
        scale = rstd[:, None]
    even, odd = _split(x_tile, HEADS, CHANNELS)
    even, odd = even * scale * weight_even, odd * scale * weight_odd
    if cos is not None:
        c, s = _angles(cos, sin, token, R, angle_l, angle_i, D, CHANNELS)
        even, odd = even * c - odd * s, even * s + odd * c
    tl.store(out + lanes, _join(even, odd, HEADS, CHANNELS), mask=inside)
    if ACROSS:
        tl.store(rstds + row, rstd)
    else:
        tl.store(rstds + row * H + heads, rstd, mask=heads < H)


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
    sample, first = (
        (program // 2 // num_parts).to(tl.int64),
        (program // 2 % num_parts).to(tl.int64) * part_tokens,
    )
    part = (program // 2).to(tl.int64)
    WIDTH: tl.constexpr = H * D if ACROSS else D
    if program % 2 == 0:
        _norm_rope_grad(
            dq_out + sample * dq_b,
            q + sample * q_b,
            q_weight,
            cos,
            sin,
            q_rstd,
            dq,
            partials + part * WIDTH,
            sample * Lq,
            first,
            tl.minimum(first + part_tokens, Lq),
            R,
            dq_l,
            q_l,
            angle_l,
            angle_i,
            H,
            D,
            ACROSS,
            HEADS,
            CHANNELS,
            NEEDS_WEIGHTS,
        )
    else:
        _norm_rope_grad(
            dk_out + sample * dk_b,
            k + sample * k_b,
            k_weight,
            cos,
            sin,
            k_rstd,
            dk,
            partials + (tl.num_programs(0) // 2 + part) * WIDTH,
            sample * Lk,
            first,
            tl.minimum(first + part_tokens, Lk),
            R,
            dk_l,
            k_l,
            angle_l,
            angle_i,
            H,
            D,
            ACROSS,
            HEADS,
            CHANNELS,
            NEEDS_WEIGHTS,
        )


@jit
def _norm_rope_grad(
    dout,
    x,
    weight,
    cos,
    sin,
    rstds,
    dx,
    partial,
    first_row,
    first,
    last,
    R,
    dout_l,
    x_l,
    angle_l,
    angle_i,
    H: tl.constexpr,
    D: tl.constexpr,
    ACROSS: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr,
):
    """Tokens first to last of a sample: dout and x point at it, rstds and dx at the first sample;
    first_row is its first row there.
    """
    heads = tl.arange(0, HEADS)
    lanes, inside = _tile(H, D, HEADS, CHANNELS)
    dweight_even = tl.zeros((HEADS, CHANNELS // 2), tl.float32)
    dweight_odd = tl.zeros((HEADS, CHANNELS // 2), tl.float32)
    for token in range(first, last):
        row = first_row + token
        rstd = (
            tl.load(rstds + row)
            if ACROSS
            else tl.load(rstds + row * H + heads, mask=heads < H, other=0.0)[:, None]
        )
        even, odd = _split(
            tl.load(dout + token * dout_l + lanes, mask=inside, other=0.0).to(tl.float32),
            HEADS,
            CHANNELS,
        )
        x_even, x_odd = _split(
            tl.load(x + token * x_l + lanes, mask=inside, other=0.0).to(tl.float32), HEADS, CHANNELS
        )
        if cos is not None:
            c, s = _angles(cos, sin, token, R, angle_l, angle_i, D, CHANNELS)
            even, odd = even * c + odd * s, odd * c - even * s
        x_even, x_odd = x_even * rstd, x_odd * rstd
        if NEEDS_WEIGHTS:
            dweight_even += even * x_even
            dweight_odd += odd * x_odd
        # Read anew for each token, from the cache: held through the loop it costs a program per SM
        # its registers.
        weight_even, weight_odd = _weight(weight, lanes, inside, D, ACROSS, HEADS, CHANNELS)
        even, odd = even * weight_even, odd * weight_odd
        dot = even * x_even + odd * x_odd
        mean_dot = tl.sum(dot) / (H * D) if ACROSS else (tl.sum(dot, axis=1) / D)[:, None]
        dx_even, dx_odd = rstd * (even - x_even * mean_dot), rstd * (odd - x_odd * mean_dot)
        tl.store(dx + row * (H * D) + lanes, _join(dx_even, dx_odd, HEADS, CHANNELS), mask=inside)
    if NEEDS_WEIGHTS:
        dweight = _join(dweight_even, dweight_odd, HEADS, CHANNELS)
        if ACROSS:
            tl.store(partial + lanes, dweight, mask=inside)
        else:
            channels = tl.arange(0, CHANNELS)
            tl.store(partial + channels, tl.sum(dweight, axis=0), mask=channels < D)


@jit
def _tile(H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr):
    """Where each value of a token lies, [HEADS, CHANNELS], and whether it exists."""
    heads, channels = tl.arange(0, HEADS)[:, None], tl.arange(0, CHANNELS)[None, :]
    return heads * D + channels, (heads < H) & (channels < D)


@jit
def _split(tile, HEADS: tl.constexpr, CHANNELS: tl.constexpr):
    """Even and odd channels of a tile."""
    return tl.split(tl.reshape(tile, (HEADS, CHANNELS // 2, 2)))


@jit
def _join(even, odd, HEADS: tl.constexpr, CHANNELS: tl.constexpr):
    return tl.reshape(tl.join(even, odd), (HEADS, CHANNELS))


@jit
def _weight(
    weight,
    lanes,
    inside,
    D: tl.constexpr,
    ACROSS: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The weights of the even and of the odd channels. One [D] is read once a head, in the tile's
    own layout.
    """
    if not ACROSS:
        lanes = tl.broadcast_to(tl.arange(0, CHANNELS)[None, :], (HEADS, CHANNELS))
    return _split(
        tl.load(weight + lanes, mask=inside, other=0.0, eviction_policy="evict_last").to(
            tl.float32
        ),
        HEADS,
        CHANNELS,
    )


@jit
def _angles(cos, sin, token, R, angle_l, angle_i, D: tl.constexpr, CHANNELS: tl.constexpr):
    """cos and sin of a token's pairs, [1, CHANNELS / 2]; 1 and 0, which change nothing, from token
    R on.
    """
    pairs = tl.arange(0, CHANNELS // 2)
    turned = (pairs < D // 2) & (token < R)
    place = token * angle_l + pairs * angle_i
    c = tl.load(cos + place, mask=turned, other=1.0, eviction_policy="evict_last")
    s = tl.load(sin + place, mask=turned, other=0.0, eviction_policy="evict_last")
    return c[None, :], s[None, :]


# -------- launchers


def token_shape(q: Tensor, weight: Tensor) -> dict[str, Any]:
    """Constants of both kernels: a formula of H and D alone."""
    H, D = q.shape[2:]
    HEADS, CHANNELS = triton.next_power_of_2(H), triton.next_power_of_2(D)
    per_lane = HEADS * CHANNELS // 32
    num_warps = min(max(min(per_lane // VALUES, 8), per_lane // MAX_VALUES, 1), 32)
    return {
        "H": H,
        "D": D,
        "ACROSS": weight.shape[0] == H * D,
        "HEADS": HEADS,
        "CHANNELS": CHANNELS,
        "num_warps": num_warps,
    }


def max_registers(q: Tensor, shape: dict[str, Any]) -> int:
    """What a thread of the backward kernel may use: with 16-bit q and k the least that costs no
    spill, so that two or more programs fit an SM and one loads while another waits for its sum;
    fp32 needs more, and has twice the bytes under way.
    """
    values = shape["HEADS"] * shape["CHANNELS"] // (32 * shape["num_warps"])
    wanted = 255 if q.element_size() > 2 or values > MAX_VALUES else 96 if values <= VALUES else 128
    return min(wanted, 65536 // (32 * shape["num_warps"]))


def _strided(x: Tensor) -> tuple[Tensor, int, int]:
    """q, k or a gradient, and the strides of its samples and tokens: as it lies if a token's values
    lie together and strides and address are multiples of 16, else a copy. The compiled code, and
    so the order of sums, depends on that, and must not on a sample's place.
    """
    B, L, H, D = x.shape
    steps = [step if size > 1 else 0 for size, step in zip((B, L), x.stride()[:2], strict=True)]
    together = x.stride(3) == 1 and (H == 1 or x.stride(2) == D)
    if (
        together
        and H * D % 16 == 0
        and not any(step % 16 for step in steps)
        and x.data_ptr() % 16 == 0
    ):
        return x, steps[0], steps[1]
    return aligned(x), L * H * D, H * D


def _rstd(x: Tensor, weight: Tensor) -> Tensor:
    """What the forward keeps of q or k, not yet written: fp32 [B, L, 1], or [B, L, H] if each head
    has its own.
    """
    return torch.empty(
        (*x.shape[:2], x.shape[2] * x.shape[3] // weight.shape[0]),
        dtype=torch.float32,
        device=x.device,
    )


@triton_op("qk_norm_rope")
def _qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q', k', contiguous, and 1 / root mean square of each row of q and of k. cos and sin are fp32
    and have the same strides.
    """
    q_out, k_out, q_rstd, k_rstd = (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        _rstd(q, q_weight),
        _rstd(k, k_weight),
    )
    tokens = q.shape[0] * (q.shape[1] + k.shape[1])
    if tokens:
        (q, *q_steps), (k, *k_steps) = _strided(q), _strided(k)
        R, angle_steps = (0, (0, 0)) if cos is None else (cos.shape[0], cos.stride())
        with torch.cuda.device_of(q):
            _qk_norm_rope_fwd_kernel[(tokens,)](
                q,
                k,
                aligned(q_weight),
                aligned(k_weight),
                cos,
                sin,
                q_out,
                k_out,
                q_rstd,
                k_rstd,
                q.shape[1],
                k.shape[1],
                R,
                *q_steps,
                *k_steps,
                *angle_steps,
                eps,
                **token_shape(q, q_weight),
            )
    return q_out, k_out, q_rstd, k_rstd


@_qk_norm_rope.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), _rstd(q, q_weight), _rstd(k, k_weight)


@triton_op("qk_norm_rope_backward")
def _qk_norm_rope_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and their weights; the last two are empty, [0], unless needs_weights."""
    dq, dk, longest = q.new_empty(q.shape), k.new_empty(k.shape), max(q.shape[1], k.shape[1])
    part_tokens = max(MIN_TOKENS, triton.cdiv(longest, MAX_PARTS)) if needs_weights else 1
    num_parts, width = triton.cdiv(longest, part_tokens), q_weight.shape[0] if needs_weights else 0
    partials = torch.empty((2, q.shape[0] * num_parts, width), dtype=torch.float32, device=q.device)
    if partials.shape[1]:
        (q, *q_steps), (k, *k_steps) = _strided(q), _strided(k)
        (dq_out, *dq_steps), (dk_out, *dk_steps) = _strided(dq_out), _strided(dk_out)
        R, angle_steps = (0, (0, 0)) if cos is None else (cos.shape[0], cos.stride())
        shape = token_shape(q, q_weight)
        with torch.cuda.device_of(q):
            _qk_norm_rope_bwd_kernel[(2 * partials.shape[1],)](
                dq_out,
                dk_out,
                q,
                k,
                aligned(q_weight),
                aligned(k_weight),
                cos,
                sin,
                q_rstd,
                k_rstd,
                dq,
                dk,
                partials,
                q.shape[1],
                k.shape[1],
                R,
                num_parts,
                part_tokens,
                *dq_steps,
                *dk_steps,
                *q_steps,
                *k_steps,
                *angle_steps,
                **shape,
                NEEDS_WEIGHTS=needs_weights,
                maxnreg=max_registers(q, shape),
            )
    return (
        dq,
        dk,
        column_sum(partials[:1], q_weight.dtype)[0],
        column_sum(partials[1:], k_weight.dtype)[0],
    )


@_qk_norm_rope_backward.register_fake
def _(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = q_weight.shape[0] if needs_weights else 0
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        q_weight.new_empty(width),
        k_weight.new_empty(width),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dq_out: Tensor | None, dk_out: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    q, k, *saved = ctx.saved_tensors  # once: under checkpointing each reading is a recomputation
    dq_out = q.new_zeros(q.shape) if dq_out is None else dq_out
    dk_out = k.new_zeros(k.shape) if dk_out is None else dk_out
    needs_weights = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    gradients = _qk_norm_rope_backward(dq_out, dk_out, q, k, *saved, needs_weights)
    return (*(gradients if needs_weights else (*gradients[:2], None, None)), None, None, None)


_qk_norm_rope.register_autograd(_backward, setup_context=_save)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of queries and keys with weights, then the rotary embedding of neighbouring pairs of
    channels: what precedes attention.

    q, k: [B, Lq, H, D] and [B, Lk, H, D], one float dtype, D even; views of a fused projection
    are read where they lie. q_weight, k_weight: both [H * D] (the mean square is over all of a
    token's channels) or both [D] (over each head's), any float dtype. cos, sin: [R, D/2], one
    angle a pair, any strides, R <= Lq and Lk: the first R tokens are turned, the rest only
    normalised; both None: no rotation. diffusers' tables hold each value twice: take cos[:,
    0::2], sin[:, 1::2] (Wan: freqs_cos[0, :, 0, 0::2], freqs_sin[0, :, 0, 1::2]); contiguous
    copies, made once, are half the reading. eps: added to the mean square. backend: a
    forced backend, see `dispatch.py`. Returns q', k', contiguous, in the dtype of q, rounded once
    from fp32 (float64 for float64). Differentiable in q, k and both weights; each gradient has
    its input's dtype, sums over tokens are fp32 and in a fixed order. A sample's q', k' and
    gradients with respect to q and k do not depend on the rest of the batch, bit for bit.
    ValueError: a shape, dtype or device that does not fit, or a backend that cannot serve.

    In diffusers 0.42: `norm_q`, `norm_k` and `apply_rotary_emb` in WanAttnProcessor.__call__
    (self-attention; cross-attention has no rotation), and steps 2 to 4 of
    HunyuanVideoAttnProcessor2_0.__call__ (dual-stream blocks: video with, text without rotation,
    by `norm_added_q` and `norm_added_k`; single-stream blocks, where the text follows the video:
    R is the video's length).
    """
    if select_backend("qk_norm_rope", q, backend) == "reference":
        return reference.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps=eps)
    checks.check_qk(q, k, q_weight, k_weight)
    checks.check_rotation(cos, sin, q, k)
    if cos is not None and sin is not None:
        cos, sin = cos.detach().float(), sin.detach().float()
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
    q_out, k_out, _, _ = _qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)
    return q_out, k_out
