"""WanPolicy against diffusers' own WanPipeline on the same tiny model; and what it says of models
that it cannot take.
"""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils import logging
from torch import Tensor

from fastgrpo.policies import model_files, pretrained
from fastgrpo.policies.attention import set_attention
from fastgrpo.policies.lora import LoRA, add_lora, block_linears
from fastgrpo.policies.wan import NEGATIVE_PROMPT, WanPolicy

CPU = torch.device("cpu")
PROMPTS = ["a red ball", "two red balls roll to the left"]
LENGTH = 64


@pytest.fixture(scope="module")
def make(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., WanPolicy]:
    """make(lora=...): a loaded policy whose prompts are embedded."""
    cache = tmp_path_factory.mktemp("cache")

    def loaded(**options: Any) -> WanPolicy:
        policy = WanPolicy(
            str(wan_folder),
            max_sequence_length=LENGTH,
            text_cache=str(cache),
            text_dtype="fp32",
            **({"fused": False} | options),  # diffusers' own bits
        )
        policy.embed(PROMPTS, CPU)
        policy.load(CPU)
        return policy

    return loaded


@pytest.fixture(scope="module")
def policy(make: Callable[..., WanPolicy]) -> WanPolicy:
    return make()


@pytest.fixture(scope="module")
def pipe(wan_folder: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(wan_folder)


def inputs(policy: WanPolicy, batch: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(batch, *policy.latent_shape(32, 48, 9), generator=draw), torch.full(
        (batch,), 937.0
    )


def velocity(policy: WanPolicy) -> Tensor:
    with torch.no_grad():
        return policy.velocity(*inputs(policy), policy.encode(PROMPTS[:1]))


# As diffusers has it


def test_loaded_for_training(policy: WanPolicy) -> None:
    assert {(p.dtype, p.device.type, p.requires_grad) for p in policy.transformer.parameters()} == {
        (torch.float32, "cpu", True)
    }
    assert not any(
        module.training
        for network in (policy.transformer, policy.vae)
        for module in network.modules()
    )
    assert not any(p.requires_grad for p in policy.vae.parameters())


def test_a_recipe_makes_it() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(WanPolicy, "policy")
    given = {
        "policy": {
            "model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "fused": "auto",
            "lora": {"rank": 8, "target_modules": ["to_q"]},
        }
    }
    made = parser.instantiate(parser.parse_object(given)).policy
    assert made.lora == LoRA(rank=8, target_modules=("to_q",))
    assert (made.fused, made.negative_prompt, made.max_sequence_length) == (
        "auto",
        NEGATIVE_PROMPT,
        512,
    )
    assert (
        parser.instantiate(
            parser.parse_object({"policy": {"model": "m", "fused": False}})
        ).policy.fused
        is False
    )


def test_encode_is_the_pipelines(policy: WanPolicy, pipe: WanPipeline) -> None:
    with torch.no_grad():
        text, negative = pipe.encode_prompt(PROMPTS[0], NEGATIVE_PROMPT, max_sequence_length=LENGTH)
    made = policy.encode([PROMPTS[0], "", PROMPTS[1]])["encoder_hidden_states"]
    assert torch.equal(made[:1], text)
    assert torch.equal(made[1:2], negative)
    assert not torch.equal(made[0], made[2])
    assert len(policy.cache.get(PROMPTS[0])["prompt_embeds"]) == len(
        PROMPTS[0]
    )  # bytes are tokens here; padding is not stored


def test_velocity_is_the_transformers(policy: WanPolicy, pipe: WanPipeline) -> None:
    latents, timesteps = inputs(policy)
    with torch.no_grad():
        text, negative = pipe.encode_prompt(PROMPTS[0], NEGATIVE_PROMPT, max_sequence_length=LENGTH)
        for prompt, embeds in ((PROMPTS[0], text), ("", negative)):
            made = policy.velocity(latents, timesteps, policy.encode([prompt]))
            assert torch.equal(
                made, pipe.transformer(latents, timesteps, embeds, return_dict=False)[0]
            )


def test_decode_is_the_pipelines(policy: WanPolicy, pipe: WanPipeline) -> None:
    options = {
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "max_sequence_length": LENGTH,
    }
    latents, _ = inputs(policy)
    clean = pipe(PROMPTS[0], latents=latents, output_type="latent", **options).frames
    frames = pipe(PROMPTS[0], latents=latents, output_type="pt", **options).frames
    made = policy.decode(torch.cat([latents, clean]))
    assert made.shape == (2, 9, 3, 32, 48)
    assert torch.equal(made[1:], frames)
    assert len((made * 255).frac().unique()) > 1000  # no 8-bit step in between


def test_a_bf16_vae_gives_fp32_frames(make: Callable[..., WanPolicy], policy: WanPolicy) -> None:
    half = make(vae_dtype="bf16", vae_tiling=True)
    assert half.vae.dtype == torch.bfloat16
    assert half.vae.use_tiling
    assert not policy.vae.use_tiling
    latents, _ = inputs(policy)
    made = half.decode(latents)
    assert made.dtype == torch.float32
    assert 0 < (made - policy.decode(latents)).abs().max() < 0.05


def test_sizes(policy: WanPolicy) -> None:
    assert policy.latent_shape(480, 832, 53) == (16, 14, 60, 104)
    for size, problem in (
        ((40, 48, 9), "height: expected a number divisible by 16, got 40"),
        ((32, 41, 9), "width"),
        ((32, 48, 8), r"num_frames: expected a number 4 n \+ 1"),
    ):
        with pytest.raises(ValueError, match=problem):
            policy.latent_shape(*size)


# Text embeddings


def test_the_text_encoder_is_loaded_once_and_only_where_something_is_missing(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[weakref.ref[Any]] = []

    def load(*given: Any, real: Any = pretrained.load_text_pipeline) -> Any:
        pipeline = real(*given)
        loads.append(weakref.ref(pipeline.text_encoder))
        return pipeline

    monkeypatch.setattr(pretrained, "load_text_pipeline", load)
    policies = [
        WanPolicy(str(wan_folder), max_sequence_length=LENGTH, text_cache=str(tmp_path))
        for _ in range(2)
    ]
    policies[0].embed(PROMPTS, CPU)
    policies[1].embed(PROMPTS[:1], CPU)
    assert len(loads) == 1
    policies[1].embed(["another"], CPU)
    assert len(loads) == 2
    assert [encoder() for encoder in loads] == [None, None]  # freed
    assert policies[1].cache.get("another")["prompt_embeds"].dtype == torch.bfloat16
    policies[1].load(CPU)
    assert policies[1].encode(["another"])["encoder_hidden_states"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"'never seen'.*fastgrpo embed"):
        policies[1].encode(["never seen"])
    longer = WanPolicy(str(wan_folder), max_sequence_length=LENGTH + 1, text_cache=str(tmp_path))
    assert longer.cache.missing(PROMPTS) == PROMPTS  # another length, another embedding


def test_the_text_encoder_is_freed_after_an_error_too(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = WanPolicy(str(wan_folder), max_sequence_length=5, text_cache=str(tmp_path))
    loads: list[weakref.ref[Any]] = []

    def encode_prompt(pipeline: Any, text: str, device: torch.device) -> dict[str, Tensor]:
        loads.append(weakref.ref(pipeline.text_encoder))
        if text == PROMPTS[1]:
            raise ValueError("cannot encode this")
        return {"states": torch.ones(1)}

    monkeypatch.setattr(policy, "encode_prompt", encode_prompt)
    with pytest.raises(ValueError, match="cannot encode this"):
        policy.embed(PROMPTS, CPU)
    assert {encoder() for encoder in loads} == {None}
    policy.cache.refresh()
    assert policy.cache.missing(PROMPTS) == PROMPTS[1:]


def test_long_prompts_are_counted_and_empty_ones_refused(policy: WanPolicy) -> None:
    policy.check_prompts(PROMPTS)
    with pytest.warns(UserWarning, match=r"1 of 3 prompts have more than the 64 tokens"):
        policy.check_prompts([*PROMPTS, "x" * 65])
    with pytest.raises(ValueError, match=r"empty"):
        policy.check_prompts(["a", ""])


# LoRA


def test_lora_trains_adapters_alone(make: Callable[..., WanPolicy], policy: WanPolicy) -> None:
    adapted = make(lora=LoRA(rank=4, alpha=8))
    base = policy.transformer.state_dict()
    trained = {name: p for name, p in adapted.transformer.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0] for name in trained} == set(
        block_linears(policy.transformer, policy.lora_targets)
    )
    assert all("lora_" in name for name in trained)
    assert torch.equal(velocity(adapted), velocity(policy))  # B = 0

    adapted.velocity(*inputs(adapted), adapted.encode(PROMPTS[:1])).square().sum().backward()
    assert {
        name for name, p in adapted.transformer.named_parameters() if p.grad is not None
    } == set(trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, fused=True)
    optimizer.step()
    for name, tensor in adapted.transformer.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, base[name.replace(".base_layer", "")])
    moved = velocity(adapted)
    assert not torch.equal(moved, velocity(policy))
    adapted.transformer.disable_adapters()
    assert torch.equal(velocity(adapted), velocity(policy))
    adapted.transformer.enable_adapters()
    assert torch.equal(velocity(adapted), moved)


def test_lora_is_seeded(make: Callable[..., WanPolicy], policy: WanPolicy) -> None:
    before = torch.get_rng_state()
    add_lora(copy.deepcopy(policy.transformer), LoRA(rank=4), policy.lora_targets)
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (
        make(lora=LoRA(rank=4, seed=seed)).transformer.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert {name for name, tensor in first.items() if not torch.equal(tensor, other[name])} == {
        n for n in first if "lora_A" in n
    }


def test_lora_round_trip(make: Callable[..., WanPolicy], wan_folder: Path, tmp_path: Path) -> None:
    adapted = make(lora=LoRA(rank=4, alpha=8))
    draw = torch.Generator().manual_seed(0)
    weights = {
        n: 0.2 * torch.randn(t.shape, generator=draw) if "lora_B" in n else t
        for n, t in adapted.transformer.state_dict().items()
    }
    adapted.save_pretrained(tmp_path / "all", weights)
    adapted.save_pretrained(
        tmp_path / "trained", {n: t for n, t in weights.items() if "lora_" in n}
    )  # an EMA of what is trained
    adapted.transformer.load_state_dict(weights)
    for name in ("all", "trained"):
        assert [file.name for file in (tmp_path / name).iterdir()] == [
            "pytorch_lora_weights.safetensors"
        ]
        pipe = WanPipeline.from_pretrained(wan_folder)
        pipe.load_lora_weights(tmp_path / name)
        with torch.no_grad():
            made = pipe.transformer(
                *inputs(adapted), **adapted.encode(PROMPTS[:1]), return_dict=False
            )[0]
        assert torch.equal(made, velocity(adapted))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"dropout": 0.1}, "dropout: expected 0"),
        ({"rank": 0}, "rank"),
        ({"target_modules": ()}, "target_modules"),
    ],
)
def test_lora_that_cannot_be(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=f"policy.lora.{problem}"):
        LoRA(**options)


