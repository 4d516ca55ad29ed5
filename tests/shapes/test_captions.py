"""The grammar of the embedded world, its split and its text tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgrpo.shapes
from fastgrpo.shapes import captions as c


def test_every_caption_comes_back_from_its_sentence() -> None:
    captions = c.all_captions()
    assert len({str(caption) for caption in captions}) == 48
    assert [c.parse_caption(str(caption)) for caption in captions] == captions
    assert c.parse_caption("a red square moving right") == c.Caption(colour=0, shape=0, direction=1)
    assert c.parse_caption("a yellow triangle moving up\n") == c.Caption(
        colour=3, shape=2, direction=2
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "a red square moving right"),
        ("a red square", "a red square moving right"),
        ("a red square moving right fast", "a red square moving right"),
        ("the red square moving right", "a red square moving right"),
        ("a pink square moving right", "colour one of red, green, blue, yellow, got 'pink'"),
        ("a red circle moving right", "shape one of square, cross, triangle, got 'circle'"),
        ("a red square moving north", "direction one of left, right, up, down, got 'north'"),
        ("a Red square moving right", "colour one of"),
    ],
)
def test_a_sentence_outside_the_grammar_is_refused_with_words(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        c.parse_caption(text)


def test_the_split_is_a_partition_that_shows_every_value_on_both_sides() -> None:
    train, validation = c.train_captions(), c.validation_captions()
    assert (len(train), len(validation)) == (36, 12)
    assert set(train) | set(validation) == set(c.all_captions())
    assert Counter(caption.colour for caption in validation) == dict.fromkeys(range(4), 3)
    assert Counter(caption.shape for caption in validation) == dict.fromkeys(range(3), 4)
    assert Counter(caption.direction for caption in validation) == dict.fromkeys(range(4), 3)
    assert len({(caption.colour, caption.shape) for caption in validation}) == 12


@pytest.mark.parametrize(
    ("name", "captions"),
    [("train.txt", c.train_captions()), ("validation.txt", c.validation_captions())],
)
def test_the_prompt_files_agree_with_the_grammar(name: str, captions: list[c.Caption]) -> None:
    text = (Path(fastgrpo.shapes.__file__).parent / name).read_text(encoding="utf-8")
    assert text == "".join(f"{caption}\n" for caption in captions)


def _philox_normals(seed: int, count: int) -> np.ndarray:
    """The contract of gaussian_noise in NumPy float64: NumPy's own Philox is 4x64, so the ten
    rounds of 4x32 are written out.
    """
    mask, out = 0xFFFFFFFF, []
    for quad in range(count // 4):
        x, k = [quad, 0, 0, 0], [seed & mask, seed >> 32]
        for _ in range(10):
            p, q = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
            x = [(q >> 32) ^ x[1] ^ k[0], q & mask, (p >> 32) ^ x[3] ^ k[1], p & mask]
            k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
        u = [((word >> 9) + 0.5) * 2.0**-23 for word in x]
        for radius, turn in ((u[0], u[1]), (u[2], u[3])):
            r = np.sqrt(-2 * np.log(radius))
            out += [r * np.cos(2 * np.pi * turn), r * np.sin(2 * np.pi * turn)]
    return np.array(out)


def test_tokens_are_the_fixed_gaussians_that_the_checkpoint_was_trained_on() -> None:
    expected = np.stack([_philox_normals(20_000 + value, 32) for value in range(11)])
    np.testing.assert_allclose(c.attribute_tokens().numpy(), expected, atol=2e-6)


def test_a_prompt_is_its_three_attribute_tokens_and_no_prompt_is_zeros() -> None:
    table = c.attribute_tokens()
    tokens = c.text_tokens(["a blue cross moving down", "", "a red square moving left"])
    assert tokens.shape == (3, 3, 32)
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens[0], table[[2, 4 + 1, 7 + 3]])
    assert torch.equal(tokens[1], torch.zeros(3, 32))
    assert torch.equal(tokens[2], table[[0, 4, 7]])
    assert c.text_tokens([]).shape == (0, 3, 32)
    with pytest.raises(ValueError, match="colour one of"):
        c.text_tokens(["a red square moving left", "a pink square moving left"])


def test_indices_and_sentences_give_the_same_tokens() -> None:
    captions = c.all_captions()
    assert torch.equal(
        c.indices_to_tokens(c.caption_indices(captions)),
        c.text_tokens([str(caption) for caption in captions]),
    )


def test_validation_is_one_direction_of_each_colour_and_shape() -> None:
    held = [caption for caption in c.all_captions() if c.is_validation(caption)]
    assert held == c.validation_captions()
    assert len({(caption.colour, caption.shape) for caption in held}) == len(held) == 12
