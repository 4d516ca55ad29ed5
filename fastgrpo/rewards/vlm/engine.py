"""What a stage judge asks of the engine that runs its vision-language model, and what it gets back.

Any class with these methods can be named by its dotted path in a recipe
(`reward.init_args.engine:`). Constructors only keep their arguments; `load` does the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """The frames of one video that the model sees.

    frames: [n, 3, H, W] uint8, n even, H and W multiples of 28, on any device
    (`frames.make_clip`). fps: their number a second.
    """

    frames: Tensor
    fps: float


@dataclass(frozen=True)
class Decoding:
    """How an answer is drawn.

    constrained: only what spells a number in [1, 10] can be written, where the engine has that.
    probabilities: the reply carries those of the digits. temperature: 0 is greedy; above it,
    `seed` decides.
    """

    max_tokens: int = 16
    constrained: bool = False
    probabilities: bool = False
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """What came back for one question.

    text: the answer. digits: for each token of it, the probability of each token "0" ... "9" in
    its place, where asked for and had, else empty. ten: probability of "0" after a first token
    "1". error: why there is no answer at all, else "". cut: max_tokens ended the answer, not the
    model.
    """

    text: str = ""
    digits: tuple[Mapping[str, float], ...] = ()
    ten: float = 0.0
    error: str = ""
    cut: bool = False


class Engine(Protocol):
    """Runs a frozen vision-language model on videos and questions about them."""

    def load(self, device: torch.device) -> None:
        """Load what is needed; `device` is the trainer's, which an engine may share.
        FileNotFoundError, ValueError: what is missing.
        """
        ...

    def ask(
        self, clips: Sequence[Clip], questions: Sequence[Sequence[str]], decoding: Decoding
    ) -> list[list[Reply]]:
        """A reply to each question about each clip, in the order given; in a request the video
        comes first.

        A greedy reply must not depend on the other clips. Called from several threads where
        `concurrency` is above 1.
        """
        ...

    def close(self) -> None:
        """Let go of the model or the connections; a call of `ask` that is waiting ends. Safe
        without `load`, and twice.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What decides the answers: model, revision, precision and the like, as JSON; no secret."""
        ...

    @property
    def concurrency(self) -> int:
        """Calls of `ask` that may run at a time."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Bytes of the trainer's GPU that the loaded model takes (0 where it lies elsewhere), known
        without its weights.
        """
        ...

    def counters(self) -> dict[str, int]:
        """Counts since the last call: requests, failed requests and the like. Metrics, summed over
        ranks.
        """
        ...

    def last_errors(self) -> dict[str, str]:
        """The last error of each endpoint (or of the engine) that had one."""
        ...
