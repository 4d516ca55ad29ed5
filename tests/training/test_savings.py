"""The exact savings: what each one leaves out of the work, and that it changes no bit, or by how
much it may.

test_rollout.py has more tests of the shared first step.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import CPU, PROMPTS, Recorder, moved, same_bits, small_rollout, weights_of
from torch import Tensor

from fastgrpo.config import UpdateConfig
from fastgrpo.policies.pretrained import LoRA
from fastgrpo.policies.wan import WanPolicy
from fastgrpo.training.trajectory import Rollout, branch_velocities, branch_velocity
from fastgrpo.training.update import (
    MicroBatch,
    TrainedTransition,
    UpdateStatistics,
    accumulate_gradients,
    backpropagate,
    known_gradients,
    micro_batch,
    update,
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


class Watched:
    """A policy whose forwards are written down: which branch, whether it keeps a graph, what comes
    back into it, what it keeps alive.
    """

    def __init__(self, policy: Any, rollout: Rollout) -> None:
        self.policy, self.transformer = policy, policy.transformer
        self.uncond = (
            None if rollout.unconditional is None else next(iter(rollout.unconditional.values()))[0]
        )
        self.calls: list[str] = []
        self.gradients: dict[str, Tensor] = {}
        self.now = self.peak = 0

    def velocity(self, latents: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        branch = (
            "cond"
            if self.uncond is None
            or not torch.equal(next(iter(conditioning.values()))[0], self.uncond)
            else "uncond"
        )
        with torch.autograd.graph.saved_tensors_hooks(
            functools.partial(Kept, self), lambda kept: kept.tensor
        ):
            velocity = self.policy.velocity(latents, timesteps, conditioning)
        self.calls.append(branch + ("+" if velocity.requires_grad else ""))
        if velocity.requires_grad:
            velocity.register_hook(functools.partial(self.gradients.__setitem__, branch))
        return velocity


class Kept:
    """A tensor that a forward keeps for its backward; counted as long as it lives."""

    def __init__(self, watched: Watched, tensor: Tensor) -> None:
        self.watched, self.tensor, self.size = (
            watched,
            tensor,
            tensor.numel() * tensor.element_size(),
        )
        watched.now += self.size
        watched.peak = max(watched.peak, watched.now)

    def __del__(self) -> None:
        self.watched.now -= self.size


@dataclasses.dataclass
class Outcome:
    gradients: list[Tensor]
    magnitudes: list[Tensor]
    """Sum of the magnitudes of all the terms that each gradient was added up from."""
    loss: float
    stats: UpdateStatistics
    watched: Watched


def backward_of(
    policy: Any,
    rollout: Rollout,
    transitions: Sequence[TrainedTransition],
    cfg: UpdateConfig,
    *,
    on_policy: bool,
    reference: Any = None,
) -> Outcome:
    watched, stats = Watched(policy, rollout), statistics_at(on_policy)
    trained = [p for p in policy.transformer.parameters() if p.requires_grad]
    magnitudes = [torch.zeros_like(p) for p in trained]
    hooks = [
        p.register_hook(functools.partial(add_magnitude, m))
        for p, m in zip(trained, magnitudes, strict=True)
    ]
    policy.transformer.zero_grad(set_to_none=True)
    loss = accumulate_gradients(
        watched, rollout, transitions, len(transitions), 7.0, cfg, reference, stats
    )
    for hook in hooks:
        hook.remove()
    return Outcome([p.grad.clone() for p in trained], magnitudes, loss, stats, watched)


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


def statistics_at(on_policy: bool) -> UpdateStatistics:
    return UpdateStatistics(skipped=[] if on_policy else [False])


def add_magnitude(total: Tensor, term: Tensor) -> None:
    total += term.abs()


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
        batch, bounds = micro_batch(rollout, [transition]), {}
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
                batch.sample_indices,
                batch.steps,
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
    batch = micro_batch(rollout, transitions)
    for branch, share in (("cond", 3.0), ("uncond", -2.0)):
        one, other = known.watched.gradients[branch], joint.watched.gradients[branch]
        assert (
            (one.double() - other.double()).abs()
            <= allowed_difference(rollout, batch, other, share, 7.0)
        ).all()

    trained = [p for p in policy.transformer.parameters() if p.requires_grad]
    velocities = branch_velocities(
        policy, rollout, batch.latents, batch.sample_indices, batch.steps
    )
    gradients = known_gradients(rollout, batch, cfg, micro_batch_size / 7.0, velocities[0].dtype)
    assert same_bits(known.gradients, torch.autograd.grad(velocities, trained, gradients))  # type: ignore[arg-type]

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
    batch = micro_batch(rollout, transitions[:1])
    velocity = branch_velocity(
        alone, rollout, batch.latents, batch.sample_indices, batch.steps, conditional=True
    )  # type: ignore[arg-type]
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
    batch = micro_batch(
        rollout,
        [TrainedTransition(3, 1, 1.0), TrainedTransition(0, 0, 1.0), TrainedTransition(2, 1, 1.0)][
            :micro_batch_size
        ],
    )
    at = batch.latents, batch.sample_indices, batch.steps
    with torch.no_grad():
        together = branch_velocities(policy, rollout, *at)
        alone = [
            branch_velocity(policy, rollout, *at, conditional=conditional)
            for conditional in (True, False)
        ]
    assert same_bits(alone, together)  # type: ignore[arg-type]


def test_only_until_a_weight_has_moved_is_the_gradient_taken_for_known(
    tiny_policy: Any, one_rank: Any
) -> None:
    policy, seen = tiny_policy(), {}
    rollout = sampled(policy)
    cfg = UpdateConfig(gradient_accumulation=2, clip_range=0.02, max_grad_norm=1e9)
    for branchwise in (True, False):
        trained = copy.deepcopy(policy)
        watched, optimizer = Watched(trained, rollout), Recorder(trained, 0.02)
        stats = update(
            watched,
            optimizer,
            rollout,
            [0, 1, 2, 3],
            ADVANTAGES,
            dataclasses.replace(cfg, branchwise=branchwise),  # type: ignore[arg-type]
        )
        seen[branchwise] = stats, optimizer.seen, watched.calls
    first = 2 * 3  # videos, and int(0.6 * 5) steps of each
    assert seen[True][2] == ["cond+", "uncond+"] * first + ["uncond", "cond+", "uncond+"] * first
    assert seen[False][2] == ["cond+", "uncond+"] * 2 * first
    for stats, _, _ in seen.values():
        assert stats.num_first == first
        assert stats.ratios[:first] == [1.0] * first
        assert 1.0 not in stats.ratios[first:]
    for one, other in zip(
        seen[True][1], seen[False][1], strict=True
    ):  # and on the whole the two train alike
        for p, q in zip(one, other, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-5 * q.abs().max().item())


@pytest.mark.parametrize("fault", ["state", "log-probability"])
def test_a_step_left_out_leaves_the_next_one_on_policy(
    tiny_policy: Any, one_rank: Any, fault: str
) -> None:
    """What is not finite shows in the loss, though not in the gradient that is known from the
    noise.
    """
    policy = tiny_policy()
    rollout = sampled(policy)
    (rollout.latents if fault == "state" else rollout.log_probs)[0] = math.nan
    watched, optimizer = Watched(policy, rollout), Recorder(policy, 0.02)
    cfg = UpdateConfig(gradient_accumulation=2, max_grad_norm=1e9)
    stats = update(watched, optimizer, rollout, [0, 1, 2, 3], ADVANTAGES, cfg)  # type: ignore[arg-type]
    assert stats.skipped == [True, False]
    assert watched.calls == ["cond+", "uncond+"] * 12
    assert stats.ratios[6:] == [1.0] * 6
    assert len(optimizer.seen) == 1
    assert all(torch.isfinite(g).all() for g in optimizer.seen[0])


def test_a_ratio_that_is_not_1_shows(tiny_policy: Any) -> None:
    """Then the gradient is that of ratio 1 all the same, and the statistics have the ratio that the
    forward gave.
    """
    base = tiny_policy()
    rollout, policy = sampled(base), moved(base, 0.02)
    batch = micro_batch(rollout, TRANSITIONS[:1])
    watched = Watched(policy, rollout)
    _, (ratio, *_) = backpropagate(
        watched, rollout, TRANSITIONS[:1], UpdateConfig(), None, scale=1 / 7.0, on_policy=True
    )  # type: ignore[arg-type]
    joint = backward_of(
        policy, rollout, TRANSITIONS[:1], UpdateConfig(branchwise=False), on_policy=True
    )
    assert ratio.tolist() == joint.stats.ratios != [1.0]
    expected = known_gradients(rollout, batch, UpdateConfig(), 1 / 7.0, torch.float32)
    assert same_bits([watched.gradients["cond"], watched.gradients["uncond"]], expected)  # type: ignore[arg-type]


SHARDED = """
import json, torch
from conftest import TinyPolicy
from tiny_training import SMALL
from torch.distributed.tensor import DTensor
from fastgrpo.config import ParallelConfig, RolloutConfig, RuntimeConfig, UpdateConfig
from fastgrpo.distributed import collectives
from fastgrpo.distributed.sharding import prepare
from fastgrpo.training.rollout import sample_groups, start_rollout
from fastgrpo.training.update import TrainedTransition, UpdateStatistics, accumulate_gradients

