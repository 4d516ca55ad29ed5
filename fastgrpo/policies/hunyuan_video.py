"""HunyuanVideo text-to-video: diffusers' transformer, VAE and pipeline, from a folder or the hub
(interfaces.Policy).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, LlamaModel

from fastgrpo.interfaces import Conditioning, Policy
from fastgrpo.policies import pretrained
from fastgrpo.policies.pretrained import LoRA, expect

LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
)
"""Attention and feed-forward of the dual- and the single-stream blocks (proj_out ends both in a
single-stream one).
"""
_ARGUMENTS = (
    "hidden_states",
    "timestep",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "pooled_projections",
    "guidance",
)
"""Of HunyuanVideoTransformer3DModel.forward, the first ones in their order."""


class HunyuanVideoPolicy(Policy):
    """HunyuanVideo (interfaces.Policy). Guidance is embedded: one forward a step where
    `rollout.guidance_scale` is 1, as it should be.

    Any other value of it, its default of 5 too, adds classifier-free guidance against the empty
    prompt, as diffusers' true_cfg_scale does.

    Args:
        model: a folder in diffusers' format, or a hub id such as
            hunyuanvideo-community/HunyuanVideo. revision: branch, tag or commit of a hub id.
            fps: frames per second of a video. embedded_guidance: the guidance scale that the
            network was distilled to take as an input; it sees 1000 times this.
            max_sequence_length: tokens of a prompt; what is longer is cut off, as the pipeline
            does. text_cache: folder of the text embeddings. text_dtype: dtype of the text
            encoders. attention: a backend of diffusers (`native`: torch's own choice), or `fa3`,
            `fa4` where FlashAttention-3 or -4 is installed. fused: whether fastgrpo_kernels'
            operations do the blocks' pointwise work; auto: on a GPU with Triton. vae_dtype:
            dtype of the VAE. vae_tiling: decode in overlapping tiles of space and time, as
            diffusers' pipeline does after `vae.enable_tiling()`; it takes less memory and blends
            their edges. Without, the decode is exact; diffusers' own default blends in time. The
            VAE's attention makes a mask of tokens x tokens: 2 GB at 53 frames of 240 x 416, 30
            GB at 480 x 832. lora: train a LoRA instead of all weights.
    """

    transformer: HunyuanVideoTransformer3DModel
    """fp32; on the CPU after `load`."""
    is_fused: bool
    """Whether the fused operations are in, after `load`."""
    vae: AutoencoderKLHunyuanVideo

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        fps: int = 15,
        embedded_guidance: float = 6.0,
        max_sequence_length: int = 256,
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
        self.embedded_guidance = embedded_guidance
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
        that cannot be had or is not HunyuanVideo.
        """
        transformer, vae = self._configs["transformer"], self._configs["vae"]
        compression = vae["temporal_compression_ratio"], vae["spatial_compression_ratio"]
        patch = transformer["patch_size_t"], transformer["patch_size"]
        return pretrained.latent_shape(
            height, width, num_frames, vae["latent_channels"], compression, patch
        )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """ValueError for an empty prompt; a warning that counts those longer than
        `max_sequence_length`.
        """
        folder = pretrained.fetch(self.model, self.revision, pretrained.CONFIG_FILES)
        limit = self.max_sequence_length + DEFAULT_PROMPT_TEMPLATE["crop_start"]
        pretrained.warn_of_cut_prompts(
            prompts, folder / "tokenizer", limit, DEFAULT_PROMPT_TEMPLATE["template"]
        )

    def embed(self, prompts: Sequence[str], device: torch.device) -> None:
        """Make, once, the text embeddings of these prompts and of the empty one, all ranks
        together; then free the text encoders.
        """
        dtype = pretrained.DTYPES[self.text_dtype]
        pretrained.embed_texts(
            self._cache,
            ["", *prompts],
            lambda: pretrained.load_text_pipeline(
                HunyuanVideoPipeline, self.model, self.revision, dtype, device
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
            HunyuanVideoTransformer3DModel, folder, "transformer", torch.float32
        )
        vae = pretrained.load_part(
            AutoencoderKLHunyuanVideo, folder, "vae", pretrained.DTYPES[self.vae_dtype]
        )
        self.use(transformer, vae, device)

    def use(
        self,
        transformer: HunyuanVideoTransformer3DModel,
        vae: AutoencoderKLHunyuanVideo,
        device: torch.device,
    ) -> None:
        """Take a network and a VAE that are already in memory, each in its dtype, instead of
        `load`.
        """
        self.is_fused = pretrained.prepare_transformer(
            transformer, device, self.lora, LORA_TARGETS, self.attention, self.fused
        )
        attend_without_mask(transformer)
        self.transformer = transformer
        self.vae = vae.eval().requires_grad_(False).to(device)
        self.vae.use_framewise_decoding = self.vae_tiling
        if self.vae_tiling:
            self.vae.enable_tiling()
        self._device = device

    def load_meta(self) -> Conditioning:
        """What `dry_run.load_meta` does to a copy: networks without weights, from configuration
        files; one prompt's conditioning.
        """
        pretrained.use_meta(self, HunyuanVideoTransformer3DModel, AutoencoderKLHunyuanVideo)
        # `_cut_text` reads the text's length; here it has the greatest
        self.transformer._forward_pre_hooks.clear()
        config, length = self.transformer.config, self.max_sequence_length
        return {
            "encoder_hidden_states": torch.empty(1, length, config.text_embed_dim, device="meta"),
            "encoder_attention_mask": torch.empty(1, length, device="meta"),
            "pooled_projections": torch.empty(1, config.pooled_projection_dim, device="meta"),
        }

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Llama's states [B, max_sequence_length, 4096] and their mask, CLIP's pooled state [B,
        768]; fp32, named as the network has them.

        The empty prompt is encoded as any other. ValueError: a prompt without an embedding.
        """
        rows = [self._cache.get(prompt) for prompt in prompts]
        lengths = torch.tensor([len(row["prompt_embeds"]) for row in rows])
        states = [
            F.pad(
                row["prompt_embeds"].float(),
                (0, 0, 0, self.max_sequence_length - len(row["prompt_embeds"])),
            )
            for row in rows
        ]
        conditioning = {
            "encoder_hidden_states": torch.stack(states),
            "encoder_attention_mask": (
                torch.arange(self.max_sequence_length) < lengths[:, None]
            ).float(),
            "pooled_projections": torch.stack(
                [row["pooled_prompt_embeds"].float() for row in rows]
            ),
        }
        return {name: tensor.to(self._device) for name, tensor in conditioning.items()}

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """v [B, 16, T, H, W] for latents of that shape, fp32, and timesteps [B] (1000 sigma).

        One video alone attends without a mask, see `attend_without_mask`; several at a time keep
        the padding and the mask.
        """
        guidance = latents.new_full((len(latents),), 1000.0 * self.embedded_guidance)
        (velocity,) = self.transformer(
            hidden_states=latents,
            timestep=timesteps,
            guidance=guidance,
            return_dict=False,
            **conditioning,
        )
        return velocity

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, T, 3, H, W] fp32 in [0, 1], one video after the other; latents divided (in
        fp32) by the VAE's scaling factor.
        """
        unscaled = latents.float() / self.vae.config.scaling_factor
        videos = (
            self.vae.decode(x[None].to(self.vae.dtype), return_dict=False)[0] for x in unscaled
        )
        return torch.stack([pretrained.to_frames(video) for video in videos])

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write these weights of `transformer` for diffusers' `from_pretrained`, or those of its
        LoRA for `load_lora_weights`.
        """
        pretrained.save_transformer(self.transformer, HunyuanVideoPipeline, folder, weights)

    def describe_attention(
        self, latent_shape: Sequence[int], compute_dtype: torch.dtype, micro_batch_size: int = 1
    ) -> str:
        """What in fact serves the joint attention at these sizes (with the longest text), for the
        log.
        """
        config, masked = self.transformer.config, micro_batch_size > 1
        tokens = (
            pretrained.tokens(
                latent_shape, (config.patch_size_t, config.patch_size, config.patch_size)
            )
            + self.max_sequence_length
        )
        return pretrained.describe_attention(
            self.transformer,
            [(tokens, tokens)],
            compute_dtype,
            self._device,
            micro_batch_size,
            masked,
        )

    @functools.cached_property
    def _cache(self) -> Any:
        settings = {
            "encoder": "HunyuanVideoPipeline.encode_prompt",
            "length": self.max_sequence_length,
            "dtype": self.text_dtype,
        }
        return pretrained.open_cache(self.text_cache, self.model, self.revision, **settings)

    @functools.cached_property
    def _configs(self) -> dict[str, Any]:
        """Of the model's parts, which fit each other."""
        folder = pretrained.fetch(self.model, self.revision, pretrained.CONFIG_FILES)
        parts: dict[str, type] = {
            "transformer": HunyuanVideoTransformer3DModel,
            "vae": AutoencoderKLHunyuanVideo,
        }
        parts |= {"text_encoder": LlamaModel, "text_encoder_2": CLIPTextModel}
        configs = pretrained.read_configs(folder, HunyuanVideoPipeline, parts)
        transformer, channels = configs["transformer"], configs["vae"]["latent_channels"]
        expect(
            transformer["image_condition_type"] is None,
            folder,
            "a text-to-video transformer",
            "one that takes images too",
        )
        expect(
            bool(transformer["guidance_embeds"]),
            folder,
            "a transformer with embedded guidance (guidance_embeds)",
            "one without",
        )
        sizes = {
            "in_channels": channels,
            "out_channels": channels,
            "text_embed_dim": configs["text_encoder"].hidden_size,
        }
        for key, size in (
            sizes | {"pooled_projection_dim": configs["text_encoder_2"].hidden_size}
        ).items():
            expect(
                transformer[key] == size,
                folder,
                f"a transformer of {key} {size}, as its VAE and text encoders have it",
                transformer[key],
            )
        return configs


def encode_prompt(
    pipeline: HunyuanVideoPipeline, text: str, max_sequence_length: int, device: torch.device
) -> dict[str, Tensor]:
    """{"prompt_embeds": [n, 4096], "pooled_prompt_embeds": [768]}: what the pipeline makes of a
    text, cut to its own length.

    ValueError: a tokenizer that pads on the left, so that the text is not at the beginning.
    """
    with (
        pretrained.quiet_diffusers()
    ):  # CLIP sees 77 tokens by design, and the pipeline says so for every longer prompt
        (embeds,), (pooled,), (mask,) = pipeline.encode_prompt(
            text, max_sequence_length=max_sequence_length, device=device
        )
    length = int(mask.sum())
    if not mask[:length].all():
        raise ValueError(
            "policy.model: expected a tokenizer that pads on the right, got one that pads on the left"
        )
    return {"prompt_embeds": embeds[:length], "pooled_prompt_embeds": pooled}


def attend_without_mask(transformer: Any) -> None:
    """Make the transformer cut the text of one video alone to its own length, and its blocks then
    attend without a mask, in place.

    It is the same function, and any attention kernel can serve it. Whoever calls the
    transformer, with whatever padding, gets this.
    """
    transformer.register_forward_pre_hook(_cut_text, with_kwargs=True)
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        block.register_forward_pre_hook(_drop_mask)


def _cut_text(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    named = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    if len(named["hidden_states"]) == 1:
        valid = named["encoder_attention_mask"][0] > 0
        end = valid.nonzero().max() + 1
        length, last = torch.stack(
            [valid.sum(), end]
        ).tolist()  # the host waits here, once a forward
        if length != last:
            raise ValueError(
                f"expected a text that is padded at its end, got {length} tokens of which the last is at {last - 1}"
            )
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            named[name] = named[name][:, :length]
    return (), named


def _drop_mask(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # By the arguments alone: a checkpointed block runs again in the backward, when nothing else is
    # known.
    hidden_states, text, temb, mask, *rest = args
    return (hidden_states, text, temb, None if len(hidden_states) == 1 else mask, *rest)
