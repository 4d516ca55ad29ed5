"""The update against one large float64 statement of Eq. 11, and with inputs short or wrong."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import Recorder, moved, same_bits, small_rollout, weights_of
from torch import Tensor

from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.config import UpdateConfig
from fastgrpo.training.trajectory import Rollout, branch_velocities
from fastgrpo.training.update import (
    TrainedRows,
    TrainedTransition,
    UpdateStatistics,
    accumulate_gradients,
    kept_per_step,
    micro_batch,
    share_among_steps,
    trained_rows,
    trained_steps,
    transition_loss,
    update,
)

ADVANTAGES = {0: 1.5, 1: -0.5, 2: -1.0, 3: 0.25, 4: 7.0, 5: -6.5}  # the last two are clamped to 5
FREE = {"max_grad_norm": 1e9, "clip_range": 0.02, "num_best": 2, "num_worst": 1}
"""No gradient is scaled down, and some of the ratios lie within the clip range."""


def off_policy() -> UpdateStatistics:
    return UpdateStatistics(skipped=[False])


def velocity(
    policy: Any, rollout: Rollout, video: int, step: int, guidance_scale: float, cfg_grad: str
) -> Tensor:
    x = rollout.latents[video, step].double()[None]
    t = rollout.timesteps[step].view(1)
    prompt = rollout.prompts[video // rollout.num_generations]
    cond = policy.velocity(x, t, {"text": policy.encode([prompt])["text"].double()})
    if guidance_scale == 1:
        return cond
    empty = policy.velocity(x, t, {"text": policy.encode([""])["text"].double()})
    return guidance_scale * cond + (1 - guidance_scale) * (
        empty.detach() if cfg_grad == "cond_only" else empty
    )


def objective(
    policy: Any,
    rollout: Rollout,
    pairs: Sequence[tuple[int, int]],
    cfg: UpdateConfig,
    reference: Any = None,
) -> Tensor:
    """Sum over (video, step) of -min(rho A, clip(rho) A) + kl_coef KL, float64 throughout
    (docs/method.md, section 2).
    """
    total = torch.zeros((), dtype=torch.float64)
    w = rollout.guidance_scale
    for video, step in pairs:
        x, after = rollout.latents[video, step].double(), rollout.latents[video, step + 1].double()
        a, b, s = (
            table[video // rollout.num_generations, step]
            for table in (rollout.a, rollout.b, rollout.std)
        )
        v = velocity(policy, rollout, video, step, w, cfg.cfg_grad)[0]
        mean = a * x + b * v
        density = -((after - mean) ** 2) / (2 * s**2) - s.log() - math.log(2 * math.pi) / 2
        new = density.mean() if rollout.normalized else -((after - mean) ** 2).mean()
        ratio = (new - rollout.log_probs[video, step].double()).exp()
        A = max(-cfg.adv_clip, min(cfg.adv_clip, ADVANTAGES[video]))
        total = total - torch.minimum(
            ratio * A, ratio.clamp(1 - cfg.clip_range, 1 + cfg.clip_range) * A
        )
        if reference is not None:
            with torch.no_grad():
                fixed = a * x + b * velocity(reference, rollout, video, step, w, "both")[0]
            total = total + cfg.kl_coef * ((mean - fixed) ** 2 / (2 * s**2)).mean()
    return total


def expected_gradients(
    policy: Any,
    rollout: Rollout,
    pairs: Sequence[tuple[int, int]],
    divisor: float,
    cfg: UpdateConfig,
    reference: Any = None,
) -> tuple[list[Tensor], float]:
    exact, fixed = copy.deepcopy(policy), copy.deepcopy(reference)
    exact.transformer.double()
    if fixed is not None:
        fixed.transformer.double()
    loss = objective(exact, rollout, pairs, cfg, fixed) / divisor
    return list(torch.autograd.grad(loss, list(exact.transformer.parameters()))), loss.item()


def assert_same_gradients(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Every entry within 1e-4 of the largest: x' - mean loses up to |x'| 6e-8 / s of its size in
    fp32, and loss terms cancel.
    """
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        largest = other.abs().max().item()
        assert largest > 1e-3
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-4 * largest)


