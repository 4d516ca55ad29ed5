"""LAION's aesthetic predictor: how much people would like a frame, about 1 to 10, from CLIP
ViT-L/14's embedding of it.

Either of the published heads: the five linear layers of sac+logos+ava1-l14-linearMSE.pth
(github.com/christophschuhmann/ improved-aesthetic-predictor), or the single one of
sa_0_4_vit_l_14_linear.pth (github.com/LAION-AI/aesthetic-predictor), which VBench uses. A
video's score is the mean over its frames.

Run on CPUs only so far, with tiny random networks in the published format; neither on a GPU nor
with the published weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, normalize
from transformers import AutoConfig, CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from fastgrpo.files import find_file
from fastgrpo.hub import fetch_files, require_weights
from fastgrpo.interfaces import RewardModel
from fastgrpo.rewards.models.per_video import quantise, resize, score_each, spread

_KEY = "reward.init_args"
_CONFIG_FILES = ("config.json",)
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_LAYERS = (
    0,
    2,
    4,
    6,
    7,
)  # of the published nn.Sequential; those between are dropout, and no layer has an activation


def clip_pixels(frames: Tensor, size: int) -> Tensor:
    """What CLIP sees [n, 3, size, size] float32 of frames [n, 3, H, W] uint8: the shorter side
    resized to `size`, the middle, normalised.

    As transformers' CLIPImageProcessor has it from Pillow, but for the rounding of few pixels by
    1 of 255; on the frames' device.
    """
    height, width = frames.shape[-2:]
    short = min(height, width)
    scaled = (int(size * height / short), int(size * width / short))
    frames = resize(
        resize(frames, (height, scaled[1])), scaled
    )  # across, then down: Pillow rounds between the two
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    mean, std = (
        torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (_MEAN, _STD)
    )
    return (frames[..., top : top + size, left : left + size].float() / 255 - mean) / std


def read_head(file: str | None) -> list[tuple[Tensor, Tensor]]:
    """The linear layers, weight [out, in] and bias [out] float32, of either published head (.pth,
    or the same tensors in .safetensors).

    Raises:
        FileNotFoundError, ValueError: no such file, or another network in it; they say where to
            get one.
    """
    where = "sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor"
    if file is None:
        raise ValueError(f"{_KEY}.head: expected the file of an aesthetic head, {where}")
    path = find_file(file, f"{_KEY}.head")
    try:
        stored = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        if not isinstance(stored, Mapping) or not all(
            isinstance(value, Tensor) for value in stored.values()
        ):
            raise ValueError("no mapping of names to tensors")
    except Exception as error:  # whatever a damaged file brings about in zip, pickle or safetensors
        raise ValueError(
            f"{_KEY}.head: expected readable weights in {path}, got {type(error).__name__}: {error}"
        ) from error
    for prefixes in (tuple(f"layers.{place}." for place in _LAYERS), ("",)):
        layers = [
            (stored.get(f"{prefix}weight"), stored.get(f"{prefix}bias")) for prefix in prefixes
        ]
        whole = [
            (w.float(), b.float())
            for w, b in layers
            if w is not None and b is not None and w.ndim == 2
        ]
        inputs = [*(w.shape[1] for w, _ in whole), 1]
        fits = all(
            w.shape == (out, into) and b.shape == (out,)
            for (w, b), into, out in zip(whole, inputs, inputs[1:], strict=False)
        )
        if len(stored) == 2 * len(whole) == 2 * len(prefixes) and fits:
            return whole
    found = ", ".join(f"{name} {list(value.shape)}" for name, value in sorted(stored.items())[:4])
    raise ValueError(
        f"{_KEY}.head: expected the layers {_LAYERS} of {where}, or one linear layer, in {path}, got {found}"
    )


class Aesthetic(RewardModel):
    """LAION's aesthetic score as a judge of one stage (interfaces.RewardModel): a tenth of it, cut
    off at 0 and 1.

    `components` gives the score itself. Each video is computed by itself, in float32, so its
    score does not depend on others.

    Args:
        head: file of the head (`read_head`). model: a folder of CLIP in transformers' format, or
            a hub id; the published heads were made on openai/clip-vit-large-patch14. revision:
            branch, tag or commit, for a hub id. frames: how many frames are looked at, evenly
            from the first to the last; 0 for all.
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
        if frames < 0:
            raise ValueError(f"{_KEY}.frames: expected at least 0, got {frames}")
        self.head = read_head(head)
        self.model, self.revision, self.frames = model, revision, frames
        self.loaded: tuple[Any, list[tuple[Tensor, Tensor]], torch.device] | None = None

    def load(self, device: torch.device) -> None:
        """Load CLIP's vision tower. What is not right is said before a weight is read.

        Raises:
            FileNotFoundError: no such model, or files of it are missing. ValueError: refused by
                the hub, another model, unreadable.
        """
        width = self.head[0][0].shape[1]
        self._expect(
            self._config.projection_dim == width,
            f"embeddings of {width}, which the head takes",
            self._config.projection_dim,
        )
        folder = fetch_files(
            self.model, self.revision, (*_CONFIG_FILES, "*.safetensors*"), _KEY, "transformers"
        )
        require_weights(folder, _KEY)
        weights: dict[str, Tensor] = {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, "pt") as file:  # the text tower's half is not read
                    weights |= {
                        name: file.get_tensor(name)
                        for name in self._shapes.keys() & set(file.keys())
                    }
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{_KEY}.model: expected readable safetensors in {folder}, got {error}"
            ) from error
        wrong = sorted(
            name
            for name, shape in self._shapes.items()
            if name not in weights or weights[name].shape != shape
        )
        self._expect(
            not wrong,
            "the tensors of its configuration",
            f"{len(wrong)} missing or of another shape: {', '.join(wrong[:3])}",
        )
        network = CLIPVisionModelWithProjection.from_pretrained(
            None,
            config=self._config,
            state_dict=weights,
            dtype=torch.float32,
            device_map={"": device},
        )
        self.loaded = (
            network.eval().requires_grad_(False),
            [(weight.to(device), bias.to(device)) for weight, bias in self.head],
            device,
        )

    @property
    def memory_bytes(self) -> int:
        """Bytes of the weights on the trainer's GPU; from config.json and the head alone."""
        return 4 * (
            sum(shape.numel() for shape in self._shapes.values())
            + sum(part.numel() for layer in self.head for part in layer)
        )

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {
                name: value.shape
                for name, value in CLIPVisionModelWithProjection(self._config).state_dict().items()
            }

    @cached_property
    def _folder(self) -> Path:
        return fetch_files(self.model, self.revision, _CONFIG_FILES, _KEY, "transformers")

    @cached_property
    def _config(self) -> CLIPVisionConfig:
        if not (self._folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{_KEY}.model: expected a CLIP in transformers' format, found no {self._folder / 'config.json'}"
            )
        try:
            config = AutoConfig.from_pretrained(self._folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{_KEY}.model: expected the configuration of a CLIP in {self._folder}, got {error}"
            ) from error
        self._expect(
            isinstance(config, CLIPConfig | CLIPVisionConfig), "model_type clip", config.model_type
        )
        if isinstance(config, CLIPVisionConfig):
            return config
        config.vision_config.projection_dim = (
            config.projection_dim
        )  # which the whole model's configuration holds beside its parts
        return config.vision_config

    def _expect(self, ok: bool, wanted: str, got: object) -> None:
        if not ok:
            raise ValueError(f"{_KEY}.model: expected {wanted}, in {self._folder}, got {got}")

    def describe(self) -> dict[str, Any]:
        """What decides the scores, as JSON: it is kept with them."""
        head = b"".join(part.numpy().tobytes() for layer in self.head for part in layer)
        return {
            "judge": "LAION aesthetic",
            "model": self.model,
            "revision": self.revision,
            "commit": None if Path(self.model).expanduser().is_dir() else self._folder.name,
            "head_sha256": hashlib.sha256(head).hexdigest(),
            "layers": len(self.head),
            "frames": self.frames,
            "transformers": transformers.__version__,
        }

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        """Scores [B, 1] float64 in [0, 1] and validity [B], as `rewards` and `components`."""
        raw, valid = self.components(videos, prompts, fps)
        return self.rewards(raw), valid

    def rewards(self, raw: Tensor) -> Tensor:
        """Scores [B, 1] float64 in [0, 1] of raw ones: a tenth, and 0 or 1 for those below 0 or
        above 10.
        """
        return (raw.double() / 10).clamp(0, 1)

    def components(
        self, videos: Tensor, prompts: Sequence[str], fps: float
    ) -> tuple[Tensor, Tensor]:
        """Raw scores [B, 1] float64, about 1 to 10, and validity [B], of videos [B, T, 3, H, W];
        captions and rate are not looked at.

        videos: uint8 or float in [0, 1]; one with a non-finite pixel, or score, is invalid and
        its row is 0.

        Raises:
            RuntimeError: not loaded. ValueError: another number of prompts than of videos, or a
                wrong shape, dtype or range.
        """
        if self.loaded is None:
            raise RuntimeError("expected load() before score()")
        return score_each(lambda video, _: self._one(video), 1, self.loaded[2], videos, prompts)

    def _one(self, video: Tensor) -> Tensor:
        """Raw score [] float32 of one video."""
        assert self.loaded is not None
        network, head, device = self.loaded
        frames = quantise(video, spread(len(video), min(self.frames or len(video), len(video))))
        hidden = normalize(
            network(clip_pixels(frames, network.config.image_size).to(device)).image_embeds, dim=-1
        )
        for weight, bias in head:
            hidden = linear(hidden, weight, bias)
        return hidden.mean()
