"""Attention in plain PyTorch: the specification that the compiled loops must meet, and what serves
float64 and every device but the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from ..checks import compute_dtype


def check_arguments(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Queries [B, Lq, H, D], keys and values [B, Lk, H, D], of one float dtype on one device."""
    for name, x in (("q", q), ("k", k)):
        if not checks.is_float(x) or x.dim() != 4 or 0 in x.shape[2:]:
            checks.fail(name, "a float tensor [B, L, H, D]", checks.describe(x))
    for name, x, like in (("k", k, (q.shape[0], k.shape[1], *q.shape[2:])), ("v", v, k.shape)):
        if not isinstance(x, Tensor) or x.shape != like or x.dtype != q.dtype:
            checks.fail(name, f"{q.dtype} {list(like)}", checks.describe(x))
        checks.check_device(name, x, q)


def few_token_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The specification of `fastgrpo_kernels.few_token_attention`."""
    check_arguments(q, k, v)
    queries, keys, values = (x.to(compute_dtype(q)).transpose(1, 2) for x in (q, k, v))
    scores = queries @ keys.transpose(2, 3) / math.sqrt(q.shape[3])
    out = torch.softmax(scores, dim=3) @ values
    return out.transpose(1, 2).to(q.dtype).contiguous()
