"""The tiny generator of the embedded world: diffusers' own WanTransformer3DModel, 0.77 M
parameters, over the frame codec's latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastgrpo.errors import UserError, require
from fastgrpo.interfaces import Conditioning, Policy
from fastgrpo.policies.fused import fuse
from fastgrpo.shapes.captions import TOKEN_DIM, parse_caption, text_tokens
from fastgrpo.shapes.codec import CODEC_FILE, LATENT_CHANNELS, Codec, load_codec
from fastgrpo.shapes.render import NUM_FRAMES, SIZE

SHIPPED_CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"
_POSITION_CHANNELS = 2


def new_transformer() -> Any:
    """An untrained network, a WanTransformer3DModel, of the embedded world's size."""
    from diffusers import WanTransformer3DModel

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
    """[2, T, 1, 1] fp32: cosine and sine of each frame's position in the clip, a half turn over
    all frames.

    Wan's rotary embedding knows only distances between frames, from which the direction of motion
    cannot be learned. Hence these two input channels.
    """
    angle = math.pi * (torch.arange(NUM_FRAMES) + 0.5) / NUM_FRAMES
    return torch.stack([angle.cos(), angle.sin()])[:, :, None, None]


class ShapesPolicy(Policy):
    """The generator of the embedded world.

    Args:
        checkpoint: A folder that `fastgrpo.shapes.pretrain` wrote (`transformer/` and
            `codec.safetensors`), or one that `save_pretrained` wrote (only a transformer), which
            goes with the shipped codec. None is the shipped checkpoint.
        fused: Whether the operations of fastgrpo_kernels do the blocks' pointwise work; auto: where
            they are compiled, on a GPU with Triton and on a CPU with csrc/.
    """

    transformer: Any
    fps: int = 4

    def __init__(
        self, checkpoint: str | None = None, fused: bool | Literal["auto"] = "auto"
    ) -> None:
        self.checkpoint = checkpoint
        self.fused = fused
        self.is_fused: bool
        self._codec: Codec
        self._positions: Tensor

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """(96, 8, 1, 1); the codec knows no size but 8 frames of 16 x 16."""
        expected, got = (
            f"height {h}, width {w}, num_frames {t}"
            for h, w, t in ((SIZE, SIZE, NUM_FRAMES), (height, width, num_frames))
        )
        require(expected == got, "ShapesPolicy", expected, got)
        return (LATENT_CHANNELS, NUM_FRAMES, 1, 1)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse a prompt outside the grammar."""
        for prompt in prompts:
            parse_caption(prompt)

    def load(self, device: torch.device) -> None:
        """Load transformer and codec onto `device`, in eval mode."""
        from diffusers import WanTransformer3DModel

        folder = SHIPPED_CHECKPOINT if self.checkpoint is None else Path(self.checkpoint)
        if not folder.is_dir():
            raise FileNotFoundError(f"policy.checkpoint: expected a folder, found none at {folder}")
        weights = folder / "transformer" if (folder / "transformer").is_dir() else folder
        try:
            transformer = WanTransformer3DModel.from_pretrained(weights, torch_dtype=torch.float32)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"policy.checkpoint: expected a readable WanTransformer3DModel in {weights}, "
                f"got {error}"
            ) from error
        expected = {
            "in_channels": LATENT_CHANNELS + _POSITION_CHANNELS,
            "out_channels": LATENT_CHANNELS,
            "text_dim": TOKEN_DIM,
        }
        got = {key: transformer.config[key] for key in expected}
        require(got == expected, f"policy.checkpoint: {weights}", str(expected), got)
        codec_file = folder / CODEC_FILE
        codec = load_codec(codec_file if codec_file.is_file() else SHIPPED_CHECKPOINT / CODEC_FILE)
        self.use(transformer, codec, device)

    def load_meta(self) -> Conditioning:
        """As `Policy.load_meta`; the networks ship with their weights, which are read."""
        self.load(torch.device("cpu"))
        conditioning = self.encode([""])
        self.use(self.transformer, self._codec, torch.device("meta"))
        return conditioning

    def use(self, transformer: Any, codec: Codec, device: torch.device) -> None:
        """Take a network and a codec that are already in memory, instead of `load`."""
        self.transformer = transformer.to(device).eval()
        self.is_fused = fuse(self.transformer, self.fused, device)
        self._codec = codec.to(device)
        self._positions = frame_positions().to(device)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """{"encoder_hidden_states": [B, 3, 32] fp32}; all zeros for the empty prompt ""."""
        return {"encoder_hidden_states": text_tokens(prompts).to(self._positions.device)}

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """v [B, 96, 8, 1, 1] for latents of that shape and timesteps [B]."""
        positions = self._positions.to(latents.dtype).expand(len(latents), -1, -1, -1, -1)
        hidden_states = torch.cat([latents, positions], dim=1)
        (velocity,) = self.transformer(
            hidden_states=hidden_states, timestep=timesteps, return_dict=False, **conditioning
        )
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, 8, 3, 16, 16] fp32 in [0, 1] of latents [B, 96, 8, 1, 1]."""
        return self._codec.decode(latents)

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write these weights for `WanTransformer3DModel.from_pretrained(folder)` and for
        `ShapesPolicy(folder)`.
        """
        from diffusers import WanTransformer3DModel

        with torch.device("meta"):
            whole = WanTransformer3DModel.from_config(self.transformer.config)
        whole.load_state_dict(weights, assign=True)
        whole.save_pretrained(folder)
