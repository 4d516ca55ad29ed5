"""fastgrpo_kernels' operations inside whole Wan and HunyuanVideo transformers: as exact as
diffusers' blocks, and the same bits in rollout and update, whatever wraps the blocks.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoSingleTransformerBlock,
    HunyuanVideoTransformerBlock,
)
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from fastgrpo_kernels import dispatch, patch, patching
from fastgrpo_kernels.dispatch import select_backend
from fastgrpo_kernels.patching import FusedHunyuanProcessor, FusedWanProcessor, RotaryTables
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.overrides import TorchFunctionMode

from fastgrpo.policies.fused import fuse, fused_serves
from fastgrpo.policies.hunyuan_video import HunyuanVideoPolicy
from fastgrpo.policies.lora import LoRA
from fastgrpo.policies.wan import WanPolicy

CPU = torch.device("cpu")
PROMPT = "two red balls"
RealPolicy = WanPolicy | HunyuanVideoPolicy
BLOCKS = (WanTransformerBlock, HunyuanVideoTransformerBlock, HunyuanVideoSingleTransformerBlock)


@pytest.fixture(scope="module", params=["wan", "hunyuan_video"])
def make(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RealPolicy]:
    """make(fused=..., lora=...): a loaded policy whose norms have weights that are not 1."""
    kind = {"wan": WanPolicy, "hunyuan_video": HunyuanVideoPolicy}[request.param]
    folder: Path = request.getfixturevalue(
        {"wan": "wan_folder", "hunyuan_video": "hunyuan_folder"}[request.param]
    )
    cache = tmp_path_factory.mktemp("cache")
    length = {"max_sequence_length": 32} if kind is WanPolicy else {}

    def loaded(**options: Any) -> RealPolicy:
        policy = kind(str(folder), text_cache=str(cache), text_dtype="fp32", **length, **options)
        policy.embed([PROMPT], CPU)
        policy.load(CPU)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in policy.transformer.named_parameters():
                if "norm" in name and parameter.dim() == 1:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
                if "lora_B" in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
        return policy

    return loaded


def inputs(policy: RealPolicy, batch: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    latents = torch.randn(batch, *policy.latent_shape(32, 48, 9), generator=draw)
    return latents, torch.full((batch,), 987.0), dict(policy.encode([PROMPT] * batch))


def blocks(policy: RealPolicy) -> list[Any]:
    return [module for module in policy.transformer.modules() if isinstance(module, BLOCKS)]


class Float64Throughout(TorchFunctionMode):
    """diffusers casts to float32 in its norms and rotations, also in a float64 model; under this
    mode those casts give float64.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if a is torch.float32 else a for a in args]
        return func(
            *args,
            **{
                name: torch.float64 if a is torch.float32 else a
                for name, a in (kwargs or {}).items()
            },
        )


