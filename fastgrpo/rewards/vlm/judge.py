"""The stage judge: a frozen vision-language model answers K questions of growing strictness about
every video (docs/method.md, section 3).

An answer is one number in [1, 10]; the reward is a tenth of it. A question whose answer cannot be
read as one number is asked again, and then left out: no score is ever made up.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

from fastgrpo.errors import require
from fastgrpo.interfaces import RewardModel
from fastgrpo.rewards.media.frames import (
    FrameSettings,
    clip_size,
    frame_indices,
    make_clip,
    preparing_bytes,
)
from fastgrpo.rewards.vlm.answers import expected_answer, parse_answer, probabilities_fault
from fastgrpo.rewards.vlm.engine import Clip, Decoding, Engine, Reply
from fastgrpo.rewards.vlm.questions import DEFAULT_QUESTIONS, ask_about, read_questions

PROTOCOL = 2
"""Raised when the same settings begin to give other scores, so that old ones are not mixed with
them. 2: frames from the first to the last, text positions after a long clip, answers read whole.
"""
FAILED = "no reply: "
"""Prefix of the error of a question that got no reply; the engine has tried for as long as it was
told to.
"""


@dataclass(frozen=True)
class Reading:
    """What became of one question about one video.

    Attributes:
        value: The answer in [1, 10], or None.
        text: What was written at the last attempt.
        error: Why there is no value, else "".
        attempts: How often the question was asked.
    """

    value: float | None
    text: str
    error: str
    attempts: int


class StageJudge(RewardModel):
    """A vision-language model as judge of K stages.

    Args:
        engine: What runs the model.
        questions: Files with the questions, easiest first. A file's stem names its stage;
            `{caption}` in it stands for the video's prompt.
        frames: Which frames are seen, and how large.
        answer: parsed takes the number as written; expected takes its expectation under the
            model's probabilities along a constrained answer, for judges whose written answers tie.
            Digits that together have a probability below `answers.LEAST_MASS`, 0.5, are no number.
        constrained: Force the engine to write only a number. False for a server that cannot, or a
            judge that thinks first; then the whole answer has to be a number (`parse_answer`).
        attempts: How often a question is asked in all if the answer is no number.
        temperature: Of the attempts after the first, which is greedy: a greedy judge would repeat
            itself.
        seed: Of those attempts, together with the video and the question.
        max_tokens: Length of an answer.
    """

    def __init__(
        self,
        engine: Engine,
        questions: tuple[str, ...] = DEFAULT_QUESTIONS,
        frames: FrameSettings = FrameSettings(),  # noqa: B008  (frozen)
        answer: Literal["parsed", "expected"] = "parsed",
        constrained: bool = True,
        attempts: int = 3,
        temperature: float = 0.7,
        seed: int = 0,
        max_tokens: int = 16,
    ) -> None:
        require(attempts >= 1, "attempts", "at least 1", attempts)
        require(0 < temperature < math.inf, "temperature", "a positive number", temperature)
        require(max_tokens >= 5, "max_tokens", "at least 5, the length of 10.00", max_tokens)
        self.engine, self.frames, self.seed, self.attempts = engine, frames, seed, attempts
        self.questions = read_questions(questions)
        self.stages = tuple(question.name for question in self.questions)
        self._expected = answer == "expected"
        self._greedy = Decoding(
            max_tokens, constrained or self._expected, probabilities=self._expected
        )
        self._sampled = replace(self._greedy, temperature=temperature)
        self._counts: Counter[str] = Counter()
        self._last_error = ""
        self._lock = Lock()
        self.concurrency = engine.concurrency

    def load(self, device: torch.device) -> None:
        """Load the engine's model, or find its servers.

        Raises:
            ValueError: Also for an engine that cannot answer as this judge asks.
        """
        self.engine.load(device)
        # An empty request, so that an engine that cannot answer this way refuses before the first
        # rollout.
        self.engine.ask([], [], self._greedy)

    def close(self) -> None:
        """Let go of the model or the connections; a call of `score` that is waiting ends."""
        self.engine.close()

    @torch.no_grad()
    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        """Score B videos at K stages.

        Args:
            videos: [B, T, 3, H, W], uint8 or float in [0, 1].
            prompts: One per video.
            fps: Frames per second.

        Returns:
            Scores [B, K] float64 in [0.1, 1] and validity [B]. A video with a pixel that is not
            finite, or with a stage that got no number, is invalid and its row is 0.

        Raises:
            ValueError: A size that the model cannot take, or values outside [0, 1].
        """
        assert len(videos) == len(prompts)
        finite = [i for i, video in enumerate(videos) if bool(torch.isfinite(video).all())]
        clips = [make_clip(videos[i], fps, self.frames) for i in finite]
        scores = torch.zeros(len(videos), len(self.stages), dtype=torch.float64)
        valid = torch.zeros(len(videos), dtype=torch.bool)
        answers = self.answers(clips, [prompts[i] for i in finite])
        for i, readings in zip(finite, answers, strict=True):
            values = [reading.value for reading in readings if reading.value is not None]
            if len(values) == len(self.stages):
                scores[i], valid[i] = torch.tensor(values, dtype=torch.float64) / 10, True
        return scores, valid

    def answers(self, clips: Sequence[Clip], prompts: Sequence[str]) -> list[list[Reading]]:
        """The readings [B][K] of the judge's answers about B clips with these prompts."""
        asked = [[ask_about(question, prompt) for question in self.questions] for prompt in prompts]
        # Without clips, `ask` would check the engine instead.
        replies = self.engine.ask(clips, asked, self._greedy) if clips else []
        readings = [[self._read(reply, 1) for reply in row] for row in replies]
        for attempt in range(2, self.attempts + 1):
            for clip, questions, row in zip(clips, asked, readings, strict=True):
                for k, reading in enumerate(row):
                    if reading.value is None and not reading.error.startswith(FAILED):
                        seed = self._seed(clip, questions[k], attempt)
                        decoding = replace(self._sampled, seed=seed)
                        ((reply,),) = self.engine.ask([clip], [[questions[k]]], decoding)
                        row[k] = self._read(reply, attempt)
        again = sum(reading.attempts - 1 for row in readings for reading in row)
        errors = [
            f"{stage}: {reading.error}"
            for row in readings
            for stage, reading in zip(self.stages, row, strict=True)
            if reading.error
        ]
        count = len(readings) * len(self.stages)
        with self._lock:
            self._counts.update(answers=count, asked_again=again, no_number=len(errors))
            self._last_error = errors[-1] if errors else self._last_error
        return readings

    def describe(self) -> dict[str, Any]:
        """What decides the scores, as JSON that is kept with them."""
        return {
            "protocol": PROTOCOL,
            "stages": {question.name: question.sha256 for question in self.questions},
            "answer": "expected" if self._expected else "parsed",
            "constrained": self._greedy.constrained,
            "max_tokens": self._greedy.max_tokens,
            "attempts": self.attempts,
            "temperature": self._sampled.temperature,
            "seed": self.seed,
            "frames": asdict(self.frames),
            "engine": self.engine.describe(),
        }

    @cached_property
    def memory_bytes(self) -> int:  # type: ignore[override]  # an attribute of the base
        """Bytes of the trainer's GPU that the judge takes."""
        return self.engine.memory_bytes

    def working_bytes(self, videos: Tensor, fps: float) -> float:
        """As `RewardModel.working_bytes`."""
        count, length, channels, height, width = videos.shape
        seen = len(frame_indices(length, fps, self.frames))
        size = seen, channels, *clip_size(height, width, seen, self.frames)
        clip = Clip(torch.empty(size, dtype=torch.uint8, device="meta"), fps)
        answering = self.engine.working_bytes([clip] * count, len(self.questions))
        if not answering:
            return 0
        preparing = preparing_bytes(videos, seen, clip.frames.shape[2:])
        return count * clip.frames.nbytes + max(preparing, answering)

    def counters(self) -> dict[str, int]:
        """Counts since the last call: answers, asked_again, no_number, and the engine's.

        no_number counts the questions that were left without a number, also those that got no
        reply.
        """
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts) | self.engine.counters()

    def last_errors(self) -> dict[str, str]:
        """The last error of each endpoint, and why the last question without a number had none."""
        return self.engine.last_errors() | ({"judge": self._last_error} if self._last_error else {})

    def _read(self, reply: Reply, attempt: int) -> Reading:
        if reply.error:
            return Reading(None, reply.text, f"{FAILED}{reply.error}", attempt)
        if self._expected:
            value, error = expected_answer(reply), probabilities_fault(reply)
        else:
            value = parse_answer(reply.text, reply.cut)
            error = "" if value else f"expected one number in [1, 10], got {reply.text[:300]!r}"
        end = f", cut off (max_tokens: {self._greedy.max_tokens})" if error and reply.cut else ""
        return Reading(value, reply.text, error + end, attempt)

    def _seed(self, clip: Clip, question: str, attempt: int) -> int:
        """Of an attempt at one question about one video; not of the time, the batch or the rank."""
        pixels = clip.frames.cpu().contiguous().numpy().tobytes()
        key = f"{self.seed}\0{attempt}\0{question}\0".encode()
        return int.from_bytes(hashlib.blake2b(key + pixels, digest_size=4).digest(), "big") >> 1
