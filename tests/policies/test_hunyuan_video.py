"""HunyuanVideoPolicy against diffusers' own HunyuanVideoPipeline on the same tiny model: text,
mask, guidance, decoding, LoRA.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor

from fastgrpo.config import ParallelConfig
from fastgrpo.distributed import sharding
from fastgrpo.interfaces import Conditioning
from fastgrpo.policies.hunyuan_video import HunyuanVideoPolicy, attend_without_mask
from fastgrpo.policies.lora import LoRA, block_linears
from fastgrpo.policies.pretrained import to_frames

CPU = torch.device("cpu")
PROMPTS = ["a red ball", "two red balls roll to the left"]


@pytest.fixture(scope="module")
def make(
    hunyuan_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., HunyuanVideoPolicy]:
    """make(lora=...): a loaded policy whose prompts are embedded."""
    cache = tmp_path_factory.mktemp("cache")

    def loaded(**options: Any) -> HunyuanVideoPolicy:
        options = {"fused": False} | options  # diffusers' own bits
        policy = HunyuanVideoPolicy(
            str(hunyuan_folder), text_cache=str(cache), text_dtype="fp32", **options
        )
        policy.embed(PROMPTS, CPU)
        policy.load(CPU)
        return policy

    return loaded


@pytest.fixture(scope="module")
def policy(make: Callable[..., HunyuanVideoPolicy]) -> HunyuanVideoPolicy:
    return make()


@pytest.fixture(scope="module")
def pipe(hunyuan_folder: Path) -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline.from_pretrained(hunyuan_folder)


def inputs(policy: HunyuanVideoPolicy, batch: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(batch, *policy.latent_shape(32, 48, 9), generator=draw), torch.full(
        (batch,), 937.0
    )


def velocity(policy: HunyuanVideoPolicy) -> Tensor:
    with torch.no_grad():
        return policy.velocity(*inputs(policy), policy.encode(PROMPTS[:1]))


def masked(
    transformer: HunyuanVideoTransformer3DModel,
    latents: Tensor,
    timesteps: Tensor,
    text: Conditioning,
    guidance: float,
) -> Tensor:
    """As HunyuanVideoPipeline calls it: padded text, its mask, 1000 times the guidance."""
    with torch.no_grad():
        scale = latents.new_full((len(latents),), 1000 * guidance)
        out: Tensor = transformer(
            hidden_states=latents, timestep=timesteps, guidance=scale, return_dict=False, **text
        )[0]
    return out


def test_loaded_for_training(policy: HunyuanVideoPolicy) -> None:
    assert {(p.dtype, p.device.type, p.requires_grad) for p in policy.transformer.parameters()} == {
        (torch.float32, "cpu", True)
    }
    assert not any(
        module.training
        for network in (policy.transformer, policy.vae)
        for module in network.modules()
    )
    assert not any(p.requires_grad for p in policy.vae.parameters())


def test_encode_is_the_pipelines(policy: HunyuanVideoPolicy, pipe: HunyuanVideoPipeline) -> None:
    made = policy.encode([*PROMPTS, ""])
    for i, prompt in enumerate((*PROMPTS, "")):
        with torch.no_grad():
            (embeds,), (pooled,), (mask,) = pipe.encode_prompt(prompt)
        assert torch.equal(made["encoder_attention_mask"][i], mask.float())
        assert torch.equal(made["encoder_hidden_states"][i], embeds * mask[:, None])
        assert torch.equal(made["pooled_projections"][i], pooled)
        assert len(policy.cache.get(prompt)["prompt_embeds"]) == mask.sum() < 256
    alone = policy.encode(PROMPTS[1:])
    assert all(torch.equal(made[name][1:2], tensor) for name, tensor in alone.items())


def test_its_tokenizer_is_taken_as_it_was_saved(
    policy: HunyuanVideoPolicy, hunyuan_folder: Path, tmp_path: Path
) -> None:
    """Of a LlamaTokenizerFast, as HunyuanVideoPipeline has it, transformers 5 makes one that drops
    every space.
    """
    folder = Path(shutil.copytree(hunyuan_folder, tmp_path / "model"))
    for file, values in (
        ("model_index.json", {"tokenizer": ["transformers", "LlamaTokenizerFast"]}),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
    ):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    named = HunyuanVideoPolicy(str(folder), text_cache=str(tmp_path / "cache"), text_dtype="fp32")
    named.embed(PROMPTS, CPU)
    for prompt in PROMPTS:
        got, expected = (p.cache.get(prompt) for p in (named, policy))
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


# The velocity


def test_several_at_a_time_are_the_pipelines(
    policy: HunyuanVideoPolicy, pipe: HunyuanVideoPipeline
) -> None:
    text = policy.encode(PROMPTS)
    with torch.no_grad():
        made = policy.velocity(*inputs(policy, 2), text)
    assert torch.equal(made, masked(pipe.transformer, *inputs(policy, 2), text, guidance=6.0))


@pytest.mark.parametrize("fused", [False, True])
def test_a_cut_text_without_mask_is_the_masked_one(
    make: Callable[..., HunyuanVideoPolicy], pipe: HunyuanVideoPipeline, fused: bool
) -> None:
    """In float64 to its rounding, so it is the same function; in float32 to that of another
    attention kernel.
    """
    policy = make(fused=fused)
    plain = copy.deepcopy(policy.transformer)
    for module in plain.modules():
        module._forward_pre_hooks.clear()
    for prompt in ("", *PROMPTS):
        text = policy.encode([prompt])
        with torch.no_grad():
            made = policy.velocity(*inputs(policy), text)
        torch.testing.assert_close(
            made, masked(plain, *inputs(policy), text, guidance=6.0), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            made,
            masked(pipe.transformer, *inputs(policy), text, guidance=6.0),
            rtol=1e-5,
            atol=1e-5,
        )
    text, latents, timesteps = (
        {n: t.double() for n, t in text.items()},
        *(t.double() for t in inputs(policy)),
    )
    with torch.no_grad():
        policy.transformer.double()
        cut, whole = (
            policy.velocity(latents, timesteps, text),
            masked(plain.double(), latents, timesteps, text, guidance=6.0),
        )
    assert cut.dtype == torch.float64
    assert (cut - whole).abs().max() < 1e-13


def test_the_pipeline_may_use_the_policys_transformer(
    policy: HunyuanVideoPolicy, pipe: HunyuanVideoPipeline
) -> None:
    latents, _ = inputs(policy)
    options = {
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": 2,
        "latents": latents,
        "output_type": "latent",
    }
    own, expected = copy.copy(pipe), pipe(PROMPTS[0], **options).frames
    own.transformer = policy.transformer
    torch.testing.assert_close(own(PROMPTS[0], **options).frames, expected, rtol=1e-5, atol=1e-5)
    own.transformer = copy.deepcopy(pipe.transformer)
    attend_without_mask(own.transformer)
    torch.testing.assert_close(own(PROMPTS[0], **options).frames, expected, rtol=1e-5, atol=1e-5)
    text = policy.encode(PROMPTS[:1])
    text["encoder_attention_mask"] = text["encoder_attention_mask"].flip(1)
    with pytest.raises(ValueError, match="padded at its end"):
        policy.velocity(*inputs(policy), text)


def test_the_blocks_of_one_video_get_no_mask(policy: HunyuanVideoPolicy) -> None:
    seen: dict[str, list[Any]] = {"lengths": [], "masks": []}
    blocks = [*policy.transformer.transformer_blocks, *policy.transformer.single_transformer_blocks]

    def look(_: Any, args: tuple[Any, ...]) -> None:
        seen["lengths"].append(args[1].shape[1])
        seen["masks"].append(args[3])

    hooks = [block.register_forward_pre_hook(look) for block in blocks]
    with torch.no_grad():
        policy.velocity(*inputs(policy), policy.encode(PROMPTS[:1]))
        policy.velocity(*inputs(policy, 2), policy.encode(PROMPTS))
    for hook in hooks:
        hook.remove()
    own = len(policy.cache.get(PROMPTS[0])["prompt_embeds"])
    assert seen["lengths"] == [own] * len(blocks) + [256] * len(blocks)
    assert [mask is None for mask in seen["masks"]] == [True] * len(blocks) + [False] * len(blocks)


@pytest.mark.usefixtures("one_rank")
def test_its_blocks_compile(
    make: Callable[..., HunyuanVideoPolicy],
    policy: HunyuanVideoPolicy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four kinds of blocks, with and without gradients: more compilations than torch allows of one
    function.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    eager, compiled, text = make(), make(), policy.encode(PROMPTS[:1])
    # Both copied from their file: tensors at another alignment give other bits.
    sharding.prepare(eager.transformer, ParallelConfig(), CPU, torch.float32)
    sharding.prepare(compiled.transformer, ParallelConfig(compile=True), CPU, torch.float32)
    with torch.no_grad():
        rollout, expected = (p.velocity(*inputs(policy), text) for p in (compiled, eager))
    update = compiled.velocity(*inputs(policy), text)
    update.sum().backward()
    assert torch.equal(rollout, expected)
    assert torch.equal(update, expected)
    torch._dynamo.reset()


def test_a_prompts_bits_do_not_depend_on_the_others(policy: HunyuanVideoPolicy) -> None:
    together, alone = policy.encode(PROMPTS), policy.encode(PROMPTS[:1])
    with torch.no_grad():
        made = policy.velocity(
            *inputs(policy), {name: tensor[:1] for name, tensor in together.items()}
        )
        assert torch.equal(made, policy.velocity(*inputs(policy), alone))
        pair = {name: torch.cat([tensor, tensor]) for name, tensor in alone.items()}
        first, second = (
            policy.velocity(*inputs(policy, 2), together),
            policy.velocity(*inputs(policy, 2), pair),
        )
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_guidance_is_an_input(
    make: Callable[..., HunyuanVideoPolicy], policy: HunyuanVideoPolicy, pipe: HunyuanVideoPipeline
) -> None:
    other = make(embedded_guidance=1.0)
    made = velocity(other)
    assert not torch.allclose(made, velocity(policy))
    torch.testing.assert_close(
        made, masked(pipe.transformer, *inputs(other), other.encode(PROMPTS[:1]), guidance=1.0)
    )


# Decoding


def test_a_tiled_decode_is_the_pipelines(
    make: Callable[..., HunyuanVideoPolicy], hunyuan_folder: Path
) -> None:
    pipe = HunyuanVideoPipeline.from_pretrained(hunyuan_folder)
    pipe.vae.enable_tiling()
    tiled = make(vae_tiling=True)
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(1, *tiled.latent_shape(32, 48, 25), generator=draw)
    options = {"height": 32, "width": 48, "num_frames": 25, "num_inference_steps": 1}
    clean = pipe(PROMPTS[0], latents=latents, output_type="latent", **options).frames
    frames = pipe(PROMPTS[0], latents=latents, output_type="pt", **options).frames
    made = tiled.decode(torch.cat([latents, clean]))
    assert made.shape == (2, 25, 3, 32, 48)
    assert torch.equal(made[1:], frames)


def test_an_untiled_decode_has_no_seam_in_time(
    policy: HunyuanVideoPolicy, pipe: HunyuanVideoPipeline
) -> None:
    """diffusers' default decodes frames in groups, whose edges it blends: an early frame would not
    see that a late one is the same.
    """
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(1, *policy.latent_shape(32, 48, 25), generator=draw)
    with torch.no_grad():
        z = latents / pipe.vae.config.scaling_factor
        exact = pipe.vae.decoder(pipe.vae.post_quant_conv(z))
        default = pipe.vae.decode(z, return_dict=False)[0]
    assert torch.equal(policy.decode(latents)[0], to_frames(exact))
    assert not torch.allclose(exact, default, atol=1e-3)


def test_sizes(policy: HunyuanVideoPolicy) -> None:
    assert policy.latent_shape(240, 416, 53) == (4, 14, 30, 52)
    for size, problem in (
        ((40, 48, 9), "height: expected a number divisible by 16"),
        ((32, 41, 9), "width"),
        ((32, 48, 8), r"num_frames: expected a number 4 n \+ 1"),
    ):
        with pytest.raises(ValueError, match=problem):
            policy.latent_shape(*size)


def test_long_prompts_are_counted_with_the_template(policy: HunyuanVideoPolicy) -> None:
    policy.check_prompts(PROMPTS)
    words = len(
        policy.cache.get("")["prompt_embeds"]
    )  # of the template, after what the pipeline cuts off
    policy.check_prompts(["b" * (256 - words)])
    limit = 256 + DEFAULT_PROMPT_TEMPLATE["crop_start"]
    with pytest.warns(UserWarning, match=f"1 of 1 prompts have more than the {limit} tokens"):
        policy.check_prompts(["b" * (257 - words)])


def test_attention_kernel(policy: HunyuanVideoPolicy) -> None:
    shape = policy.latent_shape(32, 48, 9)
    assert all(
        "flash_attention_for_cpu" in policy.describe_attention(shape, torch.float32, size)
        for size in (1, 2)
    )


# LoRA


def test_lora(
    make: Callable[..., HunyuanVideoPolicy],
    policy: HunyuanVideoPolicy,
    hunyuan_folder: Path,
    tmp_path: Path,
) -> None:
    adapted = make(lora=LoRA(rank=4, alpha=8))
    trained = {name for name, p in adapted.transformer.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0] for name in trained} == set(
        block_linears(policy.transformer, policy.lora_targets)
    )
    assert not any(
        name.startswith(("proj_out", "context_embedder", "time_text_embed")) for name in trained
    )
    assert torch.equal(velocity(adapted), velocity(policy))
    draw = torch.Generator().manual_seed(0)
    weights = {
        n: 0.2 * torch.randn(t.shape, generator=draw) if "lora_B" in n else t
        for n, t in adapted.transformer.state_dict().items()
    }
    adapted.transformer.load_state_dict(weights)
    moved = velocity(adapted)
    adapted.transformer.disable_adapters()
    assert torch.equal(velocity(adapted), velocity(policy))

    adapted.save_pretrained(tmp_path, weights)
    pipe = HunyuanVideoPipeline.from_pretrained(hunyuan_folder)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(
        masked(pipe.transformer, *inputs(adapted), adapted.encode(PROMPTS[:1]), guidance=6.0), moved
    )
    assert not torch.allclose(moved, velocity(policy), atol=1e-3)


def test_full_weights_round_trip(make: Callable[..., HunyuanVideoPolicy], tmp_path: Path) -> None:
    policy = make()
    weights = {name: tensor + 0.01 for name, tensor in policy.transformer.state_dict().items()}
    policy.save_pretrained(tmp_path / "transformer", weights)
    loaded = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path / "transformer")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())


# Models that cannot be taken


@pytest.mark.parametrize(
    ("file", "values", "problem"),
    [
        (
            "model_index.json",
            {"_class_name": "WanPipeline"},
            "a HunyuanVideoPipeline, got 'WanPipeline'",
        ),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "LlavaForConditionalGeneration"]},
            "a LlamaModel as text_encoder",
        ),
        ("transformer/config.json", {"guidance_embeds": False}, "embedded guidance"),
        ("transformer/config.json", {"image_condition_type": "token_replace"}, "text-to-video"),
        (
            "transformer/config.json",
            {"in_channels": 33},
            "'in_channels': 4.* got .*'in_channels': 33",
        ),
        (
            "transformer/config.json",
            {"text_embed_dim": 4096},
            "'text_embed_dim': 32.* got .*'text_embed_dim': 4096",
        ),
        (
            "transformer/config.json",
            {"pooled_projection_dim": 768},
            "'pooled_projection_dim': 24.* got .*: 768",
        ),
    ],
)
def test_another_model(
    hunyuan_folder: Path, tmp_path: Path, file: str, values: dict[str, Any], problem: str
) -> None:
    folder = Path(shutil.copytree(hunyuan_folder, tmp_path / "model"))
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    for check in (lambda p: p.load(CPU), lambda p: p.latent_shape(32, 48, 9)):
        with pytest.raises(ValueError, match=f"policy.model: .*expected .*{problem}"):
            check(HunyuanVideoPolicy(str(folder)))


def test_a_tokenizer_that_pads_on_the_left(hunyuan_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hunyuan_folder, tmp_path / "model"))
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    with pytest.raises(ValueError, match=r"policy.model: .* pads on the right"):
        HunyuanVideoPolicy(str(folder), text_cache=str(tmp_path / "cache")).embed(PROMPTS, CPU)
