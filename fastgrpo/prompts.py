"""Stage 1: the captions of a run, and which of them an iteration takes."""

from __future__ import annotations

import functools
import random

from fastgrpo.config import find_file
from fastgrpo.trajectory import derive_seed


def read_prompts(path: str, key: str) -> list[str]:
    """The captions of a UTF-8 text file, one a line; blank lines are left out.

    Raises:
        FileNotFoundError, ValueError: no such file, not readable as text, or no caption in it; names `key` and the file.
    """
    file = find_file(path, key)
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}: cannot read {file} as UTF-8 text: {error}") from error
    prompts = [p for p in prompts if p]
    if not prompts:
        raise ValueError(f"{key}: expected at least one caption in {file}, found none")
    return prompts


def draw_prompts(prompts: list[str], position: int, count: int, seed: int, shuffle: bool = True) -> list[str]:
    """Captions number position ... position + count - 1 of an endless walk over the list, every epoch in an order of its own.

    A function of its arguments, so that `position` is all a checkpoint has to keep.
    """
    drawn = []
    for i in range(position, position + count):
        epoch, index = divmod(i, len(prompts))
        drawn.append(prompts[_order(len(prompts), epoch, seed)[index] if shuffle else index])
    return drawn


@functools.lru_cache(maxsize=2)
def _order(length: int, epoch: int, seed: int) -> list[int]:
    order = list(range(length))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return order
