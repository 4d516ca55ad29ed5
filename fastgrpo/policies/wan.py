"""Wan2.1 text-to-video, 1.3B and 14B."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.errors import require
from fastgrpo.interfaces import Conditioning
from fastgrpo.policies.pretrained import Compression, DiffusersPolicy

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Wan's own: `sample_neg_prompt` in wan/configs/shared_config.py of
https://github.com/Wan-Video/Wan2.1 (Apache-2.0).
"""


@dataclass(eq=False)
class WanPolicy(DiffusersPolicy):
    """Wan2.1-T2V, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers.

    Wan was trained with prompts of 512 tokens. Its own text encoder is bf16 and its own VAE fp32;
    a bf16 VAE is several times faster.
    """

    negative_prompt: str = NEGATIVE_PROMPT
    """The text of the unconditional branch, which `encode` knows as ""."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    @property
    def pipeline_class(self) -> Any:
        from diffusers import WanPipeline

        return WanPipeline

    @property
    def part_classes(self) -> dict[str, Any]:
        from diffusers import AutoencoderKLWan, WanTransformer3DModel
        from transformers import UMT5EncoderModel

        return {
            "transformer": WanTransformer3DModel,
            "vae": AutoencoderKLWan,
            "text_encoder": UMT5EncoderModel,
        }

    def compression(self) -> Compression:
        transformer, vae = self.configs["transformer"], self.configs["vae"]
        time, space = vae["scale_factor_temporal"], vae["scale_factor_spatial"]
        return Compression(vae["z_dim"], time, space, transformer["patch_size"])

    def load_meta(self) -> Conditioning:
        super().load_meta()
        shape = 1, self.max_sequence_length, self.transformer.config.text_dim
        return {"encoder_hidden_states": torch.empty(shape, device="meta")}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """{"encoder_hidden_states": [B, max_sequence_length, 4096] fp32}, zero after a prompt's
        end; "" is the negative prompt.
        """
        rows = [self.cache.get(self.text_of(prompt))["prompt_embeds"] for prompt in prompts]
        return {"encoder_hidden_states": self.padded(rows)}

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        (velocity,) = self.transformer(
            hidden_states=latents, timestep=timesteps, return_dict=False, **conditioning
        )
        return velocity

    def use(self, transformer: Any, vae: Any, device: torch.device) -> None:
        super().use(transformer, vae, device)
        # On the device once: a copy per video would let the host wait for the sampling before it.
        self._latents_mean, std = (
            torch.tensor(row, device=device)[:, None, None, None]
            for row in (vae.config.latents_mean, vae.config.latents_std)
        )
        self._inverse_std = 1.0 / std

    def unscale(self, latents: Tensor) -> Tensor:
        """Scaled and shifted as WanPipeline does."""
        return latents / self._inverse_std + self._latents_mean

    def attention_lengths(self, num_tokens: int) -> list[tuple[int, int]]:
        """Self- and cross-attention."""
        return [(num_tokens, num_tokens), (num_tokens, self.max_sequence_length)]

    def encode_prompt(self, pipeline: Any, text: str, device: torch.device) -> dict[str, Tensor]:
        """{"prompt_embeds": [n, 4096]}, without the zeros that the pipeline fills up with."""
        (embeds,), _ = pipeline.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=device,
        )
        length = int(embeds.any(dim=1).nonzero().max()) + 1
        return {"prompt_embeds": embeds[:length]}

    def text_of(self, prompt: str) -> str:
        return prompt or self.negative_prompt

    def cleaning(self) -> dict[str, str]:
        """The pipeline cleans prompts with ftfy where that is installed."""
        from diffusers.utils import is_ftfy_available

        return {"cleaning": "ftfy" if is_ftfy_available() else "without ftfy"}

    def check_configs(self, folder: Path, configs: dict[str, Any]) -> None:
        key = f"policy.model: {folder}"
        index, transformer, vae = configs["index"], configs["transformer"], configs["vae"]
        second = (index.get("transformer_2") or [None])[0] or index.get("boundary_ratio")
        require(second is None, key, "Wan2.1's one transformer", "two of them (Wan2.2)")
        per_token = index.get("expand_timesteps")
        require(not per_token, key, "one time step per video", "one per token (Wan2.2 TI2V)")
        image_dim = transformer["image_dim"]
        require(image_dim is None, key, "a text-to-video transformer", f"image_dim {image_dim}")
        channels = vae["z_dim"]
        got = {
            "in_channels": transformer["in_channels"],
            "out_channels": transformer["out_channels"],
            "latents_mean": len(vae["latents_mean"]),
            "latents_std": len(vae["latents_std"]),
        }
        expected = dict.fromkeys(got, channels)
        require(got == expected, key, f"the VAE's {channels} channels everywhere", got)
        width, text_dim = configs["text_encoder"].hidden_size, transformer["text_dim"]
        require(text_dim == width, key, f"the text encoder's text_dim {width}", text_dim)
