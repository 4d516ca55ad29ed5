"""The shipped policy: size, start scores, room for RL, guidance, and what it refuses."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from shapes_samples import sample, start_scores

from fastgrpo.policies.fused import fused_serves
from fastgrpo.shapes.captions import all_captions
from fastgrpo.shapes.judge import ShapesJudge
from fastgrpo.shapes.policy import SHIPPED_CHECKPOINT, ShapesPolicy, frame_positions

PROMPTS = [str(caption) for caption in all_captions()]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy() -> ShapesPolicy:
    shipped = ShapesPolicy()
    shipped.load(CPU)
    return shipped


def test_the_shipped_checkpoint_is_small_and_knows_no_machine() -> None:
    files = [path for path in SHIPPED_CHECKPOINT.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 4e6
    assert "_name_or_path" not in json.loads(
        (SHIPPED_CHECKPOINT / "transformer" / "config.json").read_text()
    )


def test_loaded_for_training(policy: ShapesPolicy) -> None:
    assert isinstance(policy.transformer, WanTransformer3DModel)
    assert not policy.transformer.training
    assert {parameter.dtype for parameter in policy.transformer.parameters()} == {torch.float32}
    assert policy.fps == 4


def test_fused_is_the_same_network() -> None:
    """Velocity and gradients are diffusers' own but for rounding, with the same bits without
    gradients and for a video beside others; `auto` takes it where it is compiled.
    """
    plain, fused, auto = (ShapesPolicy(fused=value) for value in (False, True, "auto"))
    for made in (plain, fused, auto):
        made.load(CPU)
    assert (plain.is_fused, fused.is_fused) == (False, True)
    assert auto.is_fused == fused_serves(CPU)
    assert list(plain.transformer.state_dict()) == list(fused.transformer.state_dict())
    draw = torch.Generator().manual_seed(0)
    latents, weight = (torch.randn(4, 96, 8, 1, 1, generator=draw) for _ in range(2))
    timesteps = torch.tensor([900.0, 700.0, 400.0, 20.0])
    text = plain.encode(PROMPTS[:4])
    velocities = [made.velocity(latents, timesteps, text) for made in (plain, fused)]
    torch.testing.assert_close(velocities[1], velocities[0], rtol=1e-4, atol=1e-5)
    for velocity in velocities:
        (velocity * weight).sum().backward()
    for (name, ours), theirs in zip(
        fused.transformer.named_parameters(), plain.transformer.parameters(), strict=True
    ):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    with torch.no_grad():
        assert torch.equal(fused.velocity(latents, timesteps, text), velocities[1])
        others = torch.cat([latents[:2], 3 * latents[2:]])
        assert torch.equal(fused.velocity(others, timesteps, text)[:2], velocities[1][:2])
        arguments = torch.cat([latents, torch.zeros(4, 2, 8, 1, 1)], dim=1), timesteps
        text = text["encoder_hidden_states"]
        whole = fused.transformer(*arguments, text).sample
        assert torch.equal(whole, fused.transformer(*arguments, text, return_dict=False)[0])
        kwargs = {"attention_kwargs": {}}  # through diffusers' own forward
        torch.testing.assert_close(
            fused.transformer(*arguments, text, **kwargs).sample, whole, rtol=1e-4, atol=1e-5
        )


def test_only_one_size_can_be_made(policy: ShapesPolicy) -> None:
    assert policy.latent_shape(16, 16, 8) == (96, 8, 1, 1)
    for size in ((32, 16, 8), (16, 32, 8), (16, 16, 9)):
        with pytest.raises(
            ValueError, match=f"height {size[0]}, width {size[1]}, num_frames {size[2]}"
        ):
            ShapesPolicy().latent_shape(*size)


def test_start_scores_leave_room_at_every_stage(policy: ShapesPolicy) -> None:
    quality, motion, alignment = start_scores(policy, seed=7, repeats=4).tolist()
    assert 0.25 < quality < 0.45
    assert 0.28 < motion < 0.48
    assert 0.47 < alignment < 0.68


def test_selection_beats_the_mean_so_there_is_something_to_reinforce(policy: ShapesPolicy) -> None:
    prompts = [prompt for prompt in PROMPTS[::4] for _ in range(16)]
    scores, valid = ShapesJudge().score(sample(policy, prompts, seed=8), prompts, policy.fps)
    assert valid.all()
    groups = scores.view(12, 16, 3)
    assert (groups.std(1) > 0.02).all()  # every group has a signal at every stage
    assert (groups.amax(1) > groups.mean(1)).all()
    assert groups[:, :, 2].amax(1).mean() > 2.0 * groups[:, :, 2].mean()


def test_guidance_works(policy: ShapesPolicy) -> None:
    """The unconditional branch is trained: guidance pulls samples towards the caption."""
    generator = torch.Generator().manual_seed(9)
    latents = torch.randn(48, 96, 8, 1, 1, generator=generator)
    judge = ShapesJudge()
    named, empty = policy.encode(PROMPTS), policy.encode([""] * 48)
    aligned = {}
    with torch.no_grad():
        for guidance in (0.0, 1.0, 2.5):
            x = latents
            sigmas = [5 * t / (1 + 4 * t) for t in (1 - i / 16 for i in range(17))]
            for sigma, following in pairwise(sigmas):
                steps = torch.full((48,), 1000 * sigma)
                free = policy.velocity(x, steps, empty)
                x = x - (sigma - following) * (
                    free + guidance * (policy.velocity(x, steps, named) - free)
                )
            found = torch.stack(judge.classify(policy.decode(x)), dim=1)
            wanted = torch.tensor([(c.colour, c.shape, c.direction) for c in all_captions()])
            aligned[guidance] = (found == wanted).double().mean().item()
    assert aligned[0.0] < 0.45  # chance is 0.28
    assert aligned[1.0] > aligned[0.0] + 0.2
    assert aligned[2.5] > aligned[1.0] + 0.05


def test_frame_positions_go_half_way_round_the_circle() -> None:
    cosine, sine = frame_positions().double().flatten(1)
    torch.testing.assert_close(
        torch.atan2(sine, cosine),
        torch.linspace(1, 15, 8).double() * torch.pi / 16,
        atol=1e-6,
        rtol=0,
    )
    torch.testing.assert_close(cosine**2 + sine**2, torch.ones(8).double(), atol=1e-6, rtol=0)


def test_the_frame_channels_tell_the_direction_of_time(policy: ShapesPolicy) -> None:
    latents = torch.randn(2, 96, 8, 1, 1, generator=torch.Generator().manual_seed(10))
    steps, conditioning = torch.full((2,), 500.0), policy.encode(PROMPTS[:2])
    with torch.no_grad():
        forwards = policy.velocity(latents, steps, conditioning)
        backwards = policy.velocity(latents.flip(2), steps, conditioning).flip(2)
    assert (forwards - backwards).abs().max() > 0.1


def test_velocity_is_differentiable_and_the_same_in_any_order(policy: ShapesPolicy) -> None:
    latents = torch.randn(16, 96, 8, 1, 1, generator=torch.Generator().manual_seed(11))
    steps, order = (
        torch.linspace(1000, 100, 16),
        torch.randperm(16, generator=torch.Generator().manual_seed(12)),
    )
    velocity = policy.velocity(latents, steps, policy.encode(PROMPTS[:16]))
    assert velocity.shape == latents.shape
    shuffled = policy.velocity(
        latents[order], steps[order], policy.encode([PROMPTS[i] for i in order])
    )
    assert torch.equal(shuffled, velocity[order])
    (gradient,) = torch.autograd.grad(
        velocity.square().mean(), [policy.transformer.proj_out.weight]
    )
    assert gradient.abs().sum() > 0


def test_an_exported_policy_loads_again(policy: ShapesPolicy, tmp_path: Path) -> None:
    changed = ShapesPolicy()
    changed.load(CPU)
    with torch.no_grad():
        changed.transformer.proj_out.bias.add_(0.5)
    changed.save_pretrained(tmp_path / "export", changed.transformer.state_dict())
    again = ShapesPolicy(str(tmp_path / "export"))
    again.load(CPU)
    plain = WanTransformer3DModel.from_pretrained(tmp_path / "export")
    for name, tensor in changed.transformer.state_dict().items():
        assert torch.equal(again.transformer.state_dict()[name], tensor)
        assert torch.equal(plain.state_dict()[name], tensor)
    latents = torch.randn(2, 96, 8, 1, 1, generator=torch.Generator().manual_seed(13))
    assert torch.equal(again.decode(latents), policy.decode(latents))


def test_a_checkpoint_folder_brings_its_own_codec(policy: ShapesPolicy, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(SHIPPED_CHECKPOINT, folder)
    latents = torch.randn(1, 96, 8, 1, 1, generator=torch.Generator().manual_seed(14))
    own = ShapesPolicy(str(folder))
    own.load(CPU)
    assert torch.equal(own.decode(latents), policy.decode(latents))
    tensors = load_file(folder / "codec.safetensors")
    save_file(tensors | {"mean": tensors["mean"] + 0.5}, folder / "codec.safetensors")
    own.load(CPU)
    assert (own.decode(latents) - policy.decode(latents)).max() > 0.1


def test_broken_checkpoints_are_refused_with_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        ShapesPolicy(str(tmp_path / "none")).load(CPU)
    with pytest.raises(ValueError, match=r"policy\.checkpoint: .*config\.json"):
        ShapesPolicy(str(tmp_path)).load(CPU)
    folder = tmp_path / "transformer"
    shutil.copytree(SHIPPED_CHECKPOINT / "transformer", folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"policy\.checkpoint: expected a readable"):
        ShapesPolicy(str(tmp_path)).load(CPU)
    weights.unlink()
    with pytest.raises(ValueError, match=r"policy\.checkpoint: .*diffusion_pytorch_model"):
        ShapesPolicy(str(tmp_path)).load(CPU)
    shutil.rmtree(folder)
    WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=8,
        ffn_dim=8,
        num_layers=1,
    ).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"expected .*'in_channels': 98"):
        ShapesPolicy(str(tmp_path)).load(CPU)


def test_a_prompt_outside_the_grammar_is_refused(policy: ShapesPolicy) -> None:
    with pytest.raises(ValueError, match="got 'circle'"):
        policy.encode(["a red circle moving left"])
    with pytest.raises(ValueError, match="got 'circle'"):
        ShapesPolicy().check_prompts([*PROMPTS, "a red circle moving left"])
    ShapesPolicy().check_prompts(PROMPTS)
