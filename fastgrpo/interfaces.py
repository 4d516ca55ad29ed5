"""What the trainer asks of a generator and of a judge: two base classes.

A subclass of either is named by its dotted path in a recipe (`policy:` and `reward:`); nothing is
registered. Constructors only keep their arguments and `load` does the work, so that a
configuration can be checked before anything is allocated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # the configuration imports this file, and a wrong one is refused without torch
    import torch
    from torch import Tensor, nn

Conditioning = Mapping[str, "Tensor"]
"""What one branch of a policy is conditioned on: keyword tensors of the network, batch first, on
the device; or on the host, if that is where `velocity` reads them.
"""


class Policy(ABC):
    """A rectified-flow video generator: x_sigma = (1 - sigma) x0 + sigma eps, v = eps - x0.

    Attributes:
        transformer: The network that is trained; fp32 master weights, set by `load`.
        fps: Frames per second of a decoded video.
        model: Hub name or folder of the pipeline in diffusers' format that the weights came from;
            None for a policy that has none.
        attention: The attention backend, in diffusers' words.
        loaded_by: The method of diffusers that takes what `save_pretrained` writes.
    """

    transformer: nn.Module
    fps: int
    model: str | None = None
    attention: str = "native"
    loaded_by: str = "from_pretrained"

    @abstractmethod
    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Shape of one latent, without the batch.

        Raises:
            ValueError: The model cannot make videos of this size.
        """

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Load every weight, in eval mode: the transformer, which is then sharded and moved, and
        onto `device` all that decodes.

        Every rank gets rank 0's transformer, so that of any other rank may have no weights: it may
        be on the meta device, which saves the host's memory where ranks share it.

        Raises:
            FileNotFoundError, ValueError: Names what is missing or wrong.
        """

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of B prompts; the empty prompt "" is the unconditional branch.

        A prompt's bits must not depend on the other prompts, which differ between numbers of
        ranks: encode one by one if need be.
        """

    @abstractmethod
    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """One branch's velocity, differentiable in the transformer's parameters.

        Args:
            latents: ``[B, *latent_shape]`` fp32.
            timesteps: [B] fp32, 1000 sigma.
            conditioning: Of B prompts, as `encode` makes it.

        Returns:
            ``[B, *latent_shape]``.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, T, 3, H, W], float in [0, 1], of clean latents ``[B, *latent_shape]``.

        A video's bits must not depend on the other videos.
        """

    @abstractmethod
    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write `weights` so that diffusers' `from_pretrained(folder)` or `load_lora_weights` takes
        them. Called on one rank.

        Args:
            folder: Where to write; it may not exist yet.
            weights: The whole state dict on the CPU; `transformer` itself may be sharded.
        """

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Check, without weights, that `encode` can take these prompts. The whole prompt file is
        checked before any work starts.

        Raises:
            ValueError: Names the prompt and what is wrong with it.
        """

    def embed(self, prompts: Sequence[str], device: torch.device) -> None:
        """Prepare, once, what `encode` needs of these prompts, such as text embeddings on disk.

        Called by all ranks together, before `load`; frees the text encoder before it returns.
        """

    def load_meta(self) -> Conditioning | None:
        """For `plan`: set `transformer`, and what `decode` needs, on the meta device.

        Returns:
            The conditioning of one prompt on the meta device, or None if this policy cannot be
            planned for.
        """
        return None

    def describe_attention(
        self, latent_shape: tuple[int, ...], dtype: torch.dtype, batch_size: int
    ) -> str:
        """Which attention kernel serves a forward pass of this shape, in words; "" if unknown."""
        return ""


class RewardModel(ABC):
    """A frozen judge that scores videos at K stages of growing strictness.

    Attributes:
        stages: The K names, easiest first; they name the metrics.
        memory_bytes: What the judge takes of the trainer's GPU, for `plan`; 0 if it runs elsewhere.
        concurrency: How many calls of `score` may run at the same time.
        component_names: For a published model with scores of its own scale: their names.
    """

    stages: tuple[str, ...]
    memory_bytes: int = 0
    concurrency: int = 1
    component_names: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Load what the judge needs onto `device`."""

    @abstractmethod
    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        """Score B videos. A video's score must not depend on the others in the batch, or it would
        depend on the number of ranks.

        Args:
            videos: [B, T, 3, H, W], uint8 or float in [0, 1], on any device.
            prompts: One per video.
            fps: Frames per second of the videos.

        Returns:
            Scores [B, K] float64 in [0, 1] and validity [B] bool, in the order given. A video that
            could not be scored is invalid, and its row is not read.
        """

    def components(
        self, videos: Tensor, prompts: Sequence[str], fps: float
    ) -> tuple[Tensor, Tensor]:
        """As `score`, but the model's own scores [B, len(component_names)] on their own scale."""
        raise TypeError(f"{type(self).__name__} has no components")

    def rewards(self, raw: Tensor) -> Tensor:
        """Map `components` [B, len(component_names)] to rewards [B, K] in [0, 1]."""
        raise TypeError(f"{type(self).__name__} has no components")

    def working_bytes(self, videos: Tensor, fps: float) -> float:
        """For `plan`: what `score` takes of the trainer's GPU at the worst moment, besides
        `memory_bytes` and the videos; 0 if the judge runs elsewhere.

        Args:
            videos: As for `score`, on the meta device.
            fps: As for `score`.
        """
        return 0

    def describe(self) -> dict[str, Any]:
        """What made the scores, as JSON that is kept with them; {} for nothing."""
        return {}

    def counters(self) -> dict[str, int]:
        """Counts since the last call, logged as `judge/...`."""
        return {}

    def last_errors(self) -> dict[str, str]:
        """The last error of each part that failed, shown when a run stops."""
        return {}

    def close(self) -> None:
        """Called at the end, also while `score` still waits for something."""
