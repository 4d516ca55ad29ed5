"""RMSNorm of queries and keys, then the rotary embedding, both in one launch, forward and backward.

    y = x rstd weight      rstd = 1 / sqrt(mean(x^2) + eps)
    out[2i] = y[2i] cos_i - y[2i+1] sin_i      out[2i+1] = y[2i] sin_i + y[2i+1] cos_i

The mean is over all of a token's channels, or over one head's. The first R tokens are turned; for
the rest out = y.

Shapes: x is q [B, Lq, H, D] or k [B, Lk, H, D]; weight [H D] (across the heads: Wan) or [D] (per
head: HunyuanVideo); cos, sin [R, D/2].

Backward, with dy = the gradient turned back by the angle, xhat = x rstd and g = dy weight:
    dx      = rstd (g - xhat mean(g xhat))
    dweight = sum over B and L (and H, if per head) of dy xhat
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import call, register, select_backend
from . import reference
from .triton_qk_norm_rope import empty_outputs


def _fake(q: Tensor, k: Tensor, q_weight: Tensor, *_: Any) -> Any:
    return empty_outputs(q, k, q_weight)


def _backward_fake(gradients: Any, saved: Any, needs_weights: bool) -> tuple[Tensor, ...]:
    shapes = [x.shape if i < 2 or needs_weights else (0,) for i, x in enumerate(saved[:4])]
    return tuple(x.new_empty(shape) for x, shape in zip(saved, shapes, strict=False))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(
    backend: str, ctx: Any, dq_out: Tensor | None, dk_out: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under checkpointing each reading is a recomputation
    gradients = [
        torch.zeros_like(x) if d is None else d
        for x, d in zip(saved, (dq_out, dk_out), strict=False)
    ]
    needs_weights = any(ctx.needs_input_grad[2:4])
    dq, dk, *weights = call(backend, "qk_norm_rope_backward", gradients, list(saved), needs_weights)
    return dq, dk, *(weights if needs_weights else (None, None)), None, None, None


register("qk_norm_rope", _fake, _backward, _save)
register("qk_norm_rope_backward", _backward_fake)


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

    Differentiable in q, k and both weights; each gradient has its input's dtype, sums over tokens
    are fp32 and in a fixed order. A sample's q', k' and gradients with respect to q and k do not
    depend on the rest of the batch, bit for bit.

    In diffusers 0.42: `norm_q`, `norm_k` and `apply_rotary_emb` in WanAttnProcessor.__call__
    (self-attention; cross-attention has no rotation), and steps 2 to 4 of
    HunyuanVideoAttnProcessor2_0.__call__ (dual-stream blocks: video with, text without rotation, by
    `norm_added_q` and `norm_added_k`; single-stream blocks, where the text follows the video: R is
    the video's length).

    Args:
        q, k: [B, Lq, H, D] and [B, Lk, H, D], one float dtype, D even; views of a fused projection
            are read where they lie.
        q_weight, k_weight: both [H * D] (the mean square is over all of a token's channels) or both
            [D] (over each head's), any float dtype.
        cos, sin: [R, D/2], one angle per pair, any strides, R <= Lq and Lk: the first R tokens are
            turned, the rest only normalised; both None: no rotation. diffusers' tables hold each
            value twice: take cos[:, 0::2], sin[:, 1::2] (Wan: freqs_cos[0, :, 0, 0::2],
            freqs_sin[0, :, 0, 1::2]); contiguous copies, made once, halve what is read.
        eps: added to the mean square.
        backend: a forced backend, see `dispatch.py`.

    Returns:
        q' and k', contiguous, in the dtype of q, rounded once from fp32 (float64 for float64).
    """
    selected = select_backend("qk_norm_rope", q, backend)
    if selected == "reference":
        return reference.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps=eps)
    checks.check_qk(q, k, q_weight, k_weight)
    checks.check_rotation(cos, sin, q, k)
    if q_weight.dtype != k_weight.dtype or q_weight.dtype == torch.float64:
        q_weight, k_weight = q_weight.float(), k_weight.float()
    if cos is not None and sin is not None:
        cos, sin = cos.detach().float(), sin.detach().float()
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
    arguments = q, k, q_weight, k_weight, cos, sin, eps
    q_out, k_out, _, _ = call(selected, "qk_norm_rope", *arguments)
    return q_out, k_out
