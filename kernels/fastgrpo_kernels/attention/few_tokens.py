"""Attention over few tokens, forward and backward: one head of one sample at a time, which fits
into a CPU's first-level cache. A library's kernel takes longer to begin than to compute there.

    P = softmax(q k^T / sqrt(D))      out = P v

Shapes: q [B, Lq, H, D], k and v [B, Lk, H, D]; P [B, H, Lq, Lk] is never stored.

Backward, which computes P again from q and k:
    dP = dout v^T      dS = P (dP - sum over keys of P dP) / sqrt(D)
    dq = dS k          dk = dS^T q          dv = P^T dout

There are loops for a CPU only (csrc/attention_cpu.h). Their time grows as Lq Lk, as everyone's, but
beyond some tens of tokens without a cache's blocks: it is the caller who knows the lengths.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dispatch import call, register, select_backend
from . import reference


def _fake(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def _backward_fake(dout: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(backend: str, ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = call(
        backend, "few_token_attention_backward", dout, *ctx.saved_tensors
    )
    return gradients


register("few_token_attention", _fake, _backward, _save)
register("few_token_attention_backward", _backward_fake)


def few_token_attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of each head, without a mask.

    Differentiable in all three; each gradient has its input's dtype. With `cpp` a sample's bits
    depend on nothing else in the batch, nor on threads; with and without gradients they are the
    same.

    Args:
        q: Queries [B, Lq, H, D], any float dtype.
        k, v: Keys and values [B, Lk, H, D], of q's dtype. All three are read where they lie if the
            channels of a token's heads are neighbours.
        backend: a forced backend, see `dispatch.py`: `cpp` or `reference`.

    Returns:
        [B, Lq, H, D], contiguous, in q's dtype, rounded once from fp32 (float64 for float64).
    """
    selected = select_backend("few_token_attention", q, backend)
    if selected == "reference":
        return reference.few_token_attention(q, k, v)
    reference.check_arguments(q, k, v)
    out: Tensor = call(selected, "few_token_attention", q, k, v)
    return out