def all_pairs(rollout: Rollout, videos: Sequence[int], cfg: UpdateConfig) -> list[tuple[int, int]]:
    seeds = [derive_seed("trained steps", int(rollout.noise_seeds[v])) for v in videos]
    return [
        (v, step)
        for v, seed in zip(videos, seeds, strict=True)
        for step in trained_steps(rollout, v, cfg.timestep_fraction, seed)
    ]


CASES = [
    # guidance, cfg_grad, sampler, how far the weights have moved, clip range
    # (so that some of the ratios lie beyond it and some within)
    (1.0, "both", "dance", 0.0, 0.02),
    (1.0, "both", "dance", 0.05, 0.02),
    (3.0, "both", "dance", 0.0, 0.02),
    (3.0, "both", "dance", 0.02, 5e-3),
    (3.0, "cond_only", "dance", 0.0, 0.02),
    (3.0, "cond_only", "dance", 0.02, 5e-3),
    (1.0, "both", "cps", 0.05, 5e-4),
    (3.0, "both", "flow", 0.02, 5e-4),
]


@pytest.mark.parametrize(("guidance_scale", "cfg_grad", "sde", "by", "clip_range"), CASES)
def test_gradient_is_that_of_the_objective(
    tiny_policy: Any,
    one_rank: Any,
    guidance_scale: float,
    cfg_grad: str,
    sde: str,
    by: float,
    clip_range: float,
) -> None:
    base = tiny_policy()
    rollout = small_rollout(base, guidance_scale=guidance_scale, sde=sde)
    policy = moved(base, by)
    cfg = UpdateConfig(
        cfg_grad=cfg_grad,
        clip_range=clip_range,
        optimizer_steps=1,
        max_grad_norm=1e9,
        num_best=2,
        num_worst=1,
        branchwise=not by,  # which takes the first step's weights for the rollout's
    )
    optimizer = Recorder(policy)
    chosen = [4, 1, 5, 0, 3, 2]
    stats = update(policy, optimizer, rollout, chosen, ADVANTAGES, cfg)
    pairs = all_pairs(rollout, chosen, cfg)
    assert len(pairs) == 6 * 3  # int(0.6 * 5) steps a video
    expected, loss = expected_gradients(policy, rollout, pairs, 6 * 3, cfg)
    assert_same_gradients(optimizer.seen[0], expected)
    assert stats.losses == pytest.approx([loss], rel=1e-4, abs=1e-6)
    assert stats.grad_norms == pytest.approx(
        [math.sqrt(sum(g.square().sum().item() for g in expected))], rel=1e-4
    )
    assert stats.steps == [step for _, step in pairs]
    if by:
        assert 0 < sum(stats.clipped) < len(pairs)  # both kinds are among them
    else:
        assert stats.ratios == [1.0] * len(pairs)
        assert stats.log_ratios == [0.0] * len(pairs)
        assert not any(stats.clipped)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5, 7])
