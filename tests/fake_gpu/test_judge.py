"""Qwen2.5-VL in process on a CUDA device that is not there: two videos of the recipe's size, three
stages, true width, two layers of each tower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OURS = {
    # Of each video: whether it is finite, its frames' indices and size.
    "item @ judge.StageJudge.score.<listcomp>": 2,
    "tolist @ frames.quantise": 2,
    "to the GPU @ frames.quantise": 2,
    # Of each call: positions and texts.
    "to the GPU @ qwen_prefix.compute_prefixes": 1,
    "to the GPU @ qwen_prefix.compute_prefixes.<genexpr>": 2,
    "to the GPU @ qwen.TransformersEngine._ask_batch": 1,
    "to the GPU @ qwen_prefix._side_by_side.<genexpr>": 4,
    # Of each character of an answer: what may follow, and what was drawn; 7.50 has four.
    "to the GPU @ qwen_prefix.answer": 5,
    "tolist @ qwen_prefix.answer": 5,
}
"""Waits of one call in the project's own functions; transformers' own are counted apart."""
ONCE = {
    # The scale of the patches.
    "to the GPU @ frames._normalisation.<listcomp>": 2,
    # Of each size of video: the windows' bounds, and their indices for each length.
    "to the GPU @ qwen_windows._tower_arguments": 2,
    "to the GPU @ qwen_windows._indices.<listcomp>": 5,
}
"""More waits of the first call: what is computed once for each size of video."""
THEIRS = 8
MODULES = ("judge.", "frames.", "qwen")


def test_the_judge_answers_and_waits_where_it_says(fake_gpu: Callable[..., dict[str, Any]]) -> None:
    answer = fake_gpu(kind="judge", calls=2)
    assert "report" in answer, answer.get("traceback", answer["error"])
    report = answer["report"]
    # Every row draws 7.50 (judge_call.ANSWER).
    assert report["scores"] == [[0.75] * 3] * 2
    assert report["valid"] == [True, True]
    for call, expected in (("call 0", OURS | ONCE), ("call 1", OURS)):
        waits = report["waits"][call]
        ours = {p: n for p, n in waits.items() if p.partition(" @ ")[2].startswith(MODULES)}
        assert ours == expected
        assert sum(waits.values()) - sum(ours.values()) == THEIRS