def test_lora_of_no_layer(make: Callable[..., WanPolicy]) -> None:
    with pytest.raises(ValueError, match=r"policy.lora.target_modules.*nothing"):
        make(lora=LoRA(target_modules=("nothing",)))


# Export


def test_full_weights_round_trip(
    make: Callable[..., WanPolicy], wan_folder: Path, tmp_path: Path
) -> None:
    policy = make()
    weights = {name: tensor + 0.01 for name, tensor in policy.transformer.state_dict().items()}
    policy.save_pretrained(tmp_path / "transformer", weights)
    assert "_name_or_path" not in json.loads((tmp_path / "transformer" / "config.json").read_text())
    pipe = WanPipeline.from_pretrained(
        wan_folder, transformer=WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    )
    policy.transformer.load_state_dict(weights)
    with torch.no_grad():
        made = pipe.transformer(*inputs(policy), **policy.encode(PROMPTS[:1]), return_dict=False)[0]
    assert torch.equal(made, velocity(policy))


# Attention


def test_attention_by_name(make: Callable[..., WanPolicy], policy: WanPolicy) -> None:
    assert "flash_attention_for_cpu" in policy.describe_attention(
        policy.latent_shape(32, 48, 9), torch.float32, 1
    )
    plain = make(attention="_native_math")
    assert (
        plain.describe_attention(plain.latent_shape(32, 48, 9), torch.float32, 1)
        == "_native_math (no fused kernel)"
    )
    torch.testing.assert_close(velocity(plain), velocity(policy))
    assert "flash" in policy.describe_attention(
        policy.latent_shape(32, 48, 9), torch.float32, 1
    )  # a policy's choice is its own
    untouched = WanTransformer3DModel.from_config(policy.transformer.config)
    assert {
        m.processor._attention_backend for m in untouched.modules() if hasattr(m, "processor")
    } == {None}


