"""The stage judge over an engine of a few lines: what is asked, how often, and what becomes of each
answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.rewards.media.frames import FrameSettings, make_clip
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Engine, Reply
from fastgrpo.rewards.vlm.judge import FAILED, PROTOCOL, Reading, StageJudge

STAGES = ("visual_quality", "temporal_smoothness", "text_alignment")


class ScriptedEngine(Engine):
    """rewards.engine.Engine: reply(brightness of the clip in [0, 1], stage number, decoding), and a
    record of every question.
    """

    concurrency = 2
    memory_bytes = 17

    def __init__(self, reply: Callable[[float, int, Decoding], Reply]) -> None:
        self.reply = reply
        self.asked: list[tuple[float, str, Decoding]] = []
        self.device: torch.device | None = None
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def load(self, device: torch.device) -> None:
        self.device = device

    def ask(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        rows = []
        for clip, of_clip in zip(clips, questions, strict=True):
            bright = float(clip.frames.double().mean()) / 255
            self.asked += [(bright, question, decoding) for question in of_clip]
            rows.append([self.reply(bright, stage_of(question), decoding) for question in of_clip])
        return rows

    def describe(self) -> dict[str, Any]:
        return {"model": "scripted"}

    def counters(self) -> dict[str, int]:
        return {"requests": len(self.asked)}

    def last_errors(self) -> dict[str, str]:
        return {"here": "none yet"}


def stage_of(question: str) -> int:
    """By its length: the texts grow with the stage, which `test_the_texts_can_be_told_apart` holds
    to.
    """
    return sorted(QUESTIONS, key=len).index(
        question.replace("a cat", "{caption}").replace("a dog", "{caption}")
    )


QUESTIONS = [
    question.template for question in StageJudge(ScriptedEngine(lambda *_: Reply())).questions
]


def videos(*levels: float) -> Tensor:
    """Grey videos [B, 4, 3, 56, 56]."""
    return torch.tensor(levels)[:, None, None, None, None].expand(-1, 4, 3, 56, 56)


def number(bright: float, stage: int, decoding: Decoding) -> Reply:
    return Reply(f"{1 + round(8 * bright) - stage * 0.25:.2f}")


def test_the_texts_can_be_told_apart() -> None:
    assert len({len(text) for text in QUESTIONS}) == 3
    assert StageJudge(ScriptedEngine(number)).stages == STAGES


def test_scores_are_a_tenth_of_the_answers_in_the_order_given() -> None:
    judge = StageJudge(ScriptedEngine(number))
    scores, valid = judge.score(videos(0.5, 1.0, 0.75), ["a cat", "a dog", "a cat"], 2.0)
    order = [stage_of(text) for text in QUESTIONS]
    expected = [[(level - 0.25 * stage) / 10 for stage in order] for level in (5, 9, 7)]
    assert scores.dtype == torch.float64
    assert torch.equal(scores, torch.tensor(expected, dtype=torch.float64))
    assert valid.tolist() == [True] * 3
    assert judge.score(videos(), [], 2.0)[0].shape == (0, 3)


def test_each_question_holds_its_caption_and_is_put_once_greedily() -> None:
    judge = StageJudge(ScriptedEngine(number), constrained=True)
    judge.score(videos(0.5, 0.75), ["a cat", "a dog"], 2.0)
    assert all(decoding == Decoding(constrained=True) for _, _, decoding in judge.engine.asked)
    for (bright, question, _), text in zip(judge.engine.asked, QUESTIONS * 2, strict=True):
        assert question == text.replace("{caption}", "a cat" if bright < 0.6 else "a dog")


def test_only_what_has_no_number_is_asked_again_and_then_by_chance() -> None:
    def late(bright: float, stage: int, decoding: Decoding) -> Reply:
        return Reply("I would say" if stage == 1 and decoding.temperature == 0 else "6.00")

    judge = StageJudge(ScriptedEngine(late), temperature=0.9)
    scores, valid = judge.score(videos(0.5, 0.75), ["a cat", "a cat"], 2.0)
    assert valid.tolist() == [True, True]
    assert (scores == 0.6).all()
    again = judge.engine.asked[6:]
    assert [(stage_of(question), decoding.temperature) for _, question, decoding in again] == [
        (1, 0.9)
    ] * 2
    assert again[0][2].seed != again[1][2].seed  # of the video
    assert judge.counters() == {"answers": 6, "asked_again": 2, "no_number": 0, "requests": 8}
    assert judge.counters() == {"requests": 8}  # counts begin anew


def test_the_seed_is_that_of_the_video_the_question_and_the_attempt() -> None:
    def seeds(seed: int, *levels: float) -> dict[float, list[int]]:
        judge = StageJudge(ScriptedEngine(lambda *_: Reply("none")), seed=seed)
        judge.score(videos(*levels), ["a cat"] * len(levels), 2.0)
        drawn: dict[float, list[int]] = {}
        for bright, _, decoding in judge.engine.asked:
            if decoding.temperature:
                drawn.setdefault(round(bright, 2), []).append(decoding.seed)
        return drawn

    both = seeds(0, 0.2, 0.4)
    assert {level: len(set(of_level)) for level, of_level in both.items()} == {0.2: 6, 0.4: 6}
    assert seeds(0, 0.4)[0.4] == both[0.4]  # whatever else is in the batch
    assert set(seeds(1, 0.4)[0.4]).isdisjoint(both[0.4])
    assert all(0 <= s < 2**31 for of_level in both.values() for s in of_level)


def test_a_video_whose_stage_gets_no_number_is_left_out() -> None:
    def never(bright: float, stage: int, decoding: Decoding) -> Reply:
        return Reply("10.5" if bright > 0.6 and stage == 2 else "6")

    judge = StageJudge(ScriptedEngine(never), attempts=2)
    scores, valid = judge.score(videos(0.5, 0.75), ["a cat", "a cat"], 2.0)
    assert valid.tolist() == [True, False]
    assert scores[1].tolist() == [0.0] * 3
    assert judge.counters()["no_number"] == 1
    stage = next(
        stage for stage, text in zip(STAGES, QUESTIONS, strict=True) if stage_of(text) == 2
    )
    told = f"{stage}: expected one number in [1, 10], got '10.5'"
    assert judge.last_errors() == {"here": "none yet", "judge": told}, (
        "a run that stops for it says what was written"
    )
    clip = make_clip(videos(0.75)[0], 2.0, judge.frames)
    last = max(judge.answers([clip], ["a cat"])[0], key=lambda reading: reading.attempts)
    assert last == Reading(None, "10.5", "expected one number in [1, 10], got '10.5'", 2)


def test_an_answer_that_was_cut_off_within_a_number_is_asked_again() -> None:
    """Of "Score: 10.00" the beginning "Score: 1" would be the worst grade instead of the best."""

    def long(bright: float, stage: int, decoding: Decoding) -> Reply:
        return Reply("10.00") if decoding.temperature else Reply("Score: 1", cut=True)

    judge = StageJudge(ScriptedEngine(long))
    scores, valid = judge.score(videos(0.5), ["a cat"], 2.0)
    assert (scores.tolist(), valid.tolist()) == ([[1.0, 1.0, 1.0]], [True])
    once = StageJudge(ScriptedEngine(long), attempts=1)
    assert once.score(videos(0.5), ["a cat"], 2.0)[1].tolist() == [False]
    assert once.last_errors()["judge"].endswith("got 'Score: 1', cut off (max_tokens: 16)")


def test_a_request_that_failed_is_not_put_again() -> None:
    """The engine has tried for as long as it was told to; a second round would double that."""

    def down(bright: float, stage: int, decoding: Decoding) -> Reply:
        return Reply(error="http://judge: gone") if bright > 0.6 else Reply("6")

    judge = StageJudge(ScriptedEngine(down))
    assert judge.score(videos(0.5, 0.75), ["a cat", "a cat"], 2.0)[1].tolist() == [True, False]
    assert len(judge.engine.asked) == 6
    reading = judge.answers([make_clip(videos(0.75)[0], 2.0, judge.frames)], ["a cat"])[0][0]
    assert reading == Reading(None, "", f"{FAILED}http://judge: gone", 1)


def test_a_video_that_is_not_finite_is_never_shown() -> None:
    judge = StageJudge(ScriptedEngine(number))
    broken = videos(0.5, 1.0, 0.75).clone()
    broken[0, 3, 0, 0, 0], broken[2, 0, 0, 5, 5] = torch.nan, torch.inf
    scores, valid = judge.score(broken, ["a cat"] * 3, 2.0)
    assert valid.tolist() == [False, True, False]
    assert {bright for bright, _, _ in judge.engine.asked} == {1.0}
    assert scores[0].tolist() == scores[2].tolist() == [0.0] * 3
    judge.counters()
    assert not judge.score(broken[[0, 2]], ["a cat"] * 2, 2.0)[1].any()
    counts = {"answers": 0, "asked_again": 0, "no_number": 0, "requests": 3}
    assert judge.counters() == counts  # all of them, also when there was nothing to ask


def test_the_expected_answer_is_read_from_probabilities() -> None:
    """Half "7", half "8", then ".5": 8. What is written, 8.50, does not count."""

    def torn(bright: float, stage: int, decoding: Decoding) -> Reply:
        assert (decoding.probabilities, decoding.constrained) == (True, True)
        return Reply("8.50", ({"7": 0.4, "8": 0.4}, {}, {"5": 0.9}, {"0": 0.9}))

    scores, valid = StageJudge(ScriptedEngine(torn), answer="expected").score(
        videos(0.5), ["a cat"], 2.0
    )
    assert valid.tolist() == [True]
    torch.testing.assert_close(scores, torch.full((1, 3), 0.8, dtype=torch.float64))
    mute = StageJudge(ScriptedEngine(lambda *_: Reply("8.50")), answer="expected")
    assert mute.score(videos(0.5), ["a cat"], 2.0)[1].tolist() == [False]


def test_what_decides_the_scores_is_told_and_nothing_else() -> None:
    judge = StageJudge(ScriptedEngine(number), frames=FrameSettings(fps=4.0), seed=3)
    told = json.loads(json.dumps(judge.describe()))
    assert told["protocol"] == PROTOCOL == 2  # scores of another protocol are another judge's
    assert tuple(told["stages"]) == STAGES
    assert all(len(digest) == 64 for digest in told["stages"].values())
    assert told["frames"]["fps"] == 4.0
    assert told["seed"] == 3
    assert told["engine"] == {"model": "scripted"}
    assert judge.concurrency == 2
    assert judge.memory_bytes == 17
    assert judge.last_errors() == {"here": "none yet"}
    judge.load(torch.device("cpu"))
    assert judge.engine.device == torch.device("cpu")
    judge.close()
    assert judge.engine.closed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attempts": 0}, "attempts: expected at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"max_tokens": 4}, "max_tokens: expected at least 5"),
        ({"questions": ("nowhere.txt",)}, "nowhere.txt"),
    ],
)
def test_what_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        StageJudge(ScriptedEngine(number), **arguments)
