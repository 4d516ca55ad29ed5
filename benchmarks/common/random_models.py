"""The recipes' generators at their true size, without their weights: published configurations,
random weights, random texts.

A folder in diffusers' format is written with the configuration files alone, so that the
policies, their text cache and `plan` run on it unchanged; the networks are then made from it in
place on the device, instead of loaded.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config import TrainConfig
from fastgrpo.distributed import sharding
from fastgrpo.policies.text_cache import embed_missing
from fastgrpo.training.loop import compute_dtype
from fastgrpo.training.recipe_parser import parse_config


@dataclass(frozen=True)
class Published:
    """What the config.json of a model's parts say beside the defaults of diffusers' classes."""

    pipeline: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_width: int = 4096
    pooled_width: int = 768
    """Of the second text encoder; Wan has none."""


MODELS = {
    # Wan-AI/Wan2.1-T2V-1.3B-Diffusers, Wan-AI/Wan2.1-T2V-14B-Diffusers,
    # hunyuanvideo-community/HunyuanVideo
    "wan2.1_t2v_1.3b": Published(
        "WanPipeline", {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}, {}
    ),
    "wan2.1_t2v_14b": Published(
        "WanPipeline", {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}, {}
    ),
    "hunyuanvideo": Published(
        "HunyuanVideoPipeline",
        {"num_layers": 20, "num_single_layers": 40, "guidance_embeds": True},
        {},
    ),
}
_TINY_WAN = Published(
    "WanPipeline",
    {
        "num_attention_heads": 4,
        "attention_head_dim": 24,
        "num_layers": 2,
        "ffn_dim": 128,
        "text_dim": 32,
        "freq_dim": 32,
    },
    {"base_dim": 8, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1},
    text_width=32,
)
_TINY_HUNYUAN = Published(
    "HunyuanVideoPipeline",
    {
        "num_attention_heads": 4,
        "attention_head_dim": 24,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "pooled_projection_dim": 24,
        "rope_axes_dim": [8, 8, 8],
        "guidance_embeds": True,
    },
    {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4},
    text_width=32,
    pooled_width=24,
)
TINY = {"wan2.1_t2v_1.3b": _TINY_WAN, "wan2.1_t2v_14b": _TINY_WAN, "hunyuanvideo": _TINY_HUNYUAN}
"""A few thousand parameters of the same kinds, for a CPU."""
TINY_SIZE = {
    "rollout.height": 32,
    "rollout.width": 32,
    "rollout.num_frames": 5,
    "rollout.num_inference_steps": 6,
}
PROMPT = "a paper boat on a river of stars"


def with_layers(published: Published, layers: int) -> Published:
    """The model with so many blocks in all; HunyuanVideo's dual- and single-stream blocks stay in
    their proportion, but for rounding.

    ValueError: fewer than there are kinds of blocks, or more than the model has.
    """
    sizes = dict(published.transformer)
    kinds = [name for name in ("num_layers", "num_single_layers") if name in sizes]
    most = sum(sizes[name] for name in kinds)
    if not len(kinds) <= layers <= most:
        raise ValueError(f"--layers: expected {len(kinds)} to {most}, got {layers}")
    first = (
        layers
        if len(kinds) == 1
        else min(layers - 1, max(1, round(layers * sizes["num_layers"] / most)))
    )
    sizes |= dict(zip(kinds, (first, layers - first), strict=False))
    return dataclasses.replace(published, transformer=sizes)


def num_layers(published: Published) -> int:
    """Blocks of all kinds."""
    return int(
        sum(published.transformer.get(name, 0) for name in ("num_layers", "num_single_layers"))
    )


def write_configs(folder: Path, published: Published) -> None:
    """A model's configuration files in diffusers' format, and nothing else of it."""
    is_wan = published.pipeline == "WanPipeline"
    parts: dict[str, tuple[str, Mapping[str, Any]]] = {
        "transformer": (
            "WanTransformer3DModel" if is_wan else "HunyuanVideoTransformer3DModel",
            published.transformer,
        ),
        "vae": ("AutoencoderKLWan" if is_wan else "AutoencoderKLHunyuanVideo", published.vae),
        "text_encoder": ("UMT5EncoderModel", {"d_model": published.text_width}),
    }
    if not is_wan:
        parts["text_encoder"] = "LlamaModel", {"hidden_size": published.text_width}
        parts["text_encoder_2"] = "CLIPTextModel", {"hidden_size": published.pooled_width}
    index: dict[str, Any] = {"_class_name": published.pipeline}
    for name, (kind, values) in parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"_class_name": kind, **values}))
        index[name] = ["", kind]
    (folder / "model_index.json").write_text(json.dumps(index))


def recipe(
    model: str, published: Published, folder: Path, device: torch.device, overrides: Sequence[str]
) -> TrainConfig:
    """The model's own recipe over configuration files written into `folder`, one prompt a GPU; no
    judge is loaded by it.

    overrides: further options of `train`, such as --parallel.shard full; on a CPU compute is in
    fp32 unless they say otherwise.
    """
    write_configs(folder, published)
    given = {
        "config": f"fastgrpo/recipes/{model}.yaml",
        "reward": "fastgrpo.shapes.judge.ShapesJudge",
        "policy.init_args.model": folder,
        "policy.init_args.text_cache": folder / "text_embeddings",
        "rollout.num_prompts": 1,
        "runtime.device": device.type,
    }
    if device.type == "cpu":
        given["runtime.compute_dtype"] = "fp32"
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    config, _, _ = parse_config([*words, *overrides], prog="benchmarks/iteration.py")
    return config


def embed(config: TrainConfig, published: Published) -> None:
    """Random text embeddings of the greatest length for `PROMPT` and the unconditional branch, into
    the policy's own text cache.
    """
    policy: Any = config.policy
    draw = torch.Generator().manual_seed(0)

    def encode(_: str) -> dict[str, Tensor]:
        states = {
            "prompt_embeds": torch.randn(
                policy.max_sequence_length, published.text_width, generator=draw
            )
        }
        if published.pipeline == "WanPipeline":
            return states
        return states | {
            "pooled_prompt_embeds": torch.randn(published.pooled_width, generator=draw)
        }

    texts = [
        getattr(policy, "negative_prompt", ""),
        PROMPT,
    ]  # Wan's cache knows the unconditional branch by its text
    embed_missing(policy.cache, texts, encode)


def build(
    config: TrainConfig,
    device: torch.device,
    *,
    fused: bool,
    compiled: bool = False,
    activations: str = "full",
    masked: bool = False,
    **settings: Any,
) -> Any:
    """The recipe's policy with random weights (the same at every call), ready to train on `device`
    as `run.py` makes it ready.

    masked: let HunyuanVideo's blocks attend with diffusers' mask, which the policy spares them.
    settings: of the policy, such as attention, vae_dtype, vae_tiling, in place of the recipe's.
    """
    policy: Any = copy.copy(config.policy)
    for name, value in ({"fused": fused} | settings).items():
        setattr(policy, name, value)
    torch.manual_seed(0)
    with device:
        transformer, vae = policy.new_networks()
    policy.use(transformer, vae, device)
    policy.cuts_text = not masked
    for module in transformer.modules() if masked else ():
        module._forward_pre_hooks.clear()
    changes: dict[str, Any] = {"activations": activations, "compile": compiled, "replicas": 1}
    parallel = dataclasses.replace(config.parallel, **changes)
    sharding.prepare(policy.transformer, parallel, device, compute_dtype(config.runtime, device))
    return policy
