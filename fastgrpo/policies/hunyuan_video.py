"""HunyuanVideo text-to-video."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.distributed.collectives import CPU
from fastgrpo.errors import require
from fastgrpo.interfaces import Conditioning
from fastgrpo.policies.model_files import quiet_diffusers
from fastgrpo.policies.pretrained import Compression, DiffusersPolicy

_ARGUMENTS = (
    "hidden_states",
    "timestep",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "pooled_projections",
    "guidance",
)
"""The first arguments of HunyuanVideoTransformer3DModel.forward, in their order."""


@dataclass(eq=False)
class HunyuanVideoPolicy(DiffusersPolicy):
    """HunyuanVideo, such as hunyuanvideo-community/HunyuanVideo.

    Guidance is embedded: with `rollout.guidance_scale` 1, as it should be, a step is one forward
    pass. Any other value, also its default of 5, adds classifier-free guidance against the empty
    prompt, as diffusers' true_cfg_scale does.

    `vae_tiling` tiles space and time, as diffusers' pipeline does after `vae.enable_tiling()`.
    Without it the decode is exact, where diffusers' default blends in time. The VAE's attention
    makes a mask of tokens x tokens: 2 GB at 53 frames of 240 x 416, 30 GB at 480 x 832.
    """

    max_sequence_length: int = 256
    embedded_guidance: float = 6.0
    """The guidance scale that the network was distilled to take as an input, which is 1000 times
    this.
    """

    # Attention and feed-forward of the dual-stream blocks, then of the single-stream ones, where
    # proj_out ends both.
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("proj_mlp", "proj_out"),
    )
    attends_with_mask = True

    @property
    def pipeline_class(self) -> Any:
        from diffusers import HunyuanVideoPipeline

        return HunyuanVideoPipeline

    @property
    def part_classes(self) -> dict[str, Any]:
        from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
        from transformers import CLIPTextModel, LlamaModel

        return {
            "transformer": HunyuanVideoTransformer3DModel,
            "vae": AutoencoderKLHunyuanVideo,
            "text_encoder": LlamaModel,
            "text_encoder_2": CLIPTextModel,
        }

    @property
    def prompt_template(self) -> str:
        return str(self._template["template"])

    @property
    def template_length(self) -> int:
        return int(self._template["crop_start"])

    @property
    def _template(self) -> dict[str, Any]:
        from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video

        return dict(pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE)

    def compression(self) -> Compression:
        transformer, vae = self.configs["transformer"], self.configs["vae"]
        time, space = vae["temporal_compression_ratio"], vae["spatial_compression_ratio"]
        patch = transformer["patch_size_t"], transformer["patch_size"], transformer["patch_size"]
        return Compression(vae["latent_channels"], time, space, patch)

    def use(self, transformer: Any, vae: Any, device: torch.device) -> None:
        super().use(transformer, vae, device)
        attend_without_mask(transformer)
        self.cuts_text = True
        vae.use_framewise_decoding = self.vae_tiling

    def load_meta(self) -> Conditioning:
        super().load_meta()
        config, length = self.transformer.config, self.max_sequence_length
        return {
            "encoder_hidden_states": torch.empty(1, length, config.text_embed_dim, device="meta"),
            "encoder_attention_mask": torch.empty(1, length, device="meta"),
            "pooled_projections": torch.empty(1, config.pooled_projection_dim, device="meta"),
        }

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Llama's states [B, max_sequence_length, 4096] and their mask [B, max_sequence_length],
        CLIP's pooled state [B, 768]; fp32. The empty prompt is encoded as any other. The mask stays
        on the host, where `velocity` reads how long the texts are.
        """
        rows = [self.cache.get(prompt) for prompt in prompts]
        states = [row["prompt_embeds"] for row in rows]
        pooled = torch.stack([row["pooled_prompt_embeds"].float() for row in rows])
        return {
            "encoder_hidden_states": self.padded(states),
            "encoder_attention_mask": torch.stack(
                [_ones_before(len(x), self.max_sequence_length, CPU) for x in states]
            ),
            "pooled_projections": pooled.to(self._device),
        }

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """As `Policy.velocity`. One video attends without a mask, see `attend_without_mask`;
        several at a time keep the padding and the mask.
        """
        states = conditioning["encoder_hidden_states"]
        num_tokens, mask = states.shape[1], None
        # `plan` counts texts of the greatest length.
        lengths = [
            num_tokens if row.is_meta else _text_length(row)
            for row in conditioning["encoder_attention_mask"]
        ]
        if len(latents) == 1 and self.cuts_text:
            states = states[:, : lengths[0]]
        else:
            # Made on the device: the host would wait for a copy.
            rows = [_ones_before(length, num_tokens, states.device) for length in lengths]
            mask = torch.stack(rows)
        (velocity,) = self.transformer(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            pooled_projections=conditioning["pooled_projections"],
            guidance=latents.new_full((len(latents),), 1000.0 * self.embedded_guidance),
            return_dict=False,
        )
        return velocity

    def unscale(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor

    def attention_lengths(self, num_tokens: int) -> list[tuple[int, int]]:
        """The joint attention, with the longest text."""
        length = num_tokens + self.max_sequence_length
        return [(length, length)]

    def encode_prompt(self, pipeline: Any, text: str, device: torch.device) -> dict[str, Tensor]:
        """{"prompt_embeds": [n, 4096], "pooled_prompt_embeds": [768]}."""
        with quiet_diffusers():  # CLIP sees 77 tokens by design; the pipeline warns of every prompt
            (embeds,), (pooled,), (mask,) = pipeline.encode_prompt(
                text, max_sequence_length=self.max_sequence_length, device=device
            )
        length = int(mask.sum())
        is_first = bool(mask[:length].all())
        require(
            is_first, "policy.model", "a tokenizer that pads on the right", "padding on the left"
        )
        return {"prompt_embeds": embeds[:length], "pooled_prompt_embeds": pooled}

    def check_configs(self, folder: Path, configs: dict[str, Any]) -> None:
        key, transformer = f"policy.model: {folder}", configs["transformer"]
        kind, guided = transformer["image_condition_type"], transformer["guidance_embeds"]
        require(kind is None, key, "a text-to-video transformer", f"image_condition_type {kind}")
        require(guided, key, "embedded guidance (guidance_embeds)", guided)
        expected = {
            "in_channels": configs["vae"]["latent_channels"],
            "out_channels": configs["vae"]["latent_channels"],
            "text_embed_dim": configs["text_encoder"].hidden_size,
            "pooled_projection_dim": configs["text_encoder_2"].hidden_size,
        }
        got = {name: transformer[name] for name in expected}
        require(got == expected, key, f"a transformer with {expected}", got)


def attend_without_mask(transformer: Any) -> None:
    """Let a transformer (changed in place) cut the text of a single video to its own length, so
    that its blocks attend without a mask.

    It is the same function, and any attention kernel can serve it. Every call of the transformer,
    with any padding, gets this; a single text without a mask is cut already.
    """
    transformer.register_forward_pre_hook(_cut_text, with_kwargs=True)
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        block.register_forward_pre_hook(_drop_mask)


def _cut_text(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    named = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    text = named["encoder_hidden_states"]
    if named["encoder_attention_mask"] is None:
        named["encoder_attention_mask"] = text.new_ones(text.shape[:2])
    elif len(named["hidden_states"]) == 1:
        # The host waits here, once per forward pass that is not the policy's own.
        length = _text_length(named["encoder_attention_mask"][0])
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            named[name] = named[name][:, :length]
    return (), named


def _text_length(mask: Tensor) -> int:
    """The number of tokens of a text with this mask [max_sequence_length]."""
    valid = mask > 0
    length, last = torch.stack([valid.sum(), valid.nonzero().max() + 1]).tolist()
    if length != last:
        raise ValueError(
            f"expected a text that is padded at its end, got {length} tokens with the last one "
            f"at {last - 1}"
        )
    return int(length)


def _ones_before(length: int, num_tokens: int, device: torch.device) -> Tensor:
    """The mask [num_tokens] fp32 of a text of so many tokens: 1, then 0."""
    return (torch.arange(num_tokens, device=device) < length).float()


def _drop_mask(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # Only from the arguments: a checkpointed block runs again in the backward pass, when nothing
    # else is known.
    hidden_states, text, temb, mask, *rest = args
    return (hidden_states, text, temb, None if len(hidden_states) == 1 else mask, *rest)
