"""What the trainer asks of a generator and of a judge.

Any class that has these methods can be named by its dotted path in a recipe (`policy:` and
`reward:`); nothing is registered. Constructors only keep their arguments; `load` does the work,
so that a configuration can be checked before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

Conditioning = Mapping[str, Tensor]
"""What one branch of a policy is conditioned on: keyword tensors of the network, each with the
batch first.
"""


class Policy(Protocol):
    """A rectified-flow video generator: x_sigma = (1 - sigma) x0 + sigma eps, the network predicts
    v = eps - x0.

    Attributes:
        transformer: the network that is trained, fp32 master weights, set by `load`. fps: frames
            per second of a decoded video.

    It may also have `load_meta() -> Conditioning`, for `plan`: set `transformer`, and what
    `decode` needs, on the meta device, without weights, and return the conditioning of one
    prompt there.
    """

    transformer: nn.Module
    fps: int

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Shape of one latent, without the batch. ValueError for a size that the model cannot make."""
        ...

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """ValueError for a prompt that `encode` cannot take. Needs no weights: the whole prompt
        file is checked before any work starts.
        """
        ...

    def embed(self, prompts: Sequence[str], device: torch.device) -> None:
        """Make ready, once, what `encode` needs of these prompts (text embeddings on disk): all
        ranks together, before `load`.

        The text encoder is freed before this returns. Nothing to do for a policy that encodes
        without one.
        """
        ...

    def load(self, device: torch.device) -> None:
        """Load every weight, in eval mode: the transformer, which is then sharded and moved, and
        onto `device` all that decodes.

        FileNotFoundError or ValueError name what is missing or wrong.
        """
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of B prompts; the empty prompt "" is the unconditional branch. ValueError as
        `check_prompts`.

        A prompt's bits must not depend on the others, which are those of a rank: encode one by
        one if need be.
        """
        ...

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """v [B, *latent_shape] for latents [B, *latent_shape] fp32 and model timesteps [B] (1000
        sigma); one branch, differentiable.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, T, 3, H, W], float in [0, 1], of clean latents [B, *latent_shape]; a video's
        bits must not depend on the others.
        """
        ...

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the weights of `transformer` so that diffusers' `from_pretrained(folder)` (or
        `load_lora_weights`) takes them; on one rank.

        weights: the whole state dict, on the CPU (`sharding.full_state_dict`); `transformer`
        itself may be sharded.
        """
        ...


class RewardModel(Protocol):
    """A frozen judge that scores videos at K stages of growing strictness.

    Attributes:
        stages: the K names, easiest first; they name the metrics.

    It may also have, as `fastgrpo.rewards.vlm.judge.StageJudge` has: `memory_bytes`, what it
    takes of the trainer's GPU, for `plan`; `concurrency`, calls of `score` that may run at a
    time; `describe() -> dict`, JSON that is kept with the scores; `counters() -> dict[str, int]`
    since the last call, logged as `judge/...`; `last_errors() -> dict[str, str]`, said when a
    run stops; `close()`, called at the end, also while `score` still waits for something. A
    published model with scores of its own scale has, for the score command, `component_names`,
    `components(videos, prompts, fps)`, as `score` but raw, and `rewards(raw)`, their map to [0,
    1].
    """

    stages: tuple[str, ...]

    def load(self, device: torch.device) -> None:
        """Load what the judge needs onto `device`."""
        ...

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        """Scores [B, K] float64 in [0, 1] and validity [B] bool, in the order given.

        videos [B, T, 3, H, W], uint8 or float in [0, 1], on any device; fps: their frames a
        second. A video that could not be scored is invalid; its row is not read. A video's score
        must not depend on the others in the batch, or it would depend on the number of ranks.
        """
        ...
