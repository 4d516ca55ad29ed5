"""The codec of the embedded world: whole frames as 96 principal components and one global scale.

It takes the place of Wan's VAE. Clips [B, T, 3, 16, 16] become latents [B, 96, T, 1, 1]: channels
first, then frames, as Wan's are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgrpo.errors import UserError, require
from fastgrpo.shapes.render import SIZE

CODEC_FILE = "codec.safetensors"
LATENT_CHANNELS = 96
FRAME_DIM = 3 * SIZE * SIZE
_SHAPES = {"mean": (FRAME_DIM,), "components": (LATENT_CHANNELS, FRAME_DIM), "scale": (1,)}


@dataclass(frozen=True)
class Codec:
    """Principal components of frames whose pixels lie in [-1, 1].

    Attributes:
        mean: [768] fp32, the mean frame (channel, row, column flattened).
        components: [96, 768] fp32 with orthonormal rows, largest variance first.
        scale: [1] fp32. Latents are divided by it, so that their mean square over all channels
            is 1.
    """

    mean: Tensor
    components: Tensor
    scale: Tensor

    def encode(self, clips: Tensor) -> Tensor:
        """Latents [B, 96, T, 1, 1] fp32 of clips [B, T, 3, 16, 16], float in [0, 1]."""
        frames = 2.0 * clips.flatten(2) - 1.0
        latents = (frames - self.mean) @ self.components.T / self.scale
        return latents.transpose(1, 2)[..., None, None].contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Clips [B, T, 3, 16, 16] in [0, 1] of latents [B, 96, T, 1, 1]."""
        rows = latents.float().flatten(2).transpose(1, 2).contiguous() * self.scale
        frames = rows.new_empty(*rows.shape[:2], FRAME_DIM)
        # One matrix product per clip gives a clip the same bits alone and in any batch.
        for frame, row in zip(frames, rows, strict=True):
            frame[:] = row @ self.components
        pixels = (frames + self.mean + 1.0) / 2.0
        return pixels.reshape(*rows.shape[:2], 3, SIZE, SIZE).clamp(0.0, 1.0)

    def to(self, device: torch.device) -> Codec:
        """The same codec on another device."""
        return Codec(self.mean.to(device), self.components.to(device), self.scale.to(device))

    def save(self, path: Path) -> None:
        """Write the three tensors as safetensors."""
        save_file({name: getattr(self, name).contiguous() for name in _SHAPES}, path)


def fit_codec(clips: Tensor) -> Codec:
    """Fit a codec to clips [B, T, 3, 16, 16], float in [0, 1]: PCA in float64 of all frames."""
    frames = (2.0 * clips.double() - 1.0).reshape(-1, FRAME_DIM)
    mean = frames.mean(dim=0)
    values, vectors = torch.linalg.eigh((frames - mean).T @ (frames - mean) / len(frames))
    components = vectors[:, -LATENT_CHANNELS:].flip(1).T
    # A component's sign is arbitrary: make its largest entry positive.
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    scale = (values[-LATENT_CHANNELS:].sum() / LATENT_CHANNELS).sqrt()
    return Codec(mean.float(), (components * largest.sign()).float(), scale.float().reshape(1))


def load_codec(path: Path) -> Codec:
    """Read a codec from a safetensors file.

    Raises:
        FileNotFoundError: The file is missing.
        UserError: It is unreadable, or a tensor is missing or has another shape.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the codec of the embedded world, found no file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: expected a readable safetensors file, got {error}") from error
    got = {name: tuple(tensors[name].shape) for name in _SHAPES if name in tensors}
    require(got == _SHAPES, str(path), f"tensors of the shapes {_SHAPES}", got)
    return Codec(**{name: tensors[name].float() for name in _SHAPES})
