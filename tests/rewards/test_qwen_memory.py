"""The judge's working memory as `plan` estimates it, against the tensors of real runs of a tiny
Qwen2.5-VL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig

from benchmarks.judge import CONFIGS
from fastgrpo.planning.meta_model import measure
from fastgrpo.rewards.media.frames import FrameSettings, make_clip, preparing_bytes
from fastgrpo.rewards.vlm import qwen_memory
from fastgrpo.rewards.vlm.judge import StageJudge
from fastgrpo.rewards.vlm.qwen import TransformersEngine

SMALL = FrameSettings(min_pixels=28 * 28, max_pixels=112 * 112)


@pytest.fixture
def judge(qwen_folder: Path, tmp_path: Path) -> Any:
    """judge(K, frames): K questions of about the length that the estimate takes."""

    def make(num_questions: int, frames: FrameSettings) -> StageJudge:
        names = [tmp_path / f"question{k}.txt" for k in range(num_questions)]
        for name in names:
            name.write_text("{caption} " + "is it good? " * 45)
        engine = TransformersEngine(str(qwen_folder))
        return StageJudge(engine, tuple(map(str, names)), frames, max_tokens=5, attempts=1)

    return make


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("num_videos", "num_questions", "frames", "size"),
    [(1, 1, FrameSettings(fps=8), (224, 280)), (4, 3, SMALL, (56, 112))],
    ids=["the vision tower", "the answers"],
)
def test_the_estimate_is_what_a_run_takes(
    judge: Any, num_videos: int, num_questions: int, frames: FrameSettings, size: tuple[int, int]
) -> None:
    reward = judge(num_questions, frames)
    videos = torch.rand(num_videos, 24, 3, *size)
    estimate = reward.working_bytes(videos.to("meta"), 8.0)
    reward.load(torch.device("cpu"))
    module = reward.engine.loaded[0]
    scores: list[Any] = []

    def score() -> torch.Tensor:
        scores.append(reward.score(videos, ["a dog"] * num_videos, 8.0)[0])
        return torch.empty(0)

    cost = measure(score, [videos, *module.parameters(), *module.buffers()], False)
    taken = cost.kept + cost.work
    assert len(scores[0]) == num_videos
    assert 0.97 * taken < estimate < 1.4 * taken


@pytest.mark.parametrize("fps", [0.5, 8.0], ids=["few frames", "all frames"])
def test_preparing_a_clip_takes_what_is_said(fps: float) -> None:
    videos, settings = (
        torch.rand(2, 16, 3, 56, 84),
        FrameSettings(fps=fps, min_frames=2, min_pixels=784),
    )
    clips = []

    def prepare() -> torch.Tensor:
        assert torch.isfinite(videos[0]).all()
        clips.append(make_clip(videos[0], 8.0, settings).frames)
        return torch.empty(0)

    cost = measure(prepare, [videos], False)
    taken = cost.kept + cost.work
    seen, _, *size = clips[0].shape
    assert 0.9 * taken < preparing_bytes(videos, seen, size) < 1.5 * taken


def test_the_published_7b_in_numbers(qwen_folder: Path) -> None:
    """A clip of 480 x 832, 14 frames, three questions. On another device it takes nothing."""
    config = Qwen2_5_VLConfig(**CONFIGS["qwen2.5-vl-7b"])
    patches = 7 * 34 * 60
    token = 28 * 2 * 4 * 128 * 2
    assert qwen_memory.cache_bytes(config.text_config, 1, 2) == token
    kept = qwen_memory.prefix_bytes(config, 2, patches)
    assert patches // 4 * token < kept < (patches // 4 + 1000) * token
    vision = qwen_memory.vision_bytes(config.vision_config, patches, 2)
    language = qwen_memory.language_bytes(config.text_config, patches // 4, 2)
    whole = qwen_memory.judge_bytes(config, 2, 1, patches, 3)
    assert 0.6e9 < vision < 0.9e9
    assert language + kept < whole < 1.5e9
    kinds: Any = ({"device": "cpu"}, {}, {"prefix_cache": 5})
    videos = torch.empty(1, 16, 3, 56, 84, device="meta")
    elsewhere, plain, caching = (
        StageJudge(TransformersEngine(str(qwen_folder), **kind)).working_bytes(videos, 8.0)
        for kind in kinds
    )
    assert 0 == elsewhere < plain < caching
