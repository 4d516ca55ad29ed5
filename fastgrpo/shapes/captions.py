"""The prompts of the embedded world: "a red square moving right", 4 colours x 3 shapes x 4
directions = 48.

The split is fixed: 12 prompts are RL's validation (pretraining sees all 48). They form a Latin
design, so that every pair (colour, shape) is in validation in exactly one direction: each colour 3
times, each shape 4 times, each direction 3 times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

import torch
from fastgrpo_kernels import gaussian_noise
from torch import Tensor

from fastgrpo.errors import require

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "cross", "triangle")
DIRECTIONS = ("left", "right", "up", "down")

TOKENS_PER_CAPTION = 3
TOKEN_DIM = 32
_TOKEN_SEED = 20_000
"""Seed of the first attribute value's token. It must not change: the shipped checkpoint was trained
on these tokens.
"""


class Caption(NamedTuple):
    """A prompt as indices into `COLOURS`, `SHAPES` and `DIRECTIONS`; `str()` gives the sentence."""

    colour: int
    shape: int
    direction: int

    def __str__(self) -> str:
        return f"a {COLOURS[self.colour]} {SHAPES[self.shape]} moving {DIRECTIONS[self.direction]}"


def parse_caption(text: str) -> Caption:
    """The attributes of a sentence.

    Raises:
        UserError: Names the word that does not fit and what was expected there.
    """
    words = text.split()
    fits = len(words) == 5 and words[0] == "a" and words[3] == "moving"
    require(fits, "prompt", 'a sentence such as "a red square moving right"', text)
    indices = []
    for kind, word, values in (
        ("colour", words[1], COLOURS),
        ("shape", words[2], SHAPES),
        ("direction", words[4], DIRECTIONS),
    ):
        require(word in values, f"prompt {text!r}", f"as {kind} one of {', '.join(values)}", word)
        indices.append(values.index(word))
    return Caption(*indices)


def all_captions() -> list[Caption]:
    """The 48 captions, direction running fastest."""
    counts = (range(len(values)) for values in (COLOURS, SHAPES, DIRECTIONS))
    return [Caption(*indices) for indices in product(*counts)]


def is_validation(caption: Caption) -> bool:
    """True for the 12 captions that RL does not train on."""
    return caption.direction == (caption.colour + caption.shape) % len(DIRECTIONS)


def train_captions() -> list[Caption]:
    """The 36 captions for RL; `train.txt` holds them, one per line, in this order."""
    return [caption for caption in all_captions() if not is_validation(caption)]


def validation_captions() -> list[Caption]:
    """The 12 others; `validation.txt` holds them, one per line, in this order."""
    return [caption for caption in all_captions() if is_validation(caption)]


def caption_indices(captions: Iterable[Caption]) -> Tensor:
    """[B, 3] int64: colour, shape and direction of B captions."""
    return torch.tensor(list(captions), dtype=torch.int64).reshape(-1, 3)


def attribute_tokens() -> Tensor:
    """[11, 32] fp32: the fixed Gaussian token of each attribute value: 4 colours, 3 shapes, 4
    directions.
    """
    count = len(COLOURS) + len(SHAPES) + len(DIRECTIONS)
    seeds = torch.arange(_TOKEN_SEED, _TOKEN_SEED + count)
    return gaussian_noise(seeds, 0, (TOKEN_DIM,), torch.device("cpu"))


def indices_to_tokens(indices: Tensor) -> Tensor:
    """Tokens [B, 3, 32] fp32 (colour, shape, direction) of caption indices [B, 3]."""
    offsets = torch.tensor([0, len(COLOURS), len(COLOURS) + len(SHAPES)])
    return attribute_tokens()[indices.cpu() + offsets]


def text_tokens(prompts: Sequence[str]) -> Tensor:
    """Tokens [B, 3, 32] fp32 of B prompts; all zeros for the empty prompt "".

    Raises:
        UserError: As `parse_caption`.
    """
    tokens = torch.zeros(len(prompts), TOKENS_PER_CAPTION, TOKEN_DIM)
    named = [i for i, prompt in enumerate(prompts) if prompt.strip()]
    if named:
        tokens[named] = indices_to_tokens(caption_indices(parse_caption(prompts[i]) for i in named))
    return tokens
