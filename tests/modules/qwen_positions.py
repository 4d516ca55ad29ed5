"""Where Qwen2.5-VL's tokens stand, by hand."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def published_positions(
    ids: list[int], pad: int, grid: tuple[int, int, int], interval: float
) -> Tensor:
    """Positions [3, tokens] of a chat with one video, a token at a time: those of transformers 4.57
    and vLLM 0.32, whose text goes on after the largest position so far.
    """
    cells = iter(itertools.product(*map(range, grid)))
    start, after = 0, 0
    rows = []
    for token in ids:
        if token == pad:
            t, y, x = next(cells)
            rows.append([start + int(t * interval), start + y, start + x])
        else:
            rows.append([after] * 3)
            start = after + 1
        after = max(after, *(position + 1 for position in rows[-1]))
    return torch.tensor(rows).T