device = collectives.start(RuntimeConfig(device="cpu"))
rank, found, prompts = collectives.rank(), {}, ["a cat", "a dog"]
size = {"num_generations": 2, "micro_batch_size": 1, "guidance_scale": 3.0}
cfg = RolloutConfig(**(SMALL | size))
orders = {"joint": (False, True), "known": (True, True), "off-policy": (True, False)}
# one rank has fewer
transitions = [TrainedTransition(*at) for at in AT][: 3 - 2 * rank]
for shard in ("none", "full"):
    policy = TinyPolicy()
    prepare(policy.transformer, ParallelConfig(shard=shard), device, torch.float32)
    at = {"seed": 3, "iteration": 1, "first_slot": 2 * rank, "device": device}
    rollout = start_rollout(policy, prompts, cfg, **at)
    for _ in sample_groups(policy, rollout):
        pass
    for name, (branchwise, on_policy) in orders.items():
        policy.transformer.zero_grad(set_to_none=True)
        policy.batch_sizes.clear()
        stats = UpdateStatistics(skipped=[] if on_policy else [False])
        update = UpdateConfig(branchwise=branchwise)
        accumulate_gradients(policy, rollout, transitions, 3, 7.0, update, None, stats)
        parameters = list(policy.transformer.parameters())
        collectives.average_gradients(parameters)
        own = [p.grad for p in parameters]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in own]
        gradients = [g.flatten().tolist() for g in whole]
        found[f"{shard} {name}"] = [gradients, stats.ratios, len(policy.batch_sizes)]
