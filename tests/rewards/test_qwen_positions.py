"""Where the judge's tokens stand: where they did in training, which transformers 5 changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qwen_positions import published_positions  # type: ignore[import-not-found]
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from fastgrpo.rewards.vlm.qwen_prefix import prefix_positions


@pytest.mark.parametrize(
    ("frames", "height", "width", "fps", "long"),
    [
        (4, 84, 112, 2.0, False),
        (8, 56, 56, 1.0, True),
        (12, 56, 84, 0.5, True),
        (6, 140, 56, 1.7, False),
        (6, 56, 140, 2.0, False),  # its last time step is at its last column
        (8, 56, 140, 2.0, True),
        (14, 252, 420, 14 / 53 * 15, False),  # the recipes' clips
        (28, 252, 420, 28 / 53 * 15, False),
    ],
)
def test_positions_are_the_published_ones(
    qwen_folder: Path, frames: int, height: int, width: int, fps: float, long: bool
) -> None:
    """Also those of transformers 5, where a clip's time does not reach beyond its frames' sides."""
    config = Qwen2_5_VLConfig.from_pretrained(qwen_folder)
    interval = config.vision_config.tokens_per_second * 2 / fps
    t, h, w = frames // 2, height // 28, width // 28
    pad = config.video_token_id
    ids = [1, 2, 3, *[pad] * (t * h * w), 4, 5, 6]
    wanted = published_positions(ids, pad, (t, h, w), interval)
    positions, start = prefix_positions(3, (t, h, w), interval, 3)
    assert torch.equal(positions, wanted)
    assert start == int(wanted.max()) + 1
    with torch.device("meta"):
        five = Qwen2_5_VLModel(config)
    theirs, _ = five.get_rope_index(
        torch.tensor([ids]),
        (torch.tensor([ids]) == pad).int() * 2,
        video_grid_thw=torch.tensor([[t, 2 * h, 2 * w]]),
        second_per_grid_ts=torch.tensor([2 / fps]),
    )
    assert torch.equal(theirs[:, 0], wanted) != long
