"""Caption files, and the endless walk over them that a position alone describes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.prompts import draw_prompts, read_prompts

CAPTIONS = [f"caption {i}" for i in range(7)]


@pytest.mark.parametrize(
    "content",
    [
        b"a red square\n\n  \t\na blue cross  \n  caf\xc3\xa9\n\n",
        b"a red square\r\na blue cross\r\n\r\ncaf\xc3\xa9",
        b"\xef\xbb\xbfa red square\na blue cross\ncaf\xc3\xa9\n",  # a byte order mark is no part of a caption
    ],
    ids=["blank lines", "CRLF, no final newline", "byte order mark"],
)
def test_one_caption_a_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes(content)
    assert read_prompts(str(file), "prompts.train") == ["a red square", "a blue cross", "café"]


def test_only_line_ends_end_a_caption(tmp_path: Path) -> None:
    """str.splitlines would break a caption at a form feed, NEL or a Unicode line separator."""
    captions = ["one\u2028still one", "two\x0cstill two", "three\x85still three"]
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(captions), encoding="utf-8", newline="")
    assert read_prompts(str(file), "prompts.train") == captions


@pytest.mark.parametrize("content", [b"\x00\xff\xfe\x80", "naïve".encode("latin-1"), b"", b"\n \n\t\n", b"\xef\xbb\xbf\n"])
def test_a_file_without_readable_captions_is_refused_by_key_and_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"prompts\.heldout") as caught:
        read_prompts(str(file), "prompts.heldout")
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"prompts\.train"):
        read_prompts(str(tmp_path / "none.txt"), "prompts.train")
    with pytest.raises(FileNotFoundError, match=r"prompts\.train"):
        read_prompts(str(tmp_path), "prompts.train")


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    walk = draw_prompts(CAPTIONS, 0, 7 * 40, seed=3)
    epochs = [walk[i : i + 7] for i in range(0, len(walk), 7)]
    assert all(sorted(epoch) == CAPTIONS for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 30  # of 40, out of 5040 orders
    # Each place is taken by each caption now and then: 40 epochs leave one out with probability 0.002.
    assert all(len({epoch[place] for epoch in epochs}) >= 6 for place in range(7))


def test_the_seed_changes_the_order() -> None:
    assert len({tuple(draw_prompts(CAPTIONS, 0, 7, seed)) for seed in range(20)}) > 15


@given(position=st.integers(0, 100), counts=st.lists(st.integers(0, 30), max_size=5), seed=st.integers(0, 2**63 - 1), shuffle=st.booleans())
def test_any_split_of_a_range_draws_the_same(position: int, counts: list[int], seed: int, shuffle: bool) -> None:
    whole = draw_prompts(CAPTIONS, position, sum(counts), seed, shuffle)
    parts, at = [], position
    for count in counts:
        parts += draw_prompts(CAPTIONS, at, count, seed, shuffle)
        at += count
    assert parts == whole
    # What was drawn in between, of whatever list, changes nothing.
    draw_prompts(CAPTIONS[:3], 5, 20, seed + 1, shuffle)
    assert draw_prompts(CAPTIONS, position, sum(counts), seed, shuffle) == whole


def test_without_shuffling_the_files_order_repeats() -> None:
    assert draw_prompts(CAPTIONS, 5, 6, seed=1, shuffle=False) == [CAPTIONS[i] for i in (5, 6, 0, 1, 2, 3)]


def test_the_list_itself_stays_as_it_was() -> None:
    captions = list(CAPTIONS)
    first = draw_prompts(captions, 0, 7, seed=0)
    first[0] = "changed"
    assert captions == CAPTIONS
    assert sorted(draw_prompts(captions, 0, 7, seed=0)) == CAPTIONS
