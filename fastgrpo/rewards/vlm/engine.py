"""What a stage judge asks of the engine that runs its vision-language model, and what it gets back.

A subclass of `Engine` can be named by its dotted path in a recipe (`reward.init_args.engine:`).
Constructors only keep their arguments; `load` does the work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """The frames of one video that the model sees.

    Attributes:
        frames: [n, 3, H, W] uint8, n even, H and W multiples of 28, on any device
            (`frames.make_clip`).
        fps: Frames per second.
    """

    frames: Tensor
    fps: float


@dataclass(frozen=True)
class Decoding:
    """How an answer is drawn.

    Attributes:
        max_tokens: Length of an answer.
        constrained: Only what spells a number in [1, 10] can be written.
        probabilities: The reply carries the probabilities of the digits.
        temperature: 0 is greedy; above 0, `seed` decides.
        seed: Of a sampled answer.
    """

    max_tokens: int = 16
    constrained: bool = False
    probabilities: bool = False
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """What came back for one question.

    Attributes:
        text: The answer.
        digits: For each token of the answer, the probability of each of the tokens "0" ... "9" in
            its place; empty if not asked for. NaN where the probabilities given were none.
        tokens: The texts of those tokens. Empty also where each is one character of `text`.
        ten: Probability of "0" after a first token "1".
        error: Why there is no answer at all, else "".
        cut: Something else than the model ended the answer, such as max_tokens.
    """

    text: str = ""
    digits: tuple[Mapping[str, float], ...] = ()
    ten: float = 0.0
    error: str = ""
    cut: bool = False
    tokens: tuple[str, ...] = ()


class Engine(ABC):
    """Runs a frozen vision-language model on videos and questions about them.

    Attributes:
        concurrency: How many calls of `ask` may run at the same time.
        memory_bytes: What the loaded model takes of the trainer's GPU, known without its weights;
            0 if it runs elsewhere.
    """

    concurrency: int = 1
    memory_bytes: int = 0

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Load what is needed; `device` is the trainer's, which an engine may share.

        Raises:
            FileNotFoundError, ValueError: Names what is missing or wrong.
        """

    @abstractmethod
    def ask(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        """Ask each clip's own questions about it.

        A greedy reply must not depend on the other clips. Called from several threads if
        `concurrency` is above 1.

        Returns:
            A reply to each question about each clip, in the order given.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What decides the answers: model, revision, precision and the like, as JSON; no secret."""

    def working_bytes(self, clips: Sequence[Clip], num_questions: int) -> float:
        """What `ask` takes of the trainer's GPU at the worst moment, besides `memory_bytes` and the
        clips; 0 if the model runs elsewhere.

        Args:
            clips: Of one size, on the meta device.
            num_questions: About each clip.
        """
        return 0

    def close(self) -> None:
        """Let go of the model or the connections; a call of `ask` that is waiting ends. Safe
        without `load`, and twice.
        """

    def counters(self) -> dict[str, int]:
        """Counts since the last call, such as requests; metrics, summed over ranks."""
        return {}

    def last_errors(self) -> dict[str, str]:
        """The last error of each endpoint that had one."""
        return {}
