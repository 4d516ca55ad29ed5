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
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLModel

from fastgrpo.errors import UserError, require
from fastgrpo.hub import fetch_files
from fastgrpo.rewards.media.frames import (
    FrameSettings,
    clip_size,
    patches,
    preparing_bytes,
    quantise,
)
from fastgrpo.rewards.models.per_video import PerVideoReward, resize, spread
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
from fastgrpo.rewards.published import hub_commit, read_config, weight_shapes
from fastgrpo.rewards.vlm import qwen_memory
from fastgrpo.rewards.vlm.engine import Clip

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MIN_PIXELS = 128 * 28 * 28
_MIN_FRAMES, _MAX_FRAMES, _PAIR = 4, 768, 2
_FILES = ("model_config.json", "checkpoint-*/tokenizer/*")


def sampled_frames(num_frames: int, fps: float, wanted_fps: float) -> list[int]:
    """Indices of the frames that VideoAlign looks at: an even number, about `wanted_fps` per
    second, the first and the last among them.

    Raises:
        ValueError: Fewer than two frames, or a rate that is not a positive number.
    """
    if num_frames < _PAIR or not 0 < fps < math.inf:
        raise UserError(
            f"video: expected at least {_PAIR} frames and a positive rate, "
            f"got {num_frames} frames at {fps} per second"
        )
    most = min(_MAX_FRAMES, num_frames) // _PAIR * _PAIR
    wanted = min(max(num_frames / fps * wanted_fps, _MIN_FRAMES), most)
    return spread(num_frames, round(wanted / _PAIR) * _PAIR)


def seen_clip(video: Tensor, fps: float, wanted_fps: float, max_pixels: int) -> Clip:
    """The frames of a video that VideoAlign sees: sampled, uint8, between 100,352 and max_pixels
    pixels, with sides 28 n.

    Args:
        video: [T, 3, H, W].
        fps: Of the video.
        wanted_fps: At which it is sampled.
        max_pixels: Of a sampled frame.

    Raises:
        ValueError: As `sampled_frames`, `per_video.quantise` and `frames.clip_size`.
    """
    frames = quantise(video, sampled_frames(len(video), fps, wanted_fps))
    height, width = frames.shape[-2:]
    size = clip_size(height, width, len(frames), _frame_budget(max_pixels))
    return Clip(resize(frames, size), wanted_fps)


def _frame_budget(max_pixels: int) -> FrameSettings:
    """The sizes of a frame that VideoAlign sees, from 100,352 to max_pixels pixels."""
    return FrameSettings(min_pixels=min(_MIN_PIXELS, max_pixels), max_pixels=max_pixels)


