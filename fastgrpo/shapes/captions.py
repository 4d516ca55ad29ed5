"""Captions of the embedded world: "a red square moving right", 4 colours x 3 shapes x 4 directions
= 48.

The split is fixed: 12 captions are validation of RL (pretraining sees all 48). They form a Latin
design, so that every pair (colour, shape) is validation in exactly one direction: each colour 3
times, each shape 4 times, each direction 3 times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from fastgrpo_kernels import gaussian_noise
from torch import Tensor

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "cross", "triangle")
DIRECTIONS = ("left", "right", "up", "down")

TOKENS_PER_CAPTION = 3
TOKEN_DIM = 32
# seed of the first attribute value's token; fixed for ever, since the shipped checkpoint was
# trained on these tokens
_TOKEN_SEED = 20_000


@dataclass(frozen=True)
class Caption:
    """One caption as indices into `COLOURS`, `SHAPES` and `DIRECTIONS`; `str()` gives the sentence."""

    colour: int
    shape: int
    direction: int

    def __str__(self) -> str:
        return f"a {COLOURS[self.colour]} {SHAPES[self.shape]} moving {DIRECTIONS[self.direction]}"


def parse_caption(text: str) -> Caption:
    """The caption of a sentence. ValueError names the grammar, the word that does not fit and what
    was expected there.
    """
    words = text.split()
    if len(words) != 5 or words[0] != "a" or words[3] != "moving":
        raise ValueError(f'expected a caption such as "a red square moving right", got {text!r}')
    indices = []
    for kind, word, values in (
        ("colour", words[1], COLOURS),
        ("shape", words[2], SHAPES),
        ("direction", words[4], DIRECTIONS),
    ):
        if word not in values:
            raise ValueError(
                f"expected as {kind} one of {', '.join(values)}, got {word!r} in {text!r}"
            )
        indices.append(values.index(word))
    return Caption(*indices)


def all_captions() -> list[Caption]:
    """The 48 captions, direction running fastest."""
    return [
        Caption(c, s, d)
        for c in range(len(COLOURS))
        for s in range(len(SHAPES))
        for d in range(len(DIRECTIONS))
    ]


def is_validation(caption: Caption) -> bool:
    """Whether a caption is one of the 12 that RL never sees."""
    return caption.direction == (caption.colour + caption.shape) % len(DIRECTIONS)


def train_captions() -> list[Caption]:
    """The 36 captions for RL; `train.txt` holds them, one a line, in this order."""
    return [caption for caption in all_captions() if not is_validation(caption)]


def validation_captions() -> list[Caption]:
    """The 12 captions validation of RL; `validation.txt` holds them, one a line, in this order."""
    return [caption for caption in all_captions() if is_validation(caption)]


def caption_indices(captions: Iterable[Caption]) -> Tensor:
    """[B, 3] int64: colour, shape and direction of B captions, the judge's and the renderer's form."""
    return torch.tensor(
        [(c.colour, c.shape, c.direction) for c in captions], dtype=torch.int64
    ).reshape(-1, 3)


def attribute_tokens() -> Tensor:
    """[11, 32] fp32: the fixed Gaussian token of every attribute value: 4 colours, then 3 shapes,
    then 4 directions.
    """
    count = len(COLOURS) + len(SHAPES) + len(DIRECTIONS)
    return gaussian_noise(
        torch.arange(_TOKEN_SEED, _TOKEN_SEED + count), 0, (TOKEN_DIM,), torch.device("cpu")
    )


def indices_to_tokens(indices: Tensor) -> Tensor:
    """Tokens [B, 3, 32] fp32 of caption indices [B, 3] (colour token, shape token, direction
    token).
    """
    offsets = torch.tensor([0, len(COLOURS), len(COLOURS) + len(SHAPES)])
    return attribute_tokens()[indices.cpu() + offsets]


def text_tokens(prompts: Sequence[str]) -> Tensor:
    """Tokens [B, 3, 32] fp32 of B prompts; the empty prompt "" (no condition) is all zeros.
    ValueError as `parse_caption`.
    """
    tokens = torch.zeros(len(prompts), TOKENS_PER_CAPTION, TOKEN_DIM)
    named = [i for i, prompt in enumerate(prompts) if prompt.strip()]
    if named:
        tokens[named] = indices_to_tokens(caption_indices(parse_caption(prompts[i]) for i in named))
    return tokens
