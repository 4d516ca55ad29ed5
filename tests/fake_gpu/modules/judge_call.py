"""The judge in process on the GPU that is not there: Qwen2.5-VL at its true width, two layers of
each tower.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from fake_cuda import CUDA
from fake_gpu import FakeGPU

from benchmarks import judge as benchmark
from fastgrpo.rewards.vlm.judge import StageJudge
from fastgrpo.rewards.vlm.qwen import TransformersEngine
from fastgrpo.rewards.vlm.qwen_chat import CHARACTERS

NAME = "qwen2.5-vl-7b"
ANSWER = "7.50"


class Ids(benchmark.Ids):
    """The benchmark's stand-in for a tokenizer, which can spell an answer."""

    def decode(self, ids: Sequence[int], **_: object) -> str:
        chat = benchmark.stand_in_chat()
        return "".join(CHARACTERS[chat.characters.index(i)] for i in ids)


def run(num_videos: int = 2, calls: int = 1) -> dict[str, Any]:
    """Score videos of the recipe's size at three stages.

    Args:
        num_videos: Of one call.
        calls: How often to score so many.

    Returns:
        JSON: `waits` of each call by place, `scores` and `valid` of the last.
    """
    config = copy.deepcopy(benchmark.CONFIGS[NAME])
    config["text_config"] |= {"num_hidden_layers": 2, "max_window_layers": 2}
    config["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}
    benchmark.CONFIGS["two layers"] = config
    scale = benchmark.SCALES["full"]
    chat = dataclasses.replace(benchmark.stand_in_chat(), tokenizer=Ids())
    tokens = itertools.cycle(chat.characters[CHARACTERS.index(c)] for c in ANSWER)

    def read(dtype: torch.dtype, place: str) -> float:
        """Every pixel and logit is finite, and every row draws the same answer."""
        if dtype == torch.bool:
            return not place.endswith("qwen_prefix.answer")
        return next(tokens) if dtype == torch.int64 else 1.0

    products = {f"call {call}": torch.bfloat16 for call in range(calls)}
    with FakeGPU(products, read=read) as gpu:
        engine = TransformersEngine(NAME)
        engine.adopt(benchmark.random_model("two layers", CUDA, torch.bfloat16), chat, CUDA)
        judge = StageJudge(engine, frames=scale.frames, attempts=1)
        size = scale.num_frames, 3, scale.height, scale.width
        for call in range(calls):
            with gpu.during(f"call {call}"):
                videos = torch.empty(num_videos, *size, device=CUDA)
                scores, valid = judge.score(videos, ["a paper boat"] * num_videos, scale.fps)
    return {
        "waits": {phase: dict(places) for phase, places in gpu.waits.items()},
        "scores": scores.tolist(),
        "valid": valid.tolist(),
        "cpu_seconds": time.process_time(),
    }