def test_micro_batches_of_any_size_give_the_gradient_of_one_sum(
    tiny_policy: Any, micro_batch_size: int
) -> None:
    """13 pairs are filled up in all of these sizes but one."""
    base = tiny_policy()
    rollout = dataclasses.replace(
        small_rollout(base, guidance_scale=3.0), micro_batch_size=micro_batch_size
    )
    policy, cfg = moved(base, 0.02), UpdateConfig(clip_range=1e-3)
    numbers = [(v, i) for v in range(6) for i in (0, 2, 4)][:13]
    pairs = [TrainedTransition(v, i, ADVANTAGES[v]) for v, i in numbers]
    stats = off_policy()
    policy.batch_sizes.clear()
    loss = accumulate_gradients(policy, rollout, pairs, 13, 10.0, cfg, None, stats)
    expected, exact = expected_gradients(policy, rollout, numbers, 10.0, cfg)
    assert_same_gradients([p.grad for p in policy.transformer.parameters()], expected)
    assert loss == pytest.approx(exact, rel=1e-4)
    assert {*policy.batch_sizes} == {micro_batch_size}
    assert [
        len(values)
        for values in (stats.steps, stats.ratios, stats.log_ratios, stats.clipped, stats.kl)
    ] == [13] * 5
    for ratio, log_ratio, clipped, pair in zip(
        stats.ratios, stats.log_ratios, stats.clipped, pairs, strict=True
    ):
        assert math.log(ratio) == pytest.approx(log_ratio, abs=1e-6)
        assert clipped == (ratio > 1.001 if pair.advantage > 0 else ratio < 0.999)
    # Beyond either edge, with an advantage of either sign.
    assert (
        len(
            {
                (ratio > 1, pair.advantage > 0)
                for ratio, pair in zip(stats.ratios, pairs, strict=True)
                if abs(ratio - 1) > 1e-3
            }
        )
        == 4
    )


@pytest.mark.parametrize(("num_transitions", "passes"), [(0, 0), (1, 1), (4, 2), (9, 5)])
def test_passes_beyond_the_transitions_run_and_change_nothing(
    tiny_policy: Any, num_transitions: int, passes: int
) -> None:
    """A rank short of videos keeps step with the others."""
    base = tiny_policy()
    rollout, policy, cfg = small_rollout(base), moved(base, 0.05), UpdateConfig(kl_coef=0.3)
    transitions = [TrainedTransition(1, 2, -0.5)][:num_transitions]
    results = []
    for count in (len(transitions), num_transitions):
        policy.transformer.zero_grad()
        policy.batch_sizes.clear()
        at = policy, rollout, transitions, count, 3.0, cfg, weights_of(base)
        loss = accumulate_gradients(*at, stats := off_policy())
        results.append((loss, stats, [p.grad for p in policy.transformer.parameters()]))
    assert len(policy.batch_sizes) == 2 * passes  # the policy and the reference
    assert results[0][:2] == results[1][:2]
    assert not num_transitions or same_bits(results[0][2], results[1][2])


def test_a_pass_without_any_transition_gives_zero_gradients_and_not_none(tiny_policy: Any) -> None:
    policy, stats = tiny_policy(), UpdateStatistics()
    at = policy, small_rollout(policy), [], 2, 3.0, UpdateConfig(), None
    assert accumulate_gradients(*at, stats) == 0.0
    for p in policy.transformer.parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, torch.zeros_like(p))
    assert stats == UpdateStatistics()


def test_optimizer_steps_are_divided_alike(tiny_policy: Any, one_rank: Any) -> None:
    """Five of six videos in three steps: the last has one video, and its loss is divided by two all
    the same.
    """
    policy = tiny_policy()
    rollout = small_rollout(policy)
    cfg = UpdateConfig(optimizer_steps=3, **FREE)
    optimizer, chosen = Recorder(policy), [0, 1, 2, 4, 5]
    stats = update(policy, optimizer, rollout, chosen, ADVANTAGES, cfg)
    assert len(optimizer.seen) == len(stats.losses) == len(stats.grad_norms) == 3
    assert stats.skipped == [False] * 3
    assert stats.num_first == 2 * 3
    for chunk, gradients in zip(([0, 4], [1, 5], [2]), optimizer.seen, strict=True):
        expected, _ = expected_gradients(
            policy, rollout, all_pairs(rollout, chunk, cfg), 2 * 3, cfg
        )
        assert_same_gradients(gradients, expected)


