"""VideoAlign (Liu et al. 2025, Improving Video Generation with Human Feedback): visual quality,
motion quality and text alignment.

Qwen2-VL-2B reads the video and a fixed prompt; a linear head on its last hidden states at three
tokens of the prompt gives the raw scores VQ, MQ and TA, of about the size of their published
means (3.7, 1.2, 2.8): Table 3 of the Self-Paced GRPO paper is in that size.

Run on CPUs only so far, with tiny random networks in the published format; neither on a GPU nor
with the published weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, Qwen2VLConfig, Qwen2VLModel

from fastgrpo.hub import fetch_files
from fastgrpo.interfaces import RewardModel
from fastgrpo.rewards.media.frames import FrameSettings, clip_size, patches
from fastgrpo.rewards.models.per_video import quantise, resize, score_each, spread
from fastgrpo.rewards.models.video_align_files import (
    KEY,
    Published,
    RequestTokens,
    check_weights,
    checkpoint_of,
    merge,
    read_prompt,
    read_request,
    read_settings,
    read_weights,
)
from fastgrpo.rewards.vlm.engine import Clip

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MIN_PIXELS = 128 * 28 * 28
_MIN_FRAMES, _MAX_FRAMES, _PAIR = 4, 768, 2


def sampled_frames(num_frames: int, fps: float, wanted_fps: float) -> list[int]:
    """Indices of the frames that VideoAlign looks at: an even number, about `wanted_fps` a second,
    the first and the last among them.

    Raises:
        ValueError: fewer than two frames, or a rate that is not a positive number.
    """
    if num_frames < _PAIR or not 0 < fps < math.inf:
        raise ValueError(
            f"video: expected at least {_PAIR} frames and a positive rate, got {num_frames} frames at {fps} a second"
        )
    most = min(_MAX_FRAMES, num_frames) // _PAIR * _PAIR
    return spread(
        num_frames,
        round(min(max(num_frames / fps * wanted_fps, _MIN_FRAMES), most) / _PAIR) * _PAIR,
    )


def seen_clip(video: Tensor, fps: float, wanted_fps: float, max_pixels: int) -> Clip:
    """The frames of a video [T, 3, H, W] of `fps` that VideoAlign sees: sampled, uint8, between
    100,352 and max_pixels, sides 28 n.

    Raises:
        ValueError: as `sampled_frames`, `per_video.quantise` and `frames.clip_size`.
    """
    frames = quantise(video, sampled_frames(len(video), fps, wanted_fps))
    budget = FrameSettings(min_pixels=min(_MIN_PIXELS, max_pixels), max_pixels=max_pixels)
    return Clip(
        resize(frames, clip_size(frames.shape[-2], frames.shape[-1], len(frames), budget)),
        wanted_fps,
    )


class VideoAlign(RewardModel):
    """VideoAlign's reward model as a judge of three stages (interfaces.RewardModel).

    For training each raw score becomes sigmoid((raw - mean) / std) with the published mean and
    deviation: in (0, 1) and in the same order. An advantage is standardised inside its group, so
    only the curve of the sigmoid changes it. `components` gives the raw scores.

    Each video is computed by itself, so its score does not depend on others. Positions are those
    of plain text: the published code passes none, and the language model then counts, which is
    not Qwen2-VL's own rule for videos. The head is computed in float32; the published one rounds
    to bf16, in which a group's scores tie. LoRA is merged into the weights.

    Args:
        prompt_file: VideoAlign's prompt_template.py, or a text file with its prompt
            (`video_align_files.read_prompt`). model: a folder as KwaiVGI publishes it, or a hub
            id. revision: branch, tag or commit, for a hub id. base: folder or hub id of the
            Qwen2-VL that it was made of, of which config.json is read; by default the one that
            it names itself. dtype: of weights and arithmetic; the published scores are in bf16.
            attention: of transformers: sdpa, eager, flash_attention_2 and so on. overall:
            weights of VQ, MQ and TA in a fourth and last stage `overall`, the sigmoid of the
            weighted mean of the normalised scores. DanceGRPO trains on the first two, [1, 1, 0]:
            on the sum of their advantages, of which this is close.
    """

    component_names = ("VQ", "MQ", "TA")

    def __init__(
        self,
        prompt_file: str | None = None,
        model: str = "KwaiVGI/VideoReward",
        revision: str | None = None,
        base: str | None = None,
        dtype: Literal["bf16", "fp32"] = "bf16",
        attention: str = "sdpa",
        overall: tuple[float, float, float] | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"{KEY}.dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        if overall is not None and not (
            len(overall) == 3 and min(overall) >= 0 and 0 < sum(overall) < math.inf
        ):
            raise ValueError(
                f"{KEY}.overall: expected three weights of at least 0, one of them above, got {overall}"
            )
        self.prompt = read_prompt(prompt_file)
        self.model, self.revision, self.base, self.dtype, self.attention = (
            model,
            revision,
            base,
            dtype,
            attention,
        )
        self.overall = None if overall is None else tuple(float(weight) for weight in overall)
        self.stages: tuple[str, ...] = (
            "visual_quality",
            "motion_quality",
            "text_alignment",
            *(("overall",) if overall else ()),
        )
        self.loaded: tuple[Any, Tensor, torch.device] | None = None

    # -------- the model

    def load(self, device: torch.device) -> None:
        """Load the network. What is not right is said before a weight is copied.

        Raises:
            FileNotFoundError: no such model, or files of it are missing. ValueError: refused by
                the hub, another model, unreadable.
        """
        shapes, dtype = self._shapes, DTYPES[self.dtype]
        folder = _fetch("model", self.model, self.revision, (*_FILES, "checkpoint-*/model.*"))
        weights = read_weights(checkpoint_of(folder))
        check_weights(weights, shapes, self._published.lora_rank)
        try:
            network = Qwen2VLModel.from_pretrained(
                None,
                config=self._config,
                state_dict=merge(weights, shapes, self._published.lora_scale, dtype),
                dtype=dtype,
                attn_implementation=self.attention,
                device_map={"": device},
            )
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"{KEY}.attention: expected one that transformers has here, got {self.attention!r}: {error}"
            ) from error
        self.loaded = (
            network.eval().requires_grad_(False),
            weights["rm_head.weight"].to(device, torch.float32),
            device,
        )

    @property
    def memory_bytes(self) -> int:
        """Bytes of the weights on the trainer's GPU; from the configuration and the tokenizer
        alone.
        """
        hidden = self._shapes["language_model.embed_tokens.weight"][1]
        return (
            sum(shape.numel() for shape in self._shapes.values()) * DTYPES[self.dtype].itemsize
            + 4 * hidden
        )

    @cached_property
    def _folder(self) -> Path:
        return _fetch("model", self.model, self.revision, _FILES)

    @cached_property
    def _published(self) -> Published:
        return read_settings(self._folder)

    @cached_property
    def _request(self) -> RequestTokens:
        return read_request(checkpoint_of(self._folder) / "tokenizer", self.prompt)

    @cached_property
    def _config(self) -> Qwen2VLConfig:
        """The base's, with a row of the embedding for each token, to which the published model was
        cut.
        """
        base = self.base or self._published.base
        folder = _fetch("base", base, None, ("config.json",))
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{KEY}.base: expected the configuration of a Qwen2-VL in {folder}, got {error}"
            ) from error
        if not isinstance(config, Qwen2VLConfig):
            raise ValueError(
                f"{KEY}.base: expected model_type qwen2_vl in {folder}, got {config.model_type}"
            )
        config.text_config.vocab_size = self._request.vocabulary
        return config

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {
                name: value.shape for name, value in Qwen2VLModel(self._config).state_dict().items()
            }

    def describe(self) -> dict[str, Any]:
        """What decides the scores, as JSON: it is kept with them. mean and std turn raw scores into
        published normalised ones.
        """
        return {
            "judge": "VideoAlign",
            "model": self.model,
            "revision": self.revision,
            "commit": None if Path(self.model).expanduser().is_dir() else self._folder.name,
            "checkpoint": checkpoint_of(self._folder).name,
            "base": self.base or self._published.base,
            "prompt_sha256": hashlib.sha256(self.prompt.encode()).hexdigest(),
            "fps": self._published.fps,
            "max_pixels": self._published.max_pixels,
            "mean": list(self._published.mean),
            "std": list(self._published.std),
            "overall": self.overall and list(self.overall),
            "dtype": self.dtype,
            "attention": self.attention,
            "transformers": transformers.__version__,
        }

    # -------- scores

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        """Stage scores [B, K] float64 in [0, 1] and validity [B], as `rewards` and `components`."""
        raw, valid = self.components(videos, prompts, fps)
        return self.rewards(raw), valid

    def rewards(self, raw: Tensor) -> Tensor:
        """Stage scores [B, K] float64 in [0, 1] of raw scores [B, 3]."""
        normal = (raw.double() - torch.tensor(self._published.mean).double()) / torch.tensor(
            self._published.std
        ).double()
        if self.overall is not None:
            weights = torch.tensor(self.overall, dtype=torch.float64)
            normal = torch.cat([normal, normal @ weights[:, None] / weights.sum()], dim=1)
        return torch.sigmoid(normal)

    def components(
        self, videos: Tensor, prompts: Sequence[str], fps: float
    ) -> tuple[Tensor, Tensor]:
        """Raw scores VQ, MQ, TA [B, 3] float64, not normalised, and validity [B], of videos [B, T,
        3, H, W] of `fps`.

        videos: uint8 or float in [0, 1]; one with a non-finite pixel, or score, is invalid and
        its row is 0.

        Raises:
            RuntimeError: not loaded. ValueError: another number of prompts than of videos, fewer
                than two frames, a size the model cannot take, or a request that is too long for
                it.
        """
        if self.loaded is None:
            raise RuntimeError("expected load() before score()")
        return score_each(
            lambda video, prompt: self._one(video, prompt, fps), 3, self.loaded[2], videos, prompts
        )

    def _one(self, video: Tensor, prompt: str, fps: float) -> Tensor:
        """Raw scores [3] float32 of one video."""
        assert self.loaded is not None
        network, head, device = self.loaded
        pixels, grid = patches(
            seen_clip(video, fps, self._published.fps, self._published.max_pixels)
        )
        visual = network.visual(
            pixels.to(device, network.dtype), grid_thw=torch.tensor([grid], device=device)
        ).pooler_output
        ids = torch.tensor([self._request.ids(prompt, len(visual))], device=device)
        longest = network.config.text_config.max_position_embeddings
        if ids.shape[1] > longest:
            raise ValueError(
                f"expected a request of at most {longest} tokens, got {ids.shape[1]}, {len(visual)} of them of the video"
            )
        words = network.get_input_embeddings()(ids)
        words = words.masked_scatter(
            (ids == self._request.video)[..., None], visual.to(words.dtype)
        )
        positions = torch.arange(ids.shape[1], device=device).expand(3, 1, -1)
        hidden = network.language_model(
            inputs_embeds=words, position_ids=positions, use_cache=False
        ).last_hidden_state
        at = torch.stack([(ids[0] == token).nonzero()[0, 0] for token in self._request.rewards])
        return (hidden[0, at].float() * head).sum(
            -1
        )  # a head of one row serves all three, one of three rows each its own


_FILES = ("model_config.json", "checkpoint-*/tokenizer/*")


def _fetch(key: str, model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """`hub.fetch_files`, whose errors name the argument `key`."""
    try:
        return fetch_files(model, revision, patterns, f"{KEY}.{key}", "its publishers")
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            str(error).replace(f"{key}.model:", f"{key}:").replace(f"{key}.revision:", "revision:")
        ) from error