def test_attention_is_asked_as_in_training_by_default(make: Callable[..., WanPolicy]) -> None:
    """What the switch does is in test_attention.py."""
    functions = attention_dispatch._AttentionBackendRegistry._backends
    wrapped = {}
    for alike in (False, True):
        given = {} if alike else {"attention_as_in_training": False}
        result = velocity(make(**given))
        wrapped[alike] = hasattr(functions[AttentionBackendName.NATIVE], "__wrapped__"), result
    assert (wrapped[False][0], wrapped[True][0]) == (False, True)
    assert torch.equal(wrapped[False][1], wrapped[True][1])


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("fast", "expected one of fa3, fa4, .*native.* got 'fast'"),
        ("flash", "flash does not run.*flash-attn"),
        ("fa3", "fa3 does not run"),
    ],
)
def test_attention_that_is_not_there(
    make: Callable[..., WanPolicy], name: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=f"policy.attention: {problem}"):
        make(attention=name)


def test_autocast_would_give_flash_attention_two_dtypes(policy: WanPolicy) -> None:
    with pytest.raises(
        ValueError, match=r"flash takes q, k and v of one 16-bit dtype.*policy.fused"
    ):
        set_attention(policy.transformer, "flash", torch.device("cuda"), fused=False)


def test_an_attention_that_heeds_no_setting_of_torch_is_not_deterministic(
    policy: WanPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    cuda, problem = (
        torch.device("cuda"),
        r"one of native.* with runtime\.deterministic.*got 'flash'",
    )
    with pytest.raises(ValueError, match=problem):
        set_attention(policy.transformer, "flash", cuda, fused=True)
    set_attention(policy.transformer, "native", torch.device("cpu"), fused=False)


def test_a_transformer_in_memory_is_prepared_alike(policy: WanPolicy) -> None:
    network, vae = copy.deepcopy(policy.transformer).train(), copy.deepcopy(policy.vae)
    other = WanPolicy("unused", fused=False)
    other.use(network, vae, CPU)
    assert not other.is_fused
    assert not network.training
    adapted = WanPolicy("unused", lora=LoRA(rank=2), fused=True)
    adapted.use(network, vae, CPU)
    assert adapted.is_fused
    trained = {name.split(".")[-3] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}


def test_diffusers_is_as_loud_as_before_after_an_error() -> None:
    before = logging.get_verbosity()
    with pytest.raises(KeyError), model_files.quiet_diffusers():
        raise KeyError
    assert logging.get_verbosity() == before


# Models that cannot be taken