@pytest.mark.parametrize(("kept", "optimizer_steps"), [(8, 1), (8, 2), (3, 2), (3, 5), (2, 8)])
def test_a_videos_optimizer_step_depends_neither_on_ranks_nor_on_other_groups(
    monkeypatch: pytest.MonkeyPatch, kept: int, optimizer_steps: int
) -> None:
    """Four groups; then with the third and half of the second missing."""
    cfg = UpdateConfig(num_best=kept, num_worst=0, optimizer_steps=optimizer_steps)

    def steps_of(chosen: Sequence[int], world_size: int) -> dict[int, int]:
        found, share = {}, 4 // world_size
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        for rank in range(world_size):
            monkeypatch.setenv("RANK", str(rank))
            rollout: Any = SimpleNamespace(prompts=["a"] * share, num_generations=16)
            assert kept_per_step(rollout, cfg) == share * kept / optimizer_steps
            first = 16 * share * rank
            own = [video - first for video in chosen if 0 <= video - first < 16 * share]
            steps = share_among_steps(rollout, own, cfg)
            assert len(steps) == optimizer_steps
            assert all(videos == sorted(videos, key=own.index) for videos in steps)
            found |= {v + first: step for step, videos in enumerate(steps) for v in videos}
        return found

    draw = random.Random(0)
    chosen = [16 * group + i for group in range(4) for i in draw.sample(range(16), kept)]
    fewer = [*chosen[:kept], *chosen[kept : kept + kept // 2], *chosen[3 * kept :]]
    alone = steps_of(chosen, 1)
    assert len(alone) == 4 * kept
    sizes = Counter(alone.values())
    assert len(sizes) == optimizer_steps
    assert max(sizes.values()) - min(sizes.values()) <= 1
    if kept % optimizer_steps == 0:  # then every group has its part in every step
        size = kept // optimizer_steps
        assert [alone[v] for v in chosen] == [i // size for i in range(kept)] * 4
    for world_size in (1, 2, 4):
        assert steps_of(chosen, world_size) == alone
        assert steps_of(fewer, world_size) == {video: alone[video] for video in fewer}


def test_the_second_optimizer_step_is_off_policy(tiny_policy: Any, one_rank: Any) -> None:
    """Its gradient is that of the weights that the first has made, against the log-probabilities of
    the rollout.
    """
    policy = tiny_policy()
    rollout = small_rollout(policy, guidance_scale=3.0)
    cfg = UpdateConfig(optimizer_steps=2, **FREE)
    optimizer, between = Recorder(policy, lr=0.02), []
    stats = update(
        policy,
        optimizer,
        rollout,
        [0, 1, 2, 3, 4, 5],
        ADVANTAGES,
        cfg,
        after_step=lambda: between.append(copy.deepcopy(policy)),
    )
    assert stats.ratios[: stats.num_first] == [1.0] * 9
    assert 1.0 not in stats.ratios[stats.num_first :]
    pairs = all_pairs(rollout, [2, 4, 5], cfg)
    expected, loss = expected_gradients(between[0], rollout, pairs, 9, cfg)
    assert_same_gradients(optimizer.seen[1], expected)
    assert stats.losses[1] == pytest.approx(loss, rel=1e-4)
    assert same_bits(weights_of(between[1]), weights_of(policy))


@pytest.mark.parametrize(
    ("guidance_scale", "cfg_grad"), [(1.0, "both"), (3.0, "both"), (3.0, "cond_only")]
)
def test_kl_pulls_to_the_reference(
    tiny_policy: Any, one_rank: Any, guidance_scale: float, cfg_grad: str
) -> None:
    base = tiny_policy()
    rollout = small_rollout(base, guidance_scale=guidance_scale)
    policy, reference = moved(base, 0.05), moved(base, 0.1, seed=2)
    cfg = UpdateConfig(kl_coef=0.7, cfg_grad=cfg_grad, optimizer_steps=1, **FREE)
    optimizer, own, target = Recorder(policy), weights_of(policy), weights_of(reference)
    stats = update(
        policy, optimizer, rollout, [0, 1, 2, 3, 4, 5], ADVANTAGES, cfg, reference=target
    )
    pairs = all_pairs(rollout, range(6), cfg)
    expected, loss = expected_gradients(policy, rollout, pairs, 18, cfg, reference)
    assert_same_gradients(optimizer.seen[0], expected)
    without, _ = expected_gradients(policy, rollout, pairs, 18, cfg)
    assert (expected[0] - without[0]).abs().max() > 0.01 * expected[
        0
    ].abs().max()  # the KL has a part in it
    assert stats.losses == pytest.approx([loss], rel=1e-4)
    assert all(kl > 0 for kl in stats.kl)
    for weights, network in ((own, policy), (target, reference)):  # each has its own again
        assert same_bits(weights, weights_of(network))


def test_kl_to_equal_weights_is_zero(tiny_policy: Any, one_rank: Any) -> None:
    policy = tiny_policy()
    rollout = small_rollout(policy, guidance_scale=3.0)
    cfg = UpdateConfig(kl_coef=0.7, optimizer_steps=1, **FREE, branchwise=False)
    first, second = Recorder(policy), Recorder(policy)
    stats = update(policy, first, rollout, [0, 1], ADVANTAGES, cfg, reference=weights_of(policy))
    update(policy, second, rollout, [0, 1], ADVANTAGES, cfg)
    assert stats.kl == [0.0] * 6
    for p, q in zip(first.seen[0], second.seen[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_the_transitions_of_an_optimizer_step_come_to_the_device_at_once(tiny_policy: Any) -> None:
    rollout = small_rollout(tiny_policy())  # three videos per prompt, two in a micro-batch
    transitions = [TrainedTransition(*t) for t in ((5, 1, 0.5), (0, 4, -1.5), (3, 2, 2.0))]
    rows: list[TrainedRows] = trained_rows(rollout, transitions, 5)
    assert [row.index.prompts for row in rows] == [[1, 0], [1, 0], [0, 0]]
    assert [row.index.samples.tolist() for row in rows] == [[5, 0], [3, 0], [0, 0]]
    assert [row.index.steps.tolist() for row in rows] == [[1, 4], [2, 0], [0, 0]]
    assert [row.advantages.tolist() for row in rows] == [[0.5, -1.5], [2.0, 0.0], [0.0, 0.0]]
    valid = [[True, True], [True, False], [False, False]]
    assert [row.valid_mask.tolist() for row in rows] == valid
    assert trained_rows(rollout, []) == []
    batch = micro_batch(rollout, rows[1])
    assert torch.equal(batch.next_latents[0], rollout.latents[3, 3])
    assert batch.latents[1].abs().max() == 0


def test_advantages_are_clamped(tiny_policy: Any) -> None:
    policy = tiny_policy()
    rollout = small_rollout(policy)
    grads = []
    for advantage, bound in ((9.0, 5.0), (5.0, 5.0), (9.0, 20.0), (-9.0, 5.0)):
        batch = micro_batch(rollout, *trained_rows(rollout, [TrainedTransition(0, 1, advantage)]))
        at = batch.latents, batch.index
        velocities = branch_velocities(policy, rollout, *at)
        loss, _ = transition_loss(rollout, batch, *velocities, None, UpdateConfig(adv_clip=bound))
        grads.append(torch.autograd.grad(loss, policy.transformer.parameters())[0])
    assert torch.equal(grads[0], grads[1])
    torch.testing.assert_close(grads[2], grads[0] * (9 / 5))
    assert torch.equal(grads[3], -grads[0])


def test_gradients_are_clipped_to_the_norm(tiny_policy: Any, one_rank: Any) -> None:
    policy = tiny_policy()
    rollout = small_rollout(policy)
    free, tight = Recorder(policy), Recorder(policy)
    for optimizer, bound in ((free, 1e9), (tight, 0.01)):
        stats = update(
            policy, optimizer, rollout, [0, 1], ADVANTAGES, UpdateConfig(max_grad_norm=bound)
        )
    norm = math.sqrt(sum(g.square().sum().item() for g in free.seen[0]))
    assert norm > 0.01
    assert stats.grad_norms == pytest.approx([norm], rel=1e-5)  # before clipping
    for small, large in zip(tight.seen[0], free.seen[0], strict=True):
        torch.testing.assert_close(small, large * (0.01 / norm), rtol=1e-3, atol=1e-9)


def test_nothing_chosen_is_no_step(tiny_policy: Any, one_rank: Any) -> None:
    policy = tiny_policy()
    rollout, optimizer = small_rollout(policy), Recorder(policy)
    policy.batch_sizes.clear()
    assert update(policy, optimizer, rollout, [], {}, UpdateConfig()) == UpdateStatistics()
    assert optimizer.seen == policy.batch_sizes == []


def test_nine_of_fifteen_steps_and_never_the_last(tiny_policy: Any) -> None:
    policy = tiny_policy()
    rollout = small_rollout(policy, num_inference_steps=16)
    drawn = [trained_steps(rollout, seed % 6, 0.6, seed) for seed in range(300)]
    assert all(len(steps) == 9 and steps == sorted({*steps}) for steps in drawn)
    counts = [sum(i in steps for steps in drawn) for i in range(16)]
    assert counts[15] == 0
    # 300 draws, each step in 0.6 of them: standard deviation 8.5.
    assert all(140 < count < 220 for count in counts[:15])
    assert all(
        trained_steps(rollout, 0, 0.6, seed) == drawn[seed] for seed in range(300)
    )  # by seed, whatever the video


@pytest.mark.parametrize(
    ("num_steps", "fraction", "expected"),
    [(16, 0.6, 9), (16, 1.0, 15), (16, 0.5, 7), (16, 0.01, 1), (2, 0.6, 1), (6, 0.6, 3)],
)
def test_the_share_is_rounded_down_to_at_least_one(
    tiny_policy: Any, num_steps: int, fraction: float, expected: int
) -> None:
    rollout = small_rollout(tiny_policy(), num_inference_steps=num_steps)
    assert len(trained_steps(rollout, 0, fraction, 0)) == expected


def test_videos_of_a_group_train_steps_of_their_own(tiny_policy: Any, one_rank: Any) -> None:
    policy = tiny_policy()
    rollout = small_rollout(policy, num_inference_steps=16, num_generations=8, micro_batch_size=16)
    cfg, advantages = UpdateConfig(optimizer_steps=1), dict.fromkeys(range(16), 1.0)
    steps = update(policy, Recorder(policy), rollout, range(16), advantages, cfg).steps
    by_video = [tuple(steps[i : i + 9]) for i in range(0, 16 * 9, 9)]
    assert len({*by_video}) > 12
    assert steps == update(policy, Recorder(policy), rollout, range(16), advantages, cfg).steps
    # A video's steps do not depend on its place in the order of training.
    backwards = update(policy, Recorder(policy), rollout, range(15, -1, -1), advantages, cfg).steps
    assert [tuple(backwards[i : i + 9]) for i in range(0, 16 * 9, 9)] == by_video[::-1]


@pytest.mark.parametrize("window", ["sliding", "single"])
def test_a_window_is_trained_whole(tiny_policy: Any, window: str) -> None:
    rollout = small_rollout(tiny_policy(), sde_window=window, window_size=3)
    for video in range(6):
        assert trained_steps(rollout, video, 0.6, video) == list(
            rollout.trainable_steps[video // 3]
        )
    assert {len(steps) for steps in rollout.trainable_steps} == {3 if window == "sliding" else 1}


def test_a_window_trains_by_the_same_objective(tiny_policy: Any, one_rank: Any) -> None:
    base = tiny_policy()
    rollout = small_rollout(base, sde_window="single", guidance_scale=3.0)
    policy, cfg = (
        moved(base, 0.02),
        UpdateConfig(optimizer_steps=1, **FREE, branchwise=False),
    )
    optimizer = Recorder(policy)
    stats = update(policy, optimizer, rollout, range(6), ADVANTAGES, cfg)
    assert stats.skipped == [False]  # the ODE steps' NaN is nowhere
    pairs = [(video, rollout.trainable_steps[video // 3][0]) for video in range(6)]
    assert_same_gradients(optimizer.seen[0], expected_gradients(policy, rollout, pairs, 6, cfg)[0])
