"""The exact savings: what each one leaves out of the work, and that it changes no bit, or by how
much it may.

test_rollout.py has more tests of the shared first step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import CPU, PROMPTS, moved, same_bits, small_rollout, weights_of
from torch import Tensor
from watched_update import Outcome, Watched, backward_of, statistics_at

from fastgrpo.config import UpdateConfig
from fastgrpo.policies.pretrained import LoRA
from fastgrpo.policies.wan import WanPolicy
from fastgrpo.training.trajectory import Rollout, branch_velocities, branch_velocity
from fastgrpo.training.update import (
    MicroBatch,
    TrainedTransition,
    accumulate_gradients,
    known_gradients,
    micro_batch,
    trained_rows,
)
from fastgrpo.training.weights import WITHOUT_ADAPTERS

EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16]
# The third advantage is clamped to -5.
AT = [(0, 0, 1.5), (1, 2, -0.5), (3, 1, -7.0), (2, 3, 0.25), (0, 4, 1.5)]
TRANSITIONS = [TrainedTransition(*at) for at in AT]
ADVANTAGES = {0: 1.5, 1: -0.5, 2: -1.0, 3: 0.25}


@pytest.fixture(scope="module")
def make_wan(
    wan_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., WanPolicy]:
    """make_wan(lora): a loaded WanPolicy whose prompts are embedded, one for each `lora`."""
    cache = str(tmp_path_factory.mktemp("cache"))

    @functools.cache
    def loaded(lora: LoRA | None = None) -> WanPolicy:
        policy = WanPolicy(
            str(wan_folder), max_sequence_length=16, text_cache=cache, text_dtype="fp32", lora=lora
        )
        policy.embed(PROMPTS, CPU)
        policy.load(CPU)
        return policy

    return loaded


def sampled(policy: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Rollout:
    """Two prompts with two videos each, under guidance."""
    wan = {"height": 32, "width": 48, "num_frames": 9} if isinstance(policy, WanPolicy) else {}
    base = {"num_generations": 2, "micro_batch_size": 1, "guidance_scale": 3.0}
    return small_rollout(policy, dtype=dtype, **(wan | base | settings))


def both_ways(
    policy: Any,
    rollout: Rollout,
    transitions: Sequence[TrainedTransition],
    cfg: UpdateConfig,
    **settings: Any,
) -> tuple[Outcome, Outcome]:
    """Branch after branch, and both in one graph."""
    one, other = (
        backward_of(
            policy, rollout, transitions, dataclasses.replace(cfg, branchwise=on), **settings
        )
        for on in (True, False)
    )
    return one, other


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_wan_shares_its_first_step(
    make_wan: Any, dtype: torch.dtype, micro_batch_size: int
) -> None:
    policy = make_wan()
    settings = {
        "num_inference_steps": 2,
        "num_generations": 4,
        "micro_batch_size": micro_batch_size,
    }
    shared, alone = (
        sampled(policy, dtype, share_first_step=share, **settings) for share in (True, False)
    )
    assert torch.equal(shared.latents, alone.latents)
    assert torch.equal(shared.log_probs, alone.log_probs)
    # The update's forward at the first step still has the rollout's bits.
    outcome = backward_of(
        policy,
        shared,
        [TrainedTransition(v, 0, 1.0) for v in range(8)],
        UpdateConfig(),
        on_policy=True,
    )
    assert outcome.stats.ratios == [1.0] * 8


REFERENCE = ["cond", "uncond"]
ORDERS = [
    # guidance, settings, on-policy, KL, forwards of one micro-batch in their order; + keeps a graph
    # and is back-propagated
    (1.0, {}, True, False, ["cond+"]),
    (1.0, {}, False, True, ["cond", "cond+"]),
    (3.0, {"branchwise": False}, True, False, ["cond+", "uncond+"]),
    (3.0, {}, True, False, ["cond+", "uncond+"]),
    (3.0, {}, False, False, ["uncond", "cond+", "uncond+"]),
    (3.0, {}, True, True, [*REFERENCE, "uncond", "cond+", "uncond+"]),
    (3.0, {}, False, True, [*REFERENCE, "uncond", "cond+", "uncond+"]),
    (3.0, {"cfg_grad": "cond_only"}, True, False, ["uncond", "cond+"]),
    (3.0, {"cfg_grad": "cond_only"}, False, True, [*REFERENCE, "uncond", "cond+"]),
]


@pytest.mark.parametrize(("guidance_scale", "settings", "on_policy", "kl", "expected"), ORDERS)
def test_forwards_and_their_order(
    tiny_policy: Any,
    guidance_scale: float,
    settings: Any,
    on_policy: bool,
    kl: bool,
    expected: list[str],
) -> None:
    """One after the other, also with no transition at all, so that ranks keep step."""
    policy = tiny_policy()
    rollout = sampled(policy, guidance_scale=guidance_scale, micro_batch_size=2)
    reference = weights_of(policy) if kl else None
    cfg = UpdateConfig(kl_coef=0.5 if kl else 0.0, **settings)
    for transitions, passes in ((TRANSITIONS, 3), ([], 2)):
        watched, stats = Watched(policy, rollout), statistics_at(on_policy)
        at = watched, rollout, transitions, max(len(transitions), 3), 7.0, cfg, reference
        accumulate_gradients(*at, stats)
        assert watched.calls == expected * passes
        assert stats.ratios == [1.0] * len(transitions)
    assert all(torch.isfinite(p.grad).all() for p in policy.transformer.parameters())


@pytest.mark.parametrize(
    "variant", ["all", "sliding", "single", "cps", "cond_only", "KL", "micro-batch of 3"]
)
def test_off_policy_one_micro_batch_is_the_joint_backward_to_the_bit(
    tiny_policy: Any, variant: str
) -> None:
    """Both add the same two terms to a gradient of zero."""
    base = tiny_policy()
    window = {"sde_window": variant, "window_size": 3} if variant in ("sliding", "single") else {}
    size = 3 if variant.startswith("micro") else 1
    rollout = sampled(
        base, sde="cps" if variant == "cps" else "dance", micro_batch_size=size, **window
    )
    policy, reference = moved(base, 0.02), weights_of(base)
    cfg = UpdateConfig(
        clip_range=0.02,
        cfg_grad="cond_only" if variant == "cond_only" else "both",
        kl_coef=0.3 if variant == "KL" else 0.0,
    )
    for video in range(4):
        transitions = [
            TrainedTransition(video, rollout.trainable_steps[video // 2][0], -0.7),
            TrainedTransition(3, rollout.trainable_steps[1][-1], 2.0),
        ][: min(size, 2)]
        branchwise, joint = both_ways(
            policy,
            rollout,
            transitions,
            cfg,
            on_policy=False,
            reference=reference if variant == "KL" else None,
        )
        assert same_bits(branchwise.gradients, joint.gradients)
        assert (branchwise.loss, branchwise.stats) == (joint.loss, joint.stats)
        assert any(g.abs().max() > 0 for g in joint.gradients)


@pytest.mark.parametrize("cfg_grad", ["both", "cond_only"])
def test_off_policy_many_micro_batches_differ_by_the_order_of_a_sum(
    tiny_policy: Any, cfg_grad: str
) -> None:
    """n terms added in fp32 in any order are within (n - 1) eps / 2 of the sum of their magnitudes
    from the exact sum, either way.
    """
    base = tiny_policy()
    rollout, policy = sampled(base), moved(base, 0.02)
    cfg = UpdateConfig(clip_range=0.02, cfg_grad=cfg_grad)
    branchwise, joint = both_ways(policy, rollout, TRANSITIONS, cfg, on_policy=False)
    terms = len(TRANSITIONS) * (2 if cfg_grad == "both" else 1)
    for one, other, magnitude in zip(
        branchwise.gradients, joint.gradients, branchwise.magnitudes, strict=True
    ):
        assert ((one - other).abs() <= (terms - 1) * EPS * magnitude).all()
    assert same_bits(branchwise.gradients, joint.gradients) == (
        cfg_grad == "cond_only"
    )  # one term a micro-batch: the same sum
    assert (branchwise.loss, branchwise.stats) == (joint.loss, joint.stats)


def allowed_difference(
    rollout: Rollout, batch: MicroBatch, gradient: Tensor, share: float, divisor: float
) -> Tensor:
    """By how much dL/dv from the noise may differ from dL/dv from the stored states.

    dL/dv = share A b e / (s^2 P) (cps: 2 A b e / P), and the noise gives s eps for e = x' -
    mean. The mean has the same bits in both; x' is mean + s eps, rounded to fp32: by at most
    eps/2 |x'|. That is eps |x'| / (2 s) of the noise's deviation. The rest are roundings of
    products: of e itself and of the few factors, in fp32 and to the velocity's dtype.
    """
    b, std, advantage = (
        c.double().view(-1, *[1] * len(rollout.latent_shape))
        for c in (batch.b, batch.std, batch.advantages.clamp(-5, 5))
    )
    slope = (share * advantage * b / math.prod(rollout.latent_shape) / divisor).abs() * (
        std**-2 if rollout.normalized else 2
    )
    return (
        slope * EPS / 2 * batch.next_latents.double().abs()
        + (6 * EPS + torch.finfo(gradient.dtype).eps) * gradient.double().abs()
    )


@pytest.mark.parametrize("sde", ["dance", "flow", "linear", "cps"])
@pytest.mark.parametrize("sde_window", ["all", "sliding", "single"])
def test_on_policy_it_is_the_joint_backward_but_for_the_rounding_of_the_states(
    tiny_policy: Any, sde: str, sde_window: str
) -> None:
    policy = tiny_policy()
    rollout = sampled(policy, sde=sde, sde_window=sde_window, window_size=3)
    cfg = UpdateConfig()
    for transition in [
        TrainedTransition(v, step, (1.5, -0.5, -7.0, 0.25)[v])
        for v in range(4)
        for step in rollout.trainable_steps[v // 2]
    ]:
        known, joint = both_ways(policy, rollout, [transition], cfg, on_policy=True)
        assert known.stats == joint.stats
        assert known.stats.ratios == [1.0]
        assert known.loss == joint.loss
        batch, bounds = micro_batch(rollout, *trained_rows(rollout, [transition])), {}
        for branch, share in (("cond", 3.0), ("uncond", -2.0)):
            one, other = known.watched.gradients[branch], joint.watched.gradients[branch]
            bounds[branch] = allowed_difference(rollout, batch, other, share, 7.0)
            assert other.abs().max() > 0
            assert ((one.double() - other.double()).abs() <= bounds[branch]).all()
        # What a parameter gets is J^T dL/dv summed over both branches, in 24 and more fp32 terms:
        # the same bound, carried through |J|^T.
        limits = [torch.zeros_like(p, dtype=torch.float64) for p in policy.transformer.parameters()]
        for branch in ("cond", "uncond"):
            velocity = branch_velocity(
                policy,
                rollout,
                batch.latents,
                batch.index,
                conditional=branch == "cond",
            ).flatten()
            arriving = (
                bounds[branch].flatten()
                + 64 * EPS * joint.watched.gradients[branch].double().abs().flatten()
            )
            for output, amount in zip(velocity, arriving, strict=True):
                rows = torch.autograd.grad(
                    output, [*policy.transformer.parameters()], retain_graph=True
                )
                for limit, row in zip(limits, rows, strict=True):
                    limit += row.double().abs() * amount
        for one, other, limit in zip(known.gradients, joint.gradients, limits, strict=True):
            assert ((one.double() - other.double()).abs() <= limit).all()


@pytest.mark.parametrize(
    ("dtype", "lora", "micro_batch_size"),
    [
        (torch.float32, None, 1),
        (torch.bfloat16, None, 1),
        (torch.bfloat16, LoRA(rank=4), 1),
        (torch.float32, LoRA(rank=4), 2),
    ],
)
def test_wan(make_wan: Any, dtype: torch.dtype, lora: LoRA | None, micro_batch_size: int) -> None:
    """On-policy: what goes into the branches is within its bound, and what comes of it has the bits
    of the joint graph's backward.
    """
    policy = make_wan(lora)
    if lora is not None:  # B starts at zero
        policy = moved(policy, 0.05)
    rollout = sampled(policy, dtype, num_inference_steps=4, micro_batch_size=micro_batch_size)
    transitions = [TrainedTransition(0, 2, 1.5), TrainedTransition(3, 0, -0.8)][:micro_batch_size]
    cfg = UpdateConfig()
    known, joint = both_ways(policy, rollout, transitions, cfg, on_policy=True)
    assert known.stats.ratios == joint.stats.ratios == [1.0] * len(transitions)
    assert known.loss == joint.loss
    batch = micro_batch(rollout, *trained_rows(rollout, transitions))
    for branch, share in (("cond", 3.0), ("uncond", -2.0)):
        one, other = known.watched.gradients[branch], joint.watched.gradients[branch]
        assert (
            (one.double() - other.double()).abs()
            <= allowed_difference(rollout, batch, other, share, 7.0)
        ).all()

    trained = [p for p in policy.transformer.parameters() if p.requires_grad]
    velocities = branch_velocities(policy, rollout, batch.latents, batch.index)
    gradients = known_gradients(rollout, batch, cfg, micro_batch_size / 7.0, velocities[0].dtype)
    plain = torch.autograd.grad(velocities, trained, gradients)
    assert same_bits(known.gradients, plain)  # type: ignore[arg-type]

    # Off-policy, and with a KL where the adapters are what is trained: the joint backward to the
    # bit.
    other_weights = moved(policy, 1e-3, seed=2)
    reference = None if lora is None else WITHOUT_ADAPTERS
    off = UpdateConfig(clip_range=0.02, kl_coef=0.0 if reference is None else 0.1)
    branchwise, joint = both_ways(
        other_weights, rollout, transitions, off, on_policy=False, reference=reference
    )
    assert same_bits(branchwise.gradients, joint.gradients)
    assert branchwise.stats == joint.stats
    assert 1.0 not in branchwise.stats.ratios


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_one_branch_live_at_a_time(make_wan: Any, dtype: torch.dtype) -> None:
    policy = make_wan()
    rollout = sampled(policy, dtype, num_inference_steps=3)
    transitions = [TrainedTransition(0, 1, 1.5), TrainedTransition(2, 0, -0.5)]
    alone = Watched(policy, rollout)
    batch = micro_batch(rollout, *trained_rows(rollout, transitions[:1]))
    velocity = branch_velocity(alone, rollout, batch.latents, batch.index, conditional=True)  # type: ignore[arg-type]
    one_branch = alone.now
    velocity.sum().backward()
    assert alone.now == 0
    assert one_branch > 100 * batch.latents.numel()
    peaks = {
        name: backward_of(
            policy, rollout, transitions, UpdateConfig(**settings), on_policy=on_policy
        ).watched.peak
        for name, settings, on_policy in (
            ("joint", {"branchwise": False}, True),
            ("on-policy", {}, True),
            ("off-policy", {}, False),
            ("one branch trained", {"cfg_grad": "cond_only"}, False),
        )
    }
    assert peaks == {
        "joint": 2 * one_branch,
        "on-policy": one_branch,
        "off-policy": one_branch,
        "one branch trained": one_branch,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_a_branch_alone_has_the_bits_it_has_beside_the_other(
    make_wan: Any, dtype: torch.dtype, micro_batch_size: int
) -> None:
    policy = make_wan()
    rollout = sampled(policy, dtype, num_inference_steps=3, micro_batch_size=micro_batch_size)
    transitions = [TrainedTransition(v, step, 1.0) for v, step in ((3, 1), (0, 0), (2, 1))]
    rows = trained_rows(rollout, transitions[:micro_batch_size])
    batch = micro_batch(rollout, *rows)
    at = batch.latents, batch.index
    with torch.no_grad():
        together = branch_velocities(policy, rollout, *at)
        alone = [
            branch_velocity(policy, rollout, *at, conditional=conditional)
            for conditional in (True, False)
        ]
    assert same_bits(alone, together)  # type: ignore[arg-type]
