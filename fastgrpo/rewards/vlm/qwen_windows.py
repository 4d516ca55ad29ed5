"""Windows of Qwen2.5-VL's vision tower: those of one length are a batch for attention, and where
they lie is computed once for each size of video.

The tower attends within windows of at most 64 patches in all but four of its layers: some 280
windows per layer for 14 frames of 476x840. transformers calls torch once for each window; here
there is one call for each of their few lengths, over all videos at once.

On a GPU the host would wait for each layer's boundaries and each length's indices, over 100 times a
batch of videos, while the trainer samples. Here it waits once for each size.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.vision_utils import (
    get_vision_attention_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

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
        cu_seq_lens_q: [n + 1], the bounds of the sequences; best on the CPU.
        scaling: Of the products.

    Returns:
        [1, S, heads, size], and no weights.
    """
    out = torch.empty_like(query[0].transpose(0, 1), memory_format=torch.contiguous_format)
    for index in _indices(tuple(cu_seq_lens_q.tolist()), query.device):
        # q, k, v: [n, heads, length, size]
        q, k, v = (
            tensor[0].transpose(0, 1)[index].transpose(1, 2) for tensor in (query, key, value)
        )
        out[index] = scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)
    return out[None], None


@functools.lru_cache(maxsize=16)
def _indices(bounds: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """[n, length] for each length of a sequence: the positions of its n sequences."""
    starts: dict[int, list[int]] = {}
    for start, end in pairwise(bounds):
        starts.setdefault(end - start, []).append(start)
    return [
        (torch.tensor(first)[:, None] + torch.arange(length)).to(device)
        for length, first in starts.items()
    ]


def tower_arguments(
    config: Any, grid: tuple[int, int, int], num_videos: int, device: torch.device
) -> dict[str, Any]:
    """What the vision tower computes of the sizes of its videos, by transformers' own functions.

    Args:
        config: `vision_config` of Qwen2.5-VL.
        grid: (t, h, w) in patches, of each video.
        num_videos: How many of them.
        device: Where the tower runs.

    Returns:
        Keyword arguments of the tower, to be used as they are and not changed.
    """
    sizes = config.spatial_merge_size, config.window_size, config.patch_size
    return _tower_arguments((grid,) * num_videos, *sizes, config._attn_implementation, device)


@functools.lru_cache(maxsize=16)
def _tower_arguments(
    grids: tuple[tuple[int, int, int], ...],
    merge: int,
    window: int,
    patch: int,
    attention: str,
    device: torch.device,
) -> dict[str, Any]:
    grid_thw = torch.tensor(grids)
    index, windows = get_vision_window_index(grid_thw, merge, window, patch)
    frames, _ = get_vision_attention_seqlens(grid_thw, None)
    # Bounds are read by the host, but by kernels that take them as a tensor.
    where = torch.device("cpu") if attention == NAME else device
    return {
        "position_ids": get_vision_position_ids(grid_thw, merge).to(device),
        "window_index": index.to(device),
        "cu_seqlens": frames.to(where),
        "max_seqlen": int(frames.diff().max()),
        "cu_window_seqlens": windows.to(where),
        "max_window_seqlen": int(windows.diff().max()),
    }


AttentionInterface.register(NAME, attend_by_length)
