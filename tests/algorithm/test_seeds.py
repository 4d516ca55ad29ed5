"""Seeds follow from words."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.algorithm.seeds import derive_seed


def test_seeds_are_pinned() -> None:
    """Other values would make another run from the same configuration.

    They are `b2sum -l 64` of the words as Python writes them, halved.
    """
    assert derive_seed(0, "sde", 1, 0, 0) == 5293668079599536886
    assert derive_seed(2**62, "first", 7, 3, 15) == 3791523811210728182
    digest = hashlib.blake2b(b"('epoch',)", digest_size=8).digest()
    assert derive_seed("epoch") == int.from_bytes(digest, "little") // 2


def test_seeds_of_different_words_differ() -> None:
    purposes = ("sde", "first", "order", "epoch")
    words = list(itertools.product((0, 1), purposes, range(10), range(8), range(16)))
    # The same digits cut differently, or as text, are other words too.
    cut: list[Any] = [(1, 23), (12, 3), (123,), ("1", 23), (1, "23"), ("1, 23",), (0,), (0, 0), ()]
    words += cut
    assert len({derive_seed(*w) for w in words}) == len(words)


@given(st.lists(st.integers(0, 2**70) | st.text(), max_size=4))
def test_a_seed_is_a_non_negative_int64_and_a_function_of_its_words(words: list[int | str]) -> None:
    assert 0 <= derive_seed(*words) < 2**63
    assert derive_seed(*words) == derive_seed(*words)