class VideoAlign(PerVideoReward):
    """VideoAlign's reward model as a judge of three stages.

    For training each raw score becomes sigmoid((raw - mean) / std) with the published mean and
    deviation: in (0, 1) and in the same order. An advantage is standardised inside its group, so
    only the curve of the sigmoid changes it. `components` gives the raw scores.

    Each video is computed by itself, so its score does not depend on others. Positions are those of
    plain text: the published code passes none, and the language model then counts, which is not
    Qwen2-VL's own rule for videos. The head is computed in float32; the published one rounds to
    bf16, in which a group's scores tie. LoRA is merged into the weights.

    Args:
        prompt_file: VideoAlign's prompt_template.py, or a text file with its prompt
            (`video_align_files.read_prompt`).
        model: A folder as KwaiVGI publishes it, or a hub id.
        revision: Branch, tag or commit, for a hub id.
        base: Folder or hub id of the Qwen2-VL that it was made of, of which config.json is read; by
            default the one that the model names itself.
        dtype: Of weights and arithmetic; the published scores are in bf16.
        attention: Of transformers: sdpa, eager, flash_attention_2 and so on.
        overall: Weights of VQ, MQ and TA in a fourth and last stage `overall`, the sigmoid of the
            weighted mean of the normalised scores. DanceGRPO adds the losses of the first two, each
            with advantages of its own, by vq_coef and mq_coef; [1, 1, 0] is close to that with
            equal ones. Its released script sets 1 and 0: VQ alone, for which no fourth stage is
            needed (`recipes/dancegrpo.yaml`).
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
        require(dtype in DTYPES, f"{KEY}.dtype", f"one of {', '.join(DTYPES)}", dtype)
        if overall is not None:
            ok = len(overall) == 3 and min(overall) >= 0 and 0 < sum(overall) < math.inf
            expected = "three weights of at least 0, one of them above"
            require(ok, f"{KEY}.overall", expected, overall)
        self.prompt = read_prompt(prompt_file)
        self.model, self.revision, self.base = model, revision, base
        self.dtype, self.attention = dtype, attention
        self.overall = None if overall is None else tuple(float(weight) for weight in overall)
        stages = ("visual_quality", "motion_quality", "text_alignment", "overall")
        self.stages: tuple[str, ...] = stages if overall else stages[:3]

    def load(self, device: torch.device) -> None:
        """Load the network. What is wrong is said before a weight is copied.

        Raises:
            FileNotFoundError: The model, or files of it, are missing.
            ValueError: Refused by the hub, another model, or unreadable.
        """
        shapes, dtype = self._shapes, DTYPES[self.dtype]
        patterns = (*_FILES, "checkpoint-*/model.*")
        folder = fetch_files(self.model, self.revision, patterns, KEY, "its publishers")
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
            raise UserError(
                f"{KEY}.attention: expected one that transformers has here, "
                f"got {self.attention!r}: {error}"
            ) from error
        head = weights["rm_head.weight"].to(device, torch.float32)
        self.loaded = network.eval().requires_grad_(False), head, device

    @cached_property
    def memory_bytes(self) -> int:  # type: ignore[override]  # an attribute of the base
        """Bytes of the weights on the trainer's GPU; from the configuration and the tokenizer
        alone.
        """
        network = sum(shape.numel() for shape in self._shapes.values())
        hidden = self._shapes["language_model.embed_tokens.weight"][1]
        return network * DTYPES[self.dtype].itemsize + 4 * hidden

    def working_bytes(self, videos: Tensor, fps: float) -> float:
        """As `RewardModel.working_bytes`: of one video, since each is computed by itself."""
        _, length, _, height, width = videos.shape
        seen = len(sampled_frames(length, fps, self._published.fps))
        size = clip_size(height, width, seen, _frame_budget(self._published.max_pixels))
        patches = seen // _PAIR * math.prod(size) // 14**2
        itemsize, config = DTYPES[self.dtype].itemsize, self._config
        preparing = preparing_bytes(videos, seen, size)
        return max(preparing, qwen_memory.judge_bytes(config, itemsize, 1, patches, 0))

    @cached_property
    def _folder(self) -> Path:
        return fetch_files(self.model, self.revision, _FILES, KEY, "its publishers")

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
        try:
            folder = fetch_files(base, None, ("config.json",), KEY, "transformers")
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(str(error).replace(f"{KEY}.model:", f"{KEY}.base:")) from error
        config: Qwen2VLConfig = read_config(folder, (Qwen2VLConfig,), f"{KEY}.base")
        config.text_config.vocab_size = self._request.vocabulary
        return config

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return weight_shapes(Qwen2VLModel, self._config)

    def describe(self) -> dict[str, Any]:
        """What decides the scores, as JSON that is kept with them; mean and std turn raw scores
        into the published normalised ones.
        """
        return {
            "judge": "VideoAlign",
            "model": self.model,
            "revision": self.revision,
            "commit": hub_commit(self.model, self._folder),
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

    def rewards(self, raw: Tensor) -> Tensor:
        """Stage scores [B, K] float64 in [0, 1] of raw scores [B, 3]."""
        mean, std = torch.tensor(self._published.mean), torch.tensor(self._published.std)
        normal = (raw.double() - mean.double()) / std.double()
        if self.overall is not None:
            weights = torch.tensor(self.overall, dtype=torch.float64)
            normal = torch.cat([normal, normal @ weights[:, None] / weights.sum()], dim=1)
        return torch.sigmoid(normal)

    def score_one(self, video: Tensor, prompt: str, fps: float) -> Tensor:
        """Raw scores VQ, MQ, TA [3] float32, not normalised.

        Raises:
            ValueError: Fewer than two frames, a size that the model cannot take, or a request that
                is too long for it.
        """
        assert self.loaded is not None
        network, head, device = self.loaded
        clip = seen_clip(video, fps, self._published.fps, self._published.max_pixels)
        pixels, grid = patches(clip)
        visual = network.visual(
            pixels.to(device, network.dtype), grid_thw=torch.tensor([grid], device=device)
        ).pooler_output
        ids = torch.tensor([self._request.ids(prompt, len(visual))], device=device)
        longest = network.config.text_config.max_position_embeddings
        if ids.shape[1] > longest:
            raise UserError(
                f"expected a request of at most {longest} tokens, got {ids.shape[1]}, "
                f"{len(visual)} of them of the video"
            )
        words = network.get_input_embeddings()(ids)
        is_video = (ids == self._request.video)[..., None]
        words = words.masked_scatter(is_video, visual.to(words.dtype))
        positions = torch.arange(ids.shape[1], device=device).expand(3, 1, -1)
        hidden = network.language_model(
            inputs_embeds=words, position_ids=positions, use_cache=False
        ).last_hidden_state
        at = torch.stack([(ids[0] == token).nonzero()[0, 0] for token in self._request.rewards])
        # A head of one row serves all three tokens, one of three rows each its own.
        return (hidden[0, at].float() * head).sum(-1)
