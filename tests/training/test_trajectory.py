"""Seeds that follow from words, coefficients by video and step, and the forward that rollout and
update share.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo.config import RolloutConfig
from fastgrpo.training.rollout import start_rollout
from fastgrpo.training.trajectory import (
    WITHOUT_ADAPTERS,
    Rollout,
    branch_velocities,
    derive_seed,
    local_part,
    using_weights,
)

SMALL = {"height": 2, "width": 2, "num_frames": 2, "num_inference_steps": 5, "num_generations": 3}


def rollout_of(policy: Any, prompts: list[str], **overrides: Any) -> Rollout:
    cfg = RolloutConfig(**(SMALL | overrides))
    return start_rollout(
        policy, prompts, cfg, seed=1, iteration=1, first_slot=0, device=torch.device("cpu")
    )


def test_seeds_are_pinned() -> None:
    """Another value would be another run from the same configuration: `b2sum -l 64` of the words as
    Python writes them, halved.
    """
    assert derive_seed(0, "sde", 1, 0, 0) == 5293668079599536886
    assert derive_seed(2**62, "first", 7, 3, 15) == 3791523811210728182
    assert (
        derive_seed("epoch")
        == int.from_bytes(hashlib.blake2b(b"('epoch',)", digest_size=8).digest(), "little") // 2
    )


def test_seeds_of_different_words_differ() -> None:
    purposes = ("sde", "first", "order", "epoch")
    words = list(itertools.product((0, 1), purposes, range(10), range(8), range(16)))
    # The same digits cut differently, or as text, are other words too.
    words += [(1, 23), (12, 3), (123,), ("1", 23), (1, "23"), ("1, 23",), (0,), (0, 0), ()]  # type: ignore[list-item]
    assert len({derive_seed(*w) for w in words}) == len(words)


@given(st.lists(st.integers(0, 2**70) | st.text(), max_size=4))
def test_a_seed_is_a_non_negative_int64_and_a_function_of_its_words(words: list[int | str]) -> None:
    assert 0 <= derive_seed(*words) < 2**63
    assert derive_seed(*words) == derive_seed(*words)


def test_coefficients_are_looked_up_by_prompt_and_step(tiny_policy: Any) -> None:
    rollout = rollout_of(tiny_policy(), ["a", "b", "c"])
    rollout.a, rollout.b, rollout.std = (
        torch.arange(15, dtype=torch.float64).view(3, 5) + shift for shift in (0, 100, 200)
    )
    a, b, std = rollout.coefficients(torch.tensor([0, 2, 3, 8, 8]), torch.tensor([4, 0, 1, 2, 4]))
    assert a.tolist() == [4.0, 0.0, 6.0, 12.0, 14.0]  # prompts 0, 0, 1, 2, 2
    assert b.tolist() == [104.0, 100.0, 106.0, 112.0, 114.0]
    assert std.tolist() == [204.0, 200.0, 206.0, 212.0, 214.0]
    assert a.dtype == b.dtype == std.dtype == torch.float64


def test_counts(tiny_policy: Any) -> None:
    rollout = rollout_of(tiny_policy(), ["a", "b"])
    assert (rollout.num_videos, rollout.num_steps) == (6, 5)
    assert rollout.latents.shape == (6, 6, 3, 2, 2, 2)
    assert rollout.log_probs.shape == (6, 5)


@pytest.mark.parametrize("rounding", ["trunc", "none"])
def test_branches_are_the_policys_own_velocities(tiny_policy: Any, rounding: str) -> None:
    policy = tiny_policy()
    rollout = rollout_of(policy, ["a", "b", "c"], guidance_scale=3.0, timestep_rounding=rounding)
    x = torch.randn(4, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    videos, steps = torch.tensor([7, 0, 3, 7]), torch.tensor([2, 2, 4, 1])
    conditional, unconditional = branch_velocities(policy, rollout, x, videos, steps)

    shifted = [
        5 * t / (1 + 4 * t) for t in (1.0, 0.8, 0.6, 0.4, 0.2)
    ]  # method.md section 1, N 5, shift 5
    times = torch.tensor(
        [
            1000 * shifted[i] // 1 if rounding == "trunc" else 1000 * shifted[i]
            for i in steps.tolist()
        ],
        dtype=torch.float32,
    )
    assert torch.equal(conditional, policy.velocity(x, times, policy.encode(["c", "a", "b", "c"])))
    assert unconditional is not None
    assert torch.equal(unconditional, policy.velocity(x, times, policy.encode(["", "", "", ""])))
    assert not torch.equal(conditional, unconditional)


def test_without_guidance_there_is_one_branch_and_one_forward(tiny_policy: Any) -> None:
    policy = tiny_policy()
    rollout = rollout_of(policy, ["a"], guidance_scale=1.0)
    assert rollout.unconditional is None
    policy.batch_sizes.clear()
    _, unconditional = branch_velocities(
        policy, rollout, torch.zeros(2, 3, 2, 2, 2), torch.tensor([0, 1]), torch.tensor([0, 1])
    )
    assert unconditional is None
    assert policy.batch_sizes == [2]


def test_bf16_runs_the_forward_and_leaves_the_weights(tiny_policy: Any) -> None:
    policy = tiny_policy()
    rollout = rollout_of(policy, ["a"], guidance_scale=2.0)
    x, at = (
        torch.randn(2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0)),
        (torch.tensor([0, 1]), torch.tensor([1, 1])),
    )
    full = branch_velocities(policy, rollout, x, *at)
    rollout.compute_dtype = torch.bfloat16
    half = branch_velocities(policy, rollout, x, *at)
    for exact, rounded in zip(full, half, strict=True):
        assert exact is not None
        assert rounded is not None
        # The weights of the products have 8 bits; 24 terms of about 1 / sqrt(24) each.
        assert 1e-5 < (exact - rounded.float()).abs().max().item() < 0.05
    assert all(p.dtype == torch.float32 for p in policy.transformer.parameters())


def test_branches_carry_gradients_to_the_weights(tiny_policy: Any) -> None:
    policy = tiny_policy()
    rollout = rollout_of(policy, ["a"], guidance_scale=2.0)
    branches = branch_velocities(
        policy, rollout, torch.ones(1, 3, 2, 2, 2), torch.tensor([0]), torch.tensor([0])
    )
    for branch in branches:
        assert branch is not None
        (gradient,) = torch.autograd.grad(branch.sum(), [policy.transformer.A])
        assert gradient.abs().max() > 0


def weights_of(policy: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.transformer.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_other_weights_for_a_while(tiny_policy: Any) -> None:
    policy, own, other, third = (
        tiny_policy(0),
        weights_of(tiny_policy(0)),
        weights_of(tiny_policy(1)),
        weights_of(tiny_policy(2)),
    )
    given, network = {name: w.clone() for name, w in other.items()}, policy.transformer
    with using_weights(policy, given):
        assert same(weights_of(policy), other)
        assert same(given, own), "they are exchanged"
        with using_weights(policy, third):
            assert same(weights_of(policy), weights_of(tiny_policy(2)))
        with using_weights(policy, None):
            assert same(weights_of(policy), other)
    assert same(weights_of(policy), own)
    assert same(given, other)
    assert policy.transformer is network
    with using_weights(policy, {"A": given["A"]}):  # those not named stay
        assert same(weights_of(policy), own | {"A": other["A"]})


def test_own_weights_come_back_after_an_error(tiny_policy: Any) -> None:
    policy = tiny_policy(0)
    with (
        pytest.raises(RuntimeError, match="inside"),
        using_weights(policy, weights_of(tiny_policy(1))),
    ):
        raise RuntimeError("inside")
    assert same(weights_of(policy), weights_of(tiny_policy(0)))


def test_without_adapters_a_lora_is_off(tiny_policy: Any) -> None:
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1}
    network = WanTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=8, freq_dim=16, **shape
    ).eval()
    inputs = {"hidden_states": torch.randn(1, 4, 1, 4, 4), "timestep": torch.tensor([500.0])}
    inputs |= {"encoder_hidden_states": torch.randn(1, 3, 8)}
    policy = tiny_policy()
    policy.transformer = network
    with torch.no_grad():
        base = network(**inputs).sample
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        trained = [name for name, p in network.named_parameters() if p.requires_grad]
        adapted = network(**inputs).sample
        assert not torch.equal(adapted, base)
        with using_weights(policy, WITHOUT_ADAPTERS):
            assert torch.equal(network(**inputs).sample, base)
        assert torch.equal(network(**inputs).sample, adapted)
    assert [name for name, p in network.named_parameters() if p.requires_grad] == trained


def test_the_local_part_of_a_whole_tensor_is_itself() -> None:
    tensor = torch.zeros(3)
    assert local_part(tensor) is tensor
