"""Steps of the judge in this process: attention in windows, how a number may go on, draws."""

from __future__ import annotations

import itertools
import re

import torch
from transformers import AttentionInterface

from fastgrpo.rewards.vlm import qwen_windows
from fastgrpo.rewards.vlm.answers import NUMBER
from fastgrpo.rewards.vlm.qwen_chat import NEXT_CHARACTERS, NUMBERS
from fastgrpo.rewards.vlm.qwen_prefix import draw


def test_windows_of_one_length_at_once() -> None:
    """The same as one attention for each window, which is what transformers does; lengths as they
    come, in 3 calls.
    """
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 23, 8, generator=draw) for _ in range(3))
    bounds = torch.tensor([0, 4, 8, 9, 15, 19, 23], dtype=torch.int32)
    parts = [slice(int(a), int(b)) for a, b in itertools.pairwise(bounds)]
    by_window = [
        torch.softmax(q[:, :, p] @ k[:, :, p].transpose(-1, -2) * 0.3, -1) @ v[:, :, p]
        for p in parts
    ]
    out, _ = qwen_windows.attend_by_length(
        None, q, k, v, cu_seq_lens_q=bounds, scaling=0.3, max_length_q=6
    )
    torch.testing.assert_close(out, torch.cat(by_window, 2).transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert (
        AttentionInterface().get_interface(qwen_windows.NAME, None) is qwen_windows.attend_by_length
    )


def test_every_path_of_the_automaton_is_a_number_and_back() -> None:
    assert len(set(NUMBERS)) == 901
    assert all(re.fullmatch(NUMBER, number) for number in NUMBERS)

    def paths(written: str) -> list[str]:
        following = NEXT_CHARACTERS[written]
        return (
            [written] if not following else [path for c in following for path in paths(written + c)]
        )

    assert sorted(paths("")) == sorted(NUMBERS)
    assert not re.fullmatch(NUMBER, "0.50")
    assert not re.fullmatch(NUMBER, "10.01")


def test_draws_have_the_softmax_distribution() -> None:
    """Over a fine grid of quantiles each token is drawn as often as its probability says, at any
    temperature; -inf never.
    """
    logits = torch.tensor([0.3, -torch.inf, 2.0, -1.0, 0.0])
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    for temperature in (0.5, 1.0, 3.0):
        drawn = draw(logits.expand(10_000, -1), temperature, grid)
        share = torch.bincount(drawn, minlength=5) / 10_000
        torch.testing.assert_close(
            share, torch.softmax(logits / temperature, -1), rtol=0, atol=2e-4
        )
    assert draw(logits[None], 0.0, grid[:1]).tolist() == [2]
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(2, -1), 1.0, edges).tolist() == [0, 4]