print(json.dumps(found))
collectives.stop()
"""


def test_sharded_ranks_keep_step_and_get_the_same_gradients(run_ranks: Any) -> None:
    """FSDP2 over two processes: each order of the branches against the joint backward of whole
    copies.
    """
    first, second = run_ranks(f"AT = {AT[:3]}\n{SHARDED}")
    expected = [torch.tensor(g) for g in first["none joint"][0]]
    for key, (gradients, ratios, forwards) in first.items():
        assert forwards == second[key][2] == (9 if "off-policy" in key else 6)
        assert gradients == second[key][0]
        assert ratios + second[key][1] == [1.0] * 4
        for one, other in zip(gradients, expected, strict=True):  # eps |x'| / (2 s) is about 1e-6
            torch.testing.assert_close(
                torch.tensor(one), other, rtol=0, atol=1e-5 * other.abs().max().item()
            )


def test_the_decode_is_the_untiled_fp32_one_and_tiles_blend(make_wan: Any) -> None:
    policy = make_wan()
    latents = torch.randn(2, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (
        torch.tensor(row)[:, None, None, None]
        for row in (policy.vae.config.latents_mean, policy.vae.config.latents_std)
    )
    assert not policy.vae.use_tiling
    untiled = policy.decode(latents)
    with torch.no_grad():
        exact = torch.cat([policy.vae.decode((x * std + mean)[None]).sample for x in latents])
    torch.testing.assert_close(
        untiled, (exact / 2 + 0.5).clamp(0, 1).transpose(1, 2), rtol=0, atol=1e-5
    )
    policy.vae.enable_tiling(32, 32, 24, 24)  # of 64 x 64 pixels
    assert (policy.decode(latents) - untiled).abs().max() > 1e-3