@contextmanager
def computing(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        yield


# -------- as exact


def outputs_and_gradients(
    policy: RealPolicy, given: tuple[Tensor, Tensor, dict[str, Tensor]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Velocity and every gradient, by name; the weights are in float64 for float64."""
    exact, (latents, timesteps, text) = dtype == torch.float64, given
    latents, timesteps, *tensors = (
        tensor.double() if exact else tensor.clone()
        for tensor in (latents, timesteps, *text.values())
    )
    draw = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    policy.transformer.zero_grad()
    with Float64Throughout() if exact else computing(dtype):
        out = policy.velocity(
            latents.requires_grad_(), timesteps, dict(zip(text, tensors, strict=True))
        )
        out.backward(draw.to(out.dtype))
    gradients = {name: p.grad for name, p in policy.transformer.named_parameters()}
    return {"velocity": out.detach(), "latents": latents.grad, **gradients}


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 2), (torch.bfloat16, 1)])
def test_velocity_and_gradients_are_as_exact_as_diffusers(
    make: Callable[..., RealPolicy], dtype: torch.dtype, batch: int
) -> None:
    """Root mean square errors against float64, of all elements of a kind together: of the few of
    one tensor it would be luck.
    """
    ours, eager, exact = make(fused=True), make(fused=False), make(fused=False)
    exact.transformer.double()
    given = inputs(ours, batch)
    made, theirs, truth = (
        outputs_and_gradients(p, given, d)
        for p, d in ((ours, dtype), (eager, dtype), (exact, torch.float64))
    )
    assert made.keys() == theirs.keys() == truth.keys()
    errors: dict[str, list[Tensor]] = {}
    for name, true in truth.items():
        assert (made[name].dtype, made[name].shape) == (theirs[name].dtype, true.shape)
        assert true.dtype == torch.float64
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        errors.setdefault(kind, []).append(
            torch.stack(
                [(tensor[name].double() - true).square().mean() for tensor in (made, theirs)]
            )
        )
    for kind, pairs in errors.items():
        error, allowed = torch.stack(pairs).mean(0).sqrt().tolist()
        assert error <= 2 * allowed, f"{kind}: error {error:.3g}, diffusers' own {allowed:.3g}"


def test_the_same_function_in_float64(make: Callable[..., RealPolicy]) -> None:
    """Not one rounding apart: what the blocks compute is what the operations compute."""
    ours, eager = make(fused=True), make(fused=False)
    given = inputs(ours)
    made, expected = (
        outputs_and_gradients(p, given, torch.float64)
        for p in (ours, eager)
        if p.transformer.double()
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(
            made[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_triton_serves_them_too(
    make: Callable[..., RealPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := dispatch.unsupported_reason("triton", "ln_modulate", torch.empty(0)):
        pytest.skip(reason)
    policy = make(fused=True)
    latents, timesteps, text = inputs(policy)
    # A few tokens: Triton's interpreter takes milliseconds for each.
    text = {name: tensor[:, :2] if "encoder" in name else tensor for name, tensor in text.items()}
    given = latents[:, :, :1, :2, :4], timesteps, text
    expected = outputs_and_gradients(policy, given, torch.float32)
    monkeypatch.setattr(dispatch, "FORCED", "triton")
    made = outputs_and_gradients(policy, given, torch.float32)
    policy.transformer.enable_gradient_checkpointing()
    again = outputs_and_gradients(policy, given, torch.float32)
    assert all(torch.equal(tensor, made[name]) for name, tensor in again.items())
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in made.items():
        torch.testing.assert_close(
            tensor,
            expected[name],
            rtol=1e-4,
            atol=1e-6 * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# -------- the same bits twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8)], ids=["full", "lora"])
@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "eager"])
def test_rollout_and_update_compute_the_same_bits(
    make: Callable[..., RealPolicy], is_fused: bool, lora: LoRA | None, dtype: torch.dtype
) -> None:
    """Without gradients, with them, and with checkpointed blocks, whose gradients are those of the
    plain ones bit for bit.
    """
    policy = make(fused=is_fused, lora=lora)
    latents, timesteps, text = inputs(policy)
    made, gradients = [], []
    for mode in ("rollout", "update", "checkpointed"):
        if mode == "checkpointed":
            policy.transformer.enable_gradient_checkpointing()
        policy.transformer.zero_grad()
        with torch.set_grad_enabled(mode != "rollout"), computing(dtype):
            out = policy.velocity(latents, timesteps, text)
        made.append(out.detach())
        if mode != "rollout":
            out.square().sum().backward()
            gradients.append(
                {
                    name: p.grad
                    for name, p in policy.transformer.named_parameters()
                    if p.requires_grad
                }
            )
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())
    assert all(gradient.any() for gradient in gradients[1].values())


# -------- in place, no more


def test_auto_follows_the_compiled_operations(
    make: Callable[..., RealPolicy], monkeypatch: pytest.MonkeyPatch, recwarn: Any
) -> None:
    """On a CPU: in where csrc/ serves. The plain reference is slower than diffusers' blocks."""
    has_library = not dispatch.unsupported_reason("cpp", "ln_modulate", torch.empty(0))
    assert make(fused="auto").is_fused == fused_serves(CPU) == has_library
    assert make(fused=True).is_fused
    assert not make(fused=False).is_fused
    monkeypatch.setattr(dispatch, "_library_error", "csrc/ is not built")
    recwarn.clear()
    assert not fused_serves(CPU)
    assert not make(fused="auto").is_fused
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"policy.fused: .* got only their .*csrc/ is not built"):
        assert make(fused=True).is_fused


def test_objects_change_and_classes_do_not(make: Callable[..., RealPolicy]) -> None:
    plain, policy = make(fused=False), make(fused=True)
    assert list(policy.transformer.state_dict()) == list(plain.transformer.state_dict())
    assert [name for name, _ in policy.transformer.named_modules()] == [
        name for name, _ in plain.transformer.named_modules()
    ]
    assert all("forward" in vars(block) for block in blocks(policy))
    processors = {
        type(attn.processor)
        for block in blocks(policy)
        for attn in block.children()
        if hasattr(attn, "processor")
    }
    assert processors == {
        FusedWanProcessor if isinstance(policy, WanPolicy) else FusedHunyuanProcessor
    }
    assert not any("forward" in vars(module) for module in plain.transformer.modules())
    latents, timesteps, text = inputs(policy)
    with torch.no_grad():
        made = policy.velocity(latents, timesteps, text)
        patch(policy.transformer)
        assert torch.equal(policy.velocity(latents, timesteps, text), made)
        policy.transformer = copy.deepcopy(policy.transformer)
        torch.testing.assert_close(
            policy.velocity(latents, timesteps, text), made
        )  # other addresses, other bits: weights lay in a file
        for (
            parameter
        ) in policy.transformer.parameters():  # the copy's blocks compute with the copy's weights
            parameter.zero_()
        assert not policy.velocity(latents, timesteps, text).any()


def test_rotary_tables_are_those_of_diffusers_at_every_size(
    make: Callable[..., RealPolicy],
) -> None:
    """They are kept between forwards; another size or another network makes its own."""
    policy, plain = make(fused=True), make(fused=False)
    latents, timesteps, text = inputs(policy)
    for x in (latents, latents[..., :2], latents, latents[:, :, :1]):
        given = x, timesteps, text
        rope, kept = policy.transformer.rope, []
        for _ in range(2):
            with torch.inference_mode():  # what is kept must serve a later backward
                kept.append(rope(x))
        assert kept[0] is kept[1]
        cos, sin = (table.reshape(-1, 24) for table in plain.transformer.rope(x))
        assert torch.equal(kept[0].cos.repeat_interleave(2, dim=1), cos)
        assert torch.equal(kept[0].sin.repeat_interleave(2, dim=1), sin)
        policy.velocity(*given).sum().backward()
    policy.transformer.rope(latents.to("meta"))  # the same size on another device
    assert policy.transformer.rope(latents).cos.device == CPU


def test_every_block_runs_the_operations_and_the_tables_are_made_once(
    make: Callable[..., RealPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, tables, calls = make(fused=True), [], []
    made = RotaryTables.__init__
    monkeypatch.setattr(
        RotaryTables, "__init__", lambda self, *given: (tables.append(self), made(self, *given))[1]
    )
    operations = ("ln_modulate", "gate_residual", "gate_residual_ln_modulate", "qk_norm_rope")
    for name in operations:
        real = getattr(patching, name)
        monkeypatch.setattr(
            patching,
            name,
            lambda *a, _name=name, _real=real, **k: (calls.append(_name), _real(*a, **k))[1],
        )
    with torch.no_grad():
        policy.velocity(*inputs(policy))
    wan = isinstance(policy, WanPolicy)
    expected = {"wan": (3, 2, 4, 4), "hunyuan_video": (6, 6, 4, 6)}[
        "wan" if wan else "hunyuan_video"
    ]
    assert {name: calls.count(name) for name in operations} == dict(
        zip(operations, expected, strict=True)
    )
    (table,) = tables
    for angles in (table.cos, table.sin):
        assert (angles.dtype, angles.is_contiguous()) == (torch.float32, True)
        assert angles.shape == (3 * 2 * 3, 12)  # tokens of 2 x 2 latents; half of 24 channels


def test_the_attention_backend_stays(make: Callable[..., RealPolicy]) -> None:
    policy = make(fused=True, attention="_native_math")
    shape = policy.latent_shape(32, 48, 9)
    assert policy.describe_attention(shape, torch.float32, 1) == "_native_math (no fused kernel)"
    patch(policy.transformer)
    assert policy.describe_attention(shape, torch.float32, 1) == "_native_math (no fused kernel)"
    policy.transformer.set_attention_backend("native")
    of_torch = "native (_scaled_dot_product_flash_attention_for_cpu)"
    few = select_backend("few_token_attention", torch.empty(0)) == "cpp"
    few = few and isinstance(policy, WanPolicy)  # HunyuanVideo's text has more tokens
    of_few = "native (few_token_attention)" if few else of_torch
    assert policy.describe_attention(shape, torch.float32, 1) == of_few
    more = policy.latent_shape(64, 96, 9)
    assert policy.describe_attention(more, torch.float32, 1) == of_torch


# -------- under FSDP2


def sharded(policy: RealPolicy, cast_forward_inputs: bool) -> RealPolicy:
    mixed = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=cast_forward_inputs,
    )
    for block in blocks(policy):
        fully_shard(block, mp_policy=mixed)
    fully_shard(policy.transformer, mp_policy=mixed)
    return policy


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings(
    "ignore:FSDP2-wrapped module .* returned a view"
)  # as sharding.prepare does
@pytest.mark.parametrize("lora", [None, LoRA(rank=4, alpha=8)], ids=["full", "lora"])
def test_sharded_blocks_run_the_operations(
    make: Callable[..., RealPolicy], lora: LoRA | None
) -> None:
    policy, whole = (
        sharded(make(fused=True, lora=lora), cast_forward_inputs=False),
        make(fused=True, lora=lora),
    )
    assert all(
        type(block).__name__.startswith("FSDP") and "forward" in vars(block)
        for block in blocks(policy)
    )
    latents, timesteps, text = inputs(policy)
    for checkpointed in (False, True):
        if checkpointed:
            policy.transformer.enable_gradient_checkpointing()
        with computing(torch.bfloat16):
            with torch.no_grad():
                rollout, expected = (
                    policy.velocity(latents, timesteps, text),
                    whole.velocity(latents, timesteps, text),
                )
            update = policy.velocity(latents, timesteps, text)
        assert torch.equal(rollout, update)
        torch.testing.assert_close(
            rollout, expected, rtol=0.05, atol=0.02
        )  # its norms' weights are bf16 too
        update.square().sum().backward()
        assert all(
            p.grad.full_tensor().any() for p in policy.transformer.parameters() if p.requires_grad
        )
    assert list(policy.transformer.state_dict()) == list(whole.transformer.state_dict())


@pytest.mark.usefixtures("one_rank")
def test_fsdp_does_not_round_the_angles(
    make: Callable[..., RealPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = sharded(make(fused=True), cast_forward_inputs=True)
    seen, real = [], patching.qk_norm_rope
    monkeypatch.setattr(
        patching,
        "qk_norm_rope",
        lambda q, k, qw, kw, cos, sin, **rest: (
            seen.append(cos),
            real(q, k, qw, kw, cos, sin, **rest),
        )[1],
    )
    with torch.no_grad():
        policy.velocity(*inputs(policy))
    assert {cos.dtype for cos in seen if cos is not None} == {torch.float32}


# -------- refused


def test_transformers_that_it_does_not_know() -> None:
    wan: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 8,
        "num_layers": 1,
        "text_dim": 8,
        "freq_dim": 8,
    }
    hunyuan: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "num_single_layers": 1,
    }
    hunyuan |= {
        "num_refiner_layers": 1,
        "rope_axes_dim": (4, 4, 4),
        "text_embed_dim": 8,
        "pooled_projection_dim": 8,
    }
    fused_projections = WanTransformer3DModel(**wan)
    fused_projections.blocks[0].attn1.fuse_projections()
    for transformer, problem in (
        (nn.Linear(2, 2), "a Wan or HunyuanVideo transformer of diffusers, got Linear"),
        (
            WanTransformer3DModel(**wan, cross_attn_norm=False),
            "a norm before its cross-attention, got Identity",
        ),
        (
            WanTransformer3DModel(**wan, image_dim=8, added_kv_proj_dim=24),
            "attention to text, got attention to an image",
        ),
        (fused_projections, "separate projections, got fused projections"),
        (
            HunyuanVideoTransformer3DModel(**hunyuan, image_condition_type="token_replace"),
            "a Wan or HunyuanVideo transformer of diffusers, got HunyuanVideoTransformer3DModel",
        ),
        (
            HunyuanVideoTransformer3DModel(**hunyuan, qk_norm="layer_norm"),
            "q and k normalised with RMSNorm, got LayerNorm",
        ),
    ):
        with pytest.raises(ValueError, match=f"expected {problem}"):
            patch(transformer)
        assert not any("forward" in vars(module) for module in transformer.modules())


def test_a_policy_names_its_key(wan_folder: Path) -> None:
    policy = WanPolicy(str(wan_folder), fused=True)
    with pytest.raises(ValueError, match=r"policy.fused: .* got Linear; set it to false"):
        policy.use(nn.Linear(2, 2), nn.Linear(2, 2), CPU)


def test_fuse_on_a_device_without_weights(wan_folder: Path, recwarn: Any) -> None:
    """`plan` asks for it on the meta device, where nothing can be slow."""
    transformer = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer")
    meta = torch.device("meta")
    assert not fuse(transformer, "auto", meta)
    assert not any("forward" in vars(module) for module in transformer.modules())
    assert fuse(transformer, True, meta)
    assert "forward" in vars(transformer.blocks[0])
    assert not recwarn.list


def test_diffusers_is_not_imported() -> None:
    """Importing the package must not pull in what another trainer may not have."""
    check = "import sys, fastgrpo_kernels; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
