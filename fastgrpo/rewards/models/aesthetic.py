"""LAION's aesthetic predictor: how much people would like a frame, about 1 to 10, from CLIP
ViT-L/14's embedding of it.

Either of the published heads: the five linear layers of sac+logos+ava1-l14-linearMSE.pth
(github.com/christophschuhmann/improved-aesthetic-predictor), or the single one of
sa_0_4_vit_l_14_linear.pth (github.com/LAION-AI/aesthetic-predictor), which VBench uses. A video's
score is the mean over its frames.

Run on CPUs only so far, with tiny random networks in the published format; neither on a GPU nor
with the published weights.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import linear, normalize
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from fastgrpo.errors import UserError, require
from fastgrpo.files import find_file
from fastgrpo.hub import fetch_files, require_weights
from fastgrpo.rewards.media.frames import preparing_bytes, quantise
from fastgrpo.rewards.models.per_video import PerVideoReward, read_tensors, resize, spread
from fastgrpo.rewards.published import hub_commit, read_config, weight_shapes

_KEY = "reward.init_args"
_CONFIG_FILES = ("config.json",)
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_LAYERS = (0, 2, 4, 6, 7)
"""Indices in the published nn.Sequential. Those between are dropout; no layer has an activation."""


def clip_pixels(frames: Tensor, size: int) -> Tensor:
    """What CLIP sees of frames: the shorter side resized to `size`, the middle, normalised.

    As transformers' CLIPImageProcessor has it from Pillow, except that few pixels are rounded
    differently by 1 of 255; on the frames' device.

    Args:
        frames: [n, 3, H, W] uint8.
        size: Of CLIP's input.

    Returns:
        [n, 3, size, size] float32.
    """
    height, width = frames.shape[-2:]
    short = min(height, width)
    scaled = (int(size * height / short), int(size * width / short))
    # Across, then down: Pillow rounds between the two.
    frames = resize(resize(frames, (height, scaled[1])), scaled)
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    mean, std = (
        torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (_MEAN, _STD)
    )
    return (frames[..., top : top + size, left : left + size].float() / 255 - mean) / std


def read_head(file: str | None) -> list[tuple[Tensor, Tensor]]:
    """Read either published head (.pth, or the same tensors in .safetensors).

    Returns:
        The linear layers, weight [out, in] and bias [out] float32.

    Raises:
        FileNotFoundError, ValueError: No such file, or another network in it; the message says
            where to get one.
    """
    where = (
        "sac+logos+ava1-l14-linearMSE.pth of "
        "github.com/christophschuhmann/improved-aesthetic-predictor"
    )
    if file is None:
        raise UserError(f"{_KEY}.head: expected the file of an aesthetic head, {where}")
    path = find_file(file, f"{_KEY}.head")
    stored = read_tensors(path, f"{_KEY}.head")
    for prefixes in ([f"layers.{index}." for index in _LAYERS], [""]):
        if stored.keys() == {
            f"{prefix}{part}" for prefix in prefixes for part in ("weight", "bias")
        }:
            layers = [(stored[f"{p}weight"].float(), stored[f"{p}bias"].float()) for p in prefixes]
            if _fit_together(layers):
                return layers
    found = ", ".join(f"{name} {list(value.shape)}" for name, value in sorted(stored.items())[:4])
    raise UserError(
        f"{_KEY}.head: expected the layers {_LAYERS} of {where}, or one linear layer, in {path}, "
        f"got {found}"
    )


def _fit_together(layers: list[tuple[Tensor, Tensor]]) -> bool:
    """True if each layer takes what the one before it gives, and the last gives one score."""
    width = 1
    for weight, bias in reversed(layers):
        if weight.ndim != 2 or weight.shape[0] != width or bias.shape != (width,):
            return False
        width = weight.shape[1]
    return True


class Aesthetic(PerVideoReward):
    """LAION's aesthetic score as a judge of one stage: a tenth of it, clamped to [0, 1].

    `components` gives the score itself. Each video is computed by itself, in float32, so its score
    does not depend on others.

    Args:
        head: File of the head (`read_head`).
        model: A folder of CLIP in transformers' format, or a hub id; the published heads were made
            on openai/clip-vit-large-patch14.
        revision: Branch, tag or commit, for a hub id.
        frames: How many frames are looked at, evenly from the first to the last; 0 for all.
    """

    stages: tuple[str, ...] = ("aesthetic",)
    component_names = ("LAION",)

    def __init__(
        self,
        head: str | None = None,
        model: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        frames: int = 8,
    ) -> None:
        require(frames >= 0, f"{_KEY}.frames", "at least 0", frames)
        self.head = read_head(head)
        self.model, self.revision, self.frames = model, revision, frames

    def load(self, device: torch.device) -> None:
        """Load CLIP's vision tower. What is wrong is said before a weight is read.

        Raises:
            FileNotFoundError: The model, or files of it, are missing.
            ValueError: Refused by the hub, another model, or unreadable.
        """
        width, found = self.head[0][0].shape[1], self._config.projection_dim
        self._expect(found == width, f"embeddings of {width}, which the head takes", found)
        patterns = (*_CONFIG_FILES, "*.safetensors*")
        folder = fetch_files(self.model, self.revision, patterns, _KEY, "transformers")
        require_weights(folder, _KEY)
        weights: dict[str, Tensor] = {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, "pt") as file:  # the text tower's half is not read
                    names = self._shapes.keys() & set(file.keys())
                    weights |= {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{_KEY}.model: expected readable safetensors in {folder}, got {error}"
            ) from error
        found_shapes = {name: value.shape for name, value in weights.items()}
        wrong = sorted(n for n, shape in self._shapes.items() if found_shapes.get(n) != shape)
        listed = f"{len(wrong)} missing or of another shape: {', '.join(wrong[:3])}"
        self._expect(not wrong, "the tensors of its configuration", listed)
        network = CLIPVisionModelWithProjection.from_pretrained(
            None,
            config=self._config,
            state_dict=weights,
            dtype=torch.float32,
            device_map={"": device},
        )
        head = [(weight.to(device), bias.to(device)) for weight, bias in self.head]
        self.loaded = network.eval().requires_grad_(False), head, device

    @cached_property
    def memory_bytes(self) -> int:  # type: ignore[override]  # an attribute of the base
        """Bytes of the weights on the trainer's GPU; from config.json and the head alone."""
        head = sum(part.numel() for layer in self.head for part in layer)
        return 4 * (head + sum(shape.numel() for shape in self._shapes.values()))

    def working_bytes(self, videos: Tensor, fps: float) -> float:
        """As `RewardModel.working_bytes`: of one video, since each is computed by itself."""
        length, config = videos.shape[1], self._config
        seen = min(self.frames or length, length)
        tokens = seen * ((config.image_size // config.patch_size) ** 2 + 1)
        # Stream and norm, and what the MLP widens it to, before and after its activation.
        network = tokens * (2 * config.hidden_size + 3 * config.intermediate_size)
        size = (config.image_size, config.image_size)
        return max(preparing_bytes(videos, seen, size), 4 * network)

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return weight_shapes(CLIPVisionModelWithProjection, self._config)

    @cached_property
    def _folder(self) -> Path:
        return fetch_files(self.model, self.revision, _CONFIG_FILES, _KEY, "transformers")

    @cached_property
    def _config(self) -> CLIPVisionConfig:
        config = read_config(self._folder, (CLIPConfig, CLIPVisionConfig), f"{_KEY}.model")
        if isinstance(config, CLIPVisionConfig):
            return config
        # The whole model's configuration holds this beside its parts.
        config.vision_config.projection_dim = config.projection_dim
        return config.vision_config

    def _expect(self, ok: bool, expected: str, got: object) -> None:
        require(ok, f"{_KEY}.model", f"{expected}, in {self._folder}", got)

    def describe(self) -> dict[str, Any]:
        """What decides the scores, as JSON that is kept with them."""
        head = b"".join(part.numpy().tobytes() for layer in self.head for part in layer)
        return {
            "judge": "LAION aesthetic",
            "model": self.model,
            "revision": self.revision,
            "commit": hub_commit(self.model, self._folder),
            "head_sha256": hashlib.sha256(head).hexdigest(),
            "layers": len(self.head),
            "frames": self.frames,
            "transformers": transformers.__version__,
        }

    def rewards(self, raw: Tensor) -> Tensor:
        """Scores [B, 1] float64 in [0, 1] of raw scores: a tenth, clamped."""
        return (raw.double() / 10).clamp(0, 1)

    def score_one(self, video: Tensor, prompt: str, fps: float) -> Tensor:
        """Raw score [], about 1 to 10, float32; prompt and rate are ignored."""
        assert self.loaded is not None
        network, head, device = self.loaded
        frames = quantise(video, spread(len(video), min(self.frames or len(video), len(video))))
        pixels = clip_pixels(frames, network.config.image_size).to(device)
        hidden = normalize(network(pixels).image_embeds, dim=-1)
        for weight, bias in head:
            hidden = linear(hidden, weight, bias)
        return hidden.mean()
