"""Attention within the windows of Qwen2.5-VL's vision tower: windows of one length are a batch.

The tower attends within windows of at most 64 patches in all but four of its layers: some 280
windows per layer for 14 frames of 476x840. transformers calls torch once for each window; here
there is one call for each of their few lengths, over all videos at once.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "fastgrpo_flash_by_length"
"""transformers hands all windows at once, by their boundaries, to an attention function with
`flash` in its name.
"""


def attend_by_length(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within sequences; an attention function of transformers.

    Args:
        query, key, value: [1, heads, S, size].
        cu_seq_lens_q: [n + 1], the bounds of the sequences.
        scaling: Of the products.

    Returns:
        [1, S, heads, size], and no weights.
    """
    starts: dict[int, list[int]] = {}
    for start, end in pairwise(cu_seq_lens_q.tolist()):
        starts.setdefault(end - start, []).append(start)
    out = torch.empty_like(query[0].transpose(0, 1), memory_format=torch.contiguous_format)
    for length, first in starts.items():
        index = (torch.tensor(first)[:, None] + torch.arange(length)).to(query.device)
        # q, k, v: [n, heads, length, size]
        q, k, v = (
            tensor[0].transpose(0, 1)[index].transpose(1, 2) for tensor in (query, key, value)
        )
        out[index] = scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)
    return out[None], None


AttentionInterface.register(NAME, attend_by_length)
