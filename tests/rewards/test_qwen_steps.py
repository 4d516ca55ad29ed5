"""Steps of the judge in this process: attention in windows, how a number may go on, draws."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration

from fastgrpo.rewards.media.frames import patches
from fastgrpo.rewards.vlm import qwen_windows
from fastgrpo.rewards.vlm.answers import NUMBER
from fastgrpo.rewards.vlm.engine import Clip
from fastgrpo.rewards.vlm.qwen_chat import NEXT_CHARACTERS, NUMBERS, read_chat
from fastgrpo.rewards.vlm.qwen_prefix import compute_prefixes, draw


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


@pytest.mark.parametrize("attention", [qwen_windows.NAME, "sdpa"])
@torch.no_grad()
def test_the_tower_is_told_what_it_would_compute_of_the_grids(
    qwen_folder: Path, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """Not a bit changes, and a second video of the size finds everything made."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_folder).eval()
    tower, grid = model.model.visual, (2, 6, 8)
    tower.config._attn_implementation = attention
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(2 * 96, 1176, generator=draw)
    own = tower(pixels, grid_thw=torch.tensor([grid] * 2)).pooler_output
    qwen_windows._tower_arguments.cache_clear()
    told = qwen_windows.tower_arguments(tower.config, grid, 2, torch.device("cpu"))
    assert (told["max_seqlen"], told["cu_seqlens"].tolist()) == (48, [0, 48, 96, 144, 192])
    unread = torch.full((2, 3), -1)  # the grids themselves
    assert torch.equal(tower(pixels, grid_thw=unread, **told).pooler_output, own)

    monkeypatch.setattr(qwen_windows, "get_vision_window_index", None)
    again = qwen_windows.tower_arguments(tower.config, grid, 2, torch.device("cpu"))
    before = qwen_windows._indices.cache_info().misses
    assert torch.equal(tower(pixels, grid_thw=unread, **again).pooler_output, own)
    assert qwen_windows._indices.cache_info().misses == before


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
    for greedy in (0.0, 1e-300, 5e-324):
        assert draw(30 * logits[None], greedy, grid[-1:]).tolist() == [2]
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(2, -1), 1.0, edges).tolist() == [0, 4]


@torch.no_grad()
def test_prefixes_are_the_models_own_keys_and_values(qwen_folder: Path) -> None:
    """Of two clips at once, each as the whole model computes it alone."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_folder).eval()
    chat, pixels = read_chat(qwen_folder), torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 4, 3, 84, 112), dtype=torch.uint8, generator=pixels)
    clips = [Clip(each, 2.0) for each in frames]
    prefixes = compute_prefixes(model, chat, clips, torch.device("cpu"))
    tokens = 2 * 3 * 4  # 4 frames of 84 x 112: 2 pairs, in tokens of 28 x 28 pixels
    ids = torch.tensor([[*chat.before, *[chat.video] * tokens, *chat.after]])
    for clip, prefix in zip(clips, prefixes, strict=True):
        whole = model(
            input_ids=ids,
            mm_token_type_ids=(ids == chat.video).int() * 2,
            pixel_values_videos=patches(clip)[0],
            video_grid_thw=torch.tensor([[2, 6, 8]]),
            second_per_grid_ts=torch.tensor([1.0]),
            use_cache=True,
        ).past_key_values
        assert len(prefix.layers) == len(whole.layers) == 3
        for (keys, values), layer in zip(prefix.layers, whole.layers, strict=True):
            torch.testing.assert_close(keys, layer.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values, layer.values, rtol=1e-4, atol=1e-5)
        assert prefix.start == len(chat.before) + 4 + len(chat.after)  # 4: the video's longest side
    assert not torch.equal(prefixes[0].layers[0][0], prefixes[1].layers[0][0])
