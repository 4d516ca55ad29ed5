"""The tiny generator of the embedded world: diffusers' own WanTransformer3DModel, 0.77 M
parameters, over the frame codec's latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from torch import Tensor

from fastgrpo.interfaces import Conditioning, Policy
from fastgrpo.shapes.captions import TOKEN_DIM, parse_caption, text_tokens
from fastgrpo.shapes.codec import CODEC_FILE, LATENT_CHANNELS, Codec, load_codec
from fastgrpo.shapes.render import NUM_FRAMES, SIZE

SHIPPED_CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"
_POSITION_CHANNELS = 2


def new_transformer() -> WanTransformer3DModel:
    """An untrained network of the embedded world's size."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS + _POSITION_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TOKEN_DIM,
        freq_dim=64,
        ffn_dim=256,
        num_layers=3,
        rope_max_seq_len=32,
    )


def frame_positions() -> Tensor:
    """[2, T, 1, 1] fp32: cosine and sine of each frame's place in the clip, a half turn over all
    frames.

    Wan's rotary embedding knows only distances between frames, from which the direction of
    motion is not learned; hence these two input channels.
    """
    angle = math.pi * (torch.arange(NUM_FRAMES) + 0.5) / NUM_FRAMES
    return torch.stack([angle.cos(), angle.sin()])[:, :, None, None]


class ShapesPolicy(Policy):
    """The generator of the embedded world (interfaces.Policy).

    Args:
        checkpoint: a folder as `fastgrpo.shapes.pretrain` writes it (`transformer/` and
            `codec.safetensors`), or a folder that `save_pretrained` wrote (the transformer
            alone), which goes with the shipped codec. None is the shipped checkpoint.
    """

    transformer: WanTransformer3DModel
    fps: int = 4

    def __init__(self, checkpoint: str | None = None) -> None:
        self.checkpoint = checkpoint
        self._codec: Codec
        self._positions: Tensor

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """(96, 8, 1, 1). ValueError for anything but 8 frames of 16 x 16, which is all the codec
        knows.
        """
        if (height, width, num_frames) != (SIZE, SIZE, NUM_FRAMES):
            raise ValueError(
                f"the embedded world makes height {SIZE}, width {SIZE}, num_frames {NUM_FRAMES} only, "
                f"got height {height}, width {width}, num_frames {num_frames}"
            )
        return (LATENT_CHANNELS, NUM_FRAMES, 1, 1)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """ValueError for the first prompt outside the grammar."""
        for prompt in prompts:
            parse_caption(prompt)

    def embed(self, prompts: Sequence[str], device: torch.device) -> None:
        """Nothing to make: captions are turned into tokens by a table."""

    def load(self, device: torch.device) -> None:
        """Load transformer and codec onto `device`, in eval mode. FileNotFoundError or ValueError
        say what is missing or wrong.
        """
        folder = SHIPPED_CHECKPOINT if self.checkpoint is None else Path(self.checkpoint)
        if not folder.is_dir():
            raise FileNotFoundError(f"policy.checkpoint: expected a folder, found none at {folder}")
        weights = folder / "transformer" if (folder / "transformer").is_dir() else folder
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            if not (weights / name).is_file():
                raise FileNotFoundError(
                    f"policy.checkpoint: expected {name} of a WanTransformer3DModel in {weights}, found none"
                )
        try:
            transformer = WanTransformer3DModel.from_pretrained(weights, torch_dtype=torch.float32)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"policy.checkpoint: expected a readable WanTransformer3DModel in {weights}, got {error}"
            ) from error
        for key, expected in (
            ("in_channels", LATENT_CHANNELS + _POSITION_CHANNELS),
            ("out_channels", LATENT_CHANNELS),
            ("text_dim", TOKEN_DIM),
        ):
            if transformer.config[key] != expected:
                raise ValueError(
                    f"policy.checkpoint: expected {key} {expected} in {weights}, got {transformer.config[key]}"
                )
        codec_file = folder / CODEC_FILE
        codec = load_codec(codec_file if codec_file.is_file() else SHIPPED_CHECKPOINT / CODEC_FILE)
        self.use(transformer, codec, device)

    def load_meta(self) -> Conditioning:
        """What `dry_run.load_meta` does to a copy: the networks, which ship with their weights, on
        the meta device; a conditioning.
        """
        self.load(torch.device("cpu"))
        conditioning = self.encode([""])
        self.use(self.transformer, self._codec, torch.device("meta"))
        return conditioning

    def use(self, transformer: WanTransformer3DModel, codec: Codec, device: torch.device) -> None:
        """Take a network and a codec that are already in memory, instead of `load`."""
        self.transformer = transformer.to(device).eval()
        self._codec = codec.to(device)
        self._positions = frame_positions().to(device)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """{"encoder_hidden_states": [B, 3, 32] fp32}; the empty prompt "" is all zeros. ValueError
        for a prompt outside the grammar.
        """
        return {"encoder_hidden_states": text_tokens(prompts).to(self._positions.device)}

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """v [B, 96, 8, 1, 1] for latents of that shape and timesteps [B] (1000 sigma)."""
        positions = self._positions.to(latents.dtype).expand(len(latents), -1, -1, -1, -1)
        hidden_states = torch.cat([latents, positions], dim=1)
        (velocity,) = self.transformer(
            hidden_states=hidden_states, timestep=timesteps, return_dict=False, **conditioning
        )
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, 8, 3, 16, 16] fp32 in [0, 1] of latents [B, 96, 8, 1, 1]; a frame's bits do
        not depend on the batch.
        """
        return self._codec.decode(latents)

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write these weights of `transformer`: for `WanTransformer3DModel.from_pretrained(folder)`
        and for `ShapesPolicy(folder)`.
        """
        with torch.device("meta"):
            whole = WanTransformer3DModel.from_config(self.transformer.config)
        whole.load_state_dict(weights, assign=True)
        whole.save_pretrained(folder)
