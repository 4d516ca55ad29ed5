"""Wan2.1 text-to-video, 1.3B and 14B: diffusers' transformer, VAE and pipeline, from a folder or
the hub (interfaces.Policy).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.utils import is_ftfy_available
from torch import Tensor
from torch.nn import functional as F
from transformers import UMT5EncoderModel

from fastgrpo.interfaces import Conditioning, Policy
from fastgrpo.policies import pretrained
from fastgrpo.policies.pretrained import LoRA, expect

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Wan's own: `sample_neg_prompt` in wan/configs/shared_config.py of
https://github.com/Wan-Video/Wan2.1 (Apache-2.0).
"""
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
"""Attention and feed-forward of a block."""


class WanPolicy(Policy):
    """Wan2.1-T2V (interfaces.Policy).

    Args:
        model: a folder in diffusers' format, or a hub id such as
            Wan-AI/Wan2.1-T2V-1.3B-Diffusers. revision: branch, tag or commit of a hub id. fps:
            frames per second of a video. negative_prompt: the text of the unconditional branch,
            which `encode` knows as "". max_sequence_length: tokens of a prompt; what is longer
            is cut off, as the pipeline does. Wan was trained with 512. text_cache: folder of the
            text embeddings. text_dtype: dtype of the text encoder; Wan's own is bf16. attention:
            a backend of diffusers (`native`: torch's own choice), or `fa3`, `fa4` where
            FlashAttention-3 or -4 is installed. fused: whether fastgrpo_kernels' operations do
            the blocks' pointwise work; auto: on a GPU with Triton. vae_dtype: dtype of the VAE.
            Wan's own is fp32; bf16 is several times faster. vae_tiling: decode in overlapping
            tiles, which takes less memory and blends their edges; without, the decode is exact.
            lora: train a LoRA instead of all weights.
    """

    transformer: WanTransformer3DModel
    """fp32; on the CPU after `load`."""
    is_fused: bool
    """Whether the fused operations are in, after `load`."""
    vae: AutoencoderKLWan

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        fps: int = 15,
        negative_prompt: str = NEGATIVE_PROMPT,
        max_sequence_length: int = 512,
        text_cache: str = "text_embeddings",
        text_dtype: Literal["fp32", "bf16"] = "bf16",
        attention: str = "native",
        fused: bool | Literal["auto"] = "auto",
        vae_dtype: Literal["fp32", "bf16"] = "fp32",
        vae_tiling: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        self.model = model
        self.revision = revision
        self.fps = fps
        self.negative_prompt = negative_prompt
        self.max_sequence_length = max_sequence_length
        self.text_cache = text_cache
        self.text_dtype = text_dtype
        self.attention = attention
        self.fused = fused
        self.vae_dtype = vae_dtype
        self.vae_tiling = vae_tiling
        self.lora = lora

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """[16, (T - 1) / 4 + 1, H / 8, W / 8]; needs the model's configuration files alone.

        ValueError: a size that the model cannot make. FileNotFoundError, ValueError: a model
        that cannot be had or is not Wan2.1-T2V.
        """
        transformer, vae = self._configs["transformer"], self._configs["vae"]
        compression = vae["scale_factor_temporal"], vae["scale_factor_spatial"]
        patch = transformer["patch_size"][0], transformer["patch_size"][1]
        return pretrained.latent_shape(height, width, num_frames, vae["z_dim"], compression, patch)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """ValueError for an empty prompt; a warning that counts those longer than
        `max_sequence_length`.
        """
        folder = pretrained.fetch(self.model, self.revision, pretrained.CONFIG_FILES)
        pretrained.warn_of_cut_prompts(prompts, folder / "tokenizer", self.max_sequence_length)

    def embed(self, prompts: Sequence[str], device: torch.device) -> None:
        """Make, once, the text embeddings of these prompts and of the negative one, all ranks
        together; then free the text encoder.
        """
        dtype = pretrained.DTYPES[self.text_dtype]
        pretrained.embed_texts(
            self._cache,
            [self._text(prompt) for prompt in ("", *prompts)],
            lambda: pretrained.load_text_pipeline(
                WanPipeline, self.model, self.revision, dtype, device
            ),
            lambda pipeline, text: encode_prompt(pipeline, text, self.max_sequence_length, device),
        )

    def load(self, device: torch.device) -> None:
        """Load the VAE onto `device` and the transformer, fp32 master weights, onto the CPU; both
        in eval mode.

        FileNotFoundError, ValueError: a model that is missing, gated, incompatible or
        unreadable; a LoRA or attention that cannot be had.
        """
        _ = self._configs
        folder = pretrained.fetch(self.model, self.revision, pretrained.NETWORK_FILES)
        transformer = pretrained.load_part(
            WanTransformer3DModel, folder, "transformer", torch.float32
        )
        vae = pretrained.load_part(
            AutoencoderKLWan, folder, "vae", pretrained.DTYPES[self.vae_dtype]
        )
        self.use(transformer, vae, device)

    def use(
        self, transformer: WanTransformer3DModel, vae: AutoencoderKLWan, device: torch.device
    ) -> None:
        """Take a network and a VAE that are already in memory, each in its dtype, instead of
        `load`.
        """
        self.is_fused = pretrained.prepare_transformer(
            transformer, device, self.lora, LORA_TARGETS, self.attention, self.fused
        )
        self.transformer = transformer
        self.vae = vae.eval().requires_grad_(False).to(device)
        if self.vae_tiling:
            self.vae.enable_tiling()
        self._device = device

    def load_meta(self) -> Conditioning:
        """What `dry_run.load_meta` does to a copy: networks without weights, from configuration
        files; one prompt's conditioning.
        """
        pretrained.use_meta(self, WanTransformer3DModel, AutoencoderKLWan)
        shape = 1, self.max_sequence_length, self.transformer.config.text_dim
        return {"encoder_hidden_states": torch.empty(shape, device="meta")}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """{"encoder_hidden_states": [B, max_sequence_length, 4096] fp32}, zero after a prompt's
        end; "" is the negative prompt.

        ValueError: a prompt without an embedding.
        """
        rows = [self._cache.get(self._text(prompt))["prompt_embeds"].float() for prompt in prompts]
        padded = torch.stack(
            [F.pad(row, (0, 0, 0, self.max_sequence_length - len(row))) for row in rows]
        )
        return {"encoder_hidden_states": padded.to(self._device)}

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """v [B, 16, T, H, W] for latents of that shape, fp32, and timesteps [B] (1000 sigma); one
        branch.
        """
        (velocity,) = self.transformer(
            hidden_states=latents, timestep=timesteps, return_dict=False, **conditioning
        )
        return velocity

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, T, 3, H, W] fp32 in [0, 1], one video after the other; latents scaled and
        shifted (in fp32) as WanPipeline does.
        """
        config = self.vae.config
        mean, std = (
            torch.tensor(row, device=latents.device)[:, None, None, None]
            for row in (config.latents_mean, config.latents_std)
        )
        inverse = 1.0 / std
        videos = (
            self.vae.decode((x / inverse + mean)[None].to(self.vae.dtype), return_dict=False)[0]
            for x in latents.float()
        )
        return torch.stack([pretrained.to_frames(video) for video in videos])

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write these weights of `transformer` for diffusers' `from_pretrained`, or those of its
        LoRA for `load_lora_weights`.
        """
        pretrained.save_transformer(self.transformer, WanPipeline, folder, weights)

    def describe_attention(
        self, latent_shape: Sequence[int], compute_dtype: torch.dtype, micro_batch_size: int = 1
    ) -> str:
        """What in fact serves self- and cross-attention at these sizes, for the log."""
        video = pretrained.tokens(latent_shape, self.transformer.config.patch_size)
        lengths = [(video, video), (video, self.max_sequence_length)]
        return pretrained.describe_attention(
            self.transformer, lengths, compute_dtype, self._device, micro_batch_size, masked=False
        )

    def _text(self, prompt: str) -> str:
        return prompt or self.negative_prompt

    @functools.cached_property
    def _cache(self) -> Any:
        settings = {
            "encoder": "WanPipeline.encode_prompt",
            "length": self.max_sequence_length,
            "dtype": self.text_dtype,
        }
        cleaning = "ftfy" if is_ftfy_available() else "without ftfy"
        return pretrained.open_cache(
            self.text_cache, self.model, self.revision, **settings, cleaning=cleaning
        )

    @functools.cached_property
    def _configs(self) -> dict[str, Any]:
        """Of the model's parts, which fit each other."""
        folder = pretrained.fetch(self.model, self.revision, pretrained.CONFIG_FILES)
        parts = {
            "transformer": WanTransformer3DModel,
            "vae": AutoencoderKLWan,
            "text_encoder": UMT5EncoderModel,
        }
        configs = pretrained.read_configs(folder, WanPipeline, parts)
        index, transformer, vae, text = (
            configs[name] for name in ("index", "transformer", "vae", "text_encoder")
        )
        second = (index.get("transformer_2") or [None])[0]
        expect(
            second is None and index.get("boundary_ratio") is None,
            folder,
            "Wan2.1's one transformer",
            "two of them (Wan2.2)",
        )
        expect(
            not index.get("expand_timesteps"),
            folder,
            "one time step a video",
            "one a token (Wan2.2 TI2V)",
        )
        expect(
            transformer["image_dim"] is None,
            folder,
            "a text-to-video transformer",
            "one that takes images too",
        )
        channels = transformer["in_channels"], transformer["out_channels"]
        expect(
            channels == (vae["z_dim"], vae["z_dim"]),
            folder,
            f"a transformer of the VAE's {vae['z_dim']} channels",
            f"{channels}",
        )
        statistics = len(vae["latents_mean"]), len(vae["latents_std"])
        expect(
            statistics == (vae["z_dim"], vae["z_dim"]),
            folder,
            f"latents_mean and latents_std of {vae['z_dim']} numbers",
            statistics,
        )
        width = text.hidden_size
        expect(
            transformer["text_dim"] == width,
            folder,
            f"a transformer of the text encoder's text_dim {width}",
            transformer["text_dim"],
        )
        return configs


def encode_prompt(
    pipeline: WanPipeline, text: str, max_sequence_length: int, device: torch.device
) -> dict[str, Tensor]:
    """{"prompt_embeds": [n, 4096]}: what WanPipeline makes of a text, without the zeros that it
    fills up with.
    """
    (embeds,), _ = pipeline.encode_prompt(
        text,
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
        device=device,
    )
    length = int(embeds.any(dim=1).nonzero().max()) + 1
    return {"prompt_embeds": embeds[:length]}
