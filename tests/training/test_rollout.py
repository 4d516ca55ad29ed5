"""Rollouts against a plain float64 loop, and their bits against everything that must not change
them.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from fastgrpo_kernels import Transition, gaussian_noise, sde_log_prob
from tiny_training import CPU, SMALL
from torch import Tensor

from fastgrpo.config import RolloutConfig
from fastgrpo.training.rollout import FinishedBatch, sample_videos, start_rollout, trainable_steps
from fastgrpo.training.trajectory import Rollout


def config(**overrides: Any) -> RolloutConfig:
    return RolloutConfig(**(SMALL | {"micro_batch_size": 3, "guidance_scale": 5.0} | overrides))


def sampled(
    policy: Any,
    prompts: list[str],
    cfg: RolloutConfig,
    *,
    seed: int = 5,
    iteration: int = 2,
    first_slot: int = 0,
    share: bool = True,
) -> tuple[Rollout, list[FinishedBatch]]:
    rollout = start_rollout(
        policy, prompts, cfg, seed=seed, iteration=iteration, first_slot=first_slot, device=CPU
    )
    rollout.latents.fill_(math.nan)  # what is not written shows
    rollout.log_probs.fill_(math.inf)
    return rollout, list(sample_videos(policy, rollout, share_first_step=share))


def clean(samples: list[FinishedBatch]) -> Tensor:
    return torch.cat([s.latents for s in samples])


def transition(kind: str, eta: float, sigmas: list[float], i: int) -> tuple[float, float, float]:
    """(a, b, s) of docs/method.md, section 1, row by row."""
    sigma, after = sigmas[i], sigmas[i + 1]
    D = sigma - after
    if kind == "cps":
        kept, s = after * math.cos(eta * math.pi / 2), after * math.sin(eta * math.pi / 2)
        return (1 - after) + kept, -sigma * (1 - after) + kept * (1 - sigma), s
    if kind == "ode":
        return 1.0, -D, 0.0
    if kind == "flow":
        eta *= math.sqrt(sigma / (1 - (sigmas[1] if i == 0 else sigma)))
    if kind == "linear":
        eta = sigmas[-1] + (sigmas[1] - sigmas[-1]) * sigma
    return (
        1 - eta**2 * D / (2 * sigma),
        -D * (1 + eta**2 * (1 - sigma) / (2 * sigma)),
        eta * math.sqrt(D),
    )


def plain_trajectory(
    policy: Any, prompt: str, x: Tensor, noise: list[Tensor], cfg: RolloutConfig
) -> tuple[list[Tensor], list[float], Tensor]:
    """States, log-probabilities and the last x0 prediction of one video, in float64, one step after
    the other.
    """
    policy = copy.deepcopy(policy)
    policy.transformer.double()
    N, w = cfg.num_inference_steps, cfg.guidance_scale
    sigmas = [cfg.shift * (1 - i / N) / (1 + (cfg.shift - 1) * (1 - i / N)) for i in range(N + 1)]
    states, log_probs, x0 = [x.double()], [], x
    for i in range(N):
        x = states[-1]
        t = 1000 * sigmas[i]
        time = float(int(t + 1e-9)) if cfg.timestep_rounding == "trunc" else t
        cond, empty = (
            policy.velocity(
                x[None],
                torch.tensor([time], dtype=torch.float64),
                {"text": policy.encode([text])["text"].double()},
            )[0].detach()
            for text in (prompt, "")
        )
        v = (1 - w) * empty + w * cond
        a, b, s = transition(cfg.sde, cfg.eta, sigmas, i)
        mean = a * x + b * v
        after = mean + s * noise[i].double()
        if not s:
            log_probs.append(math.nan)
        elif cfg.sde == "cps":
            log_probs.append(-((after - mean) ** 2).mean().item())
        else:
            log_probs.append(torch.distributions.Normal(mean, s).log_prob(after).mean().item())
        states.append(after)
        x0 = x - sigmas[i] * v
    return states, log_probs, x0


@pytest.mark.parametrize("kind", ["dance", "flow", "linear", "cps", "ode"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("rounding", ["trunc", "none"])
def test_the_trajectory_is_the_plain_float64_one(
    tiny_policy: Any, kind: str, guidance_scale: float, rounding: str
) -> None:
    policy = tiny_policy()
    cfg = config(
        sde=kind, eta=0.7, guidance_scale=guidance_scale, shift=3.0, timestep_rounding=rounding
    )
    prompts = ["a cat", "a dog"]
    rollout, samples = sampled(policy, prompts, cfg)
    videos = clean(samples)
    for video in range(6):
        seed = rollout.noise_seeds[video : video + 1]
        first = gaussian_noise(rollout.first_seeds[video : video + 1], 0, rollout.latent_shape)[0]
        noise = [gaussian_noise(seed, i, rollout.latent_shape)[0] for i in range(6)]
        states, log_probs, x0 = plain_trajectory(policy, prompts[video // 3], first, noise, cfg)
        # fp32 against float64: a few roundings of 6e-8 a step, on values up to about 4, of which
        # guidance 3 makes five times more.
        torch.testing.assert_close(
            rollout.latents[video].double(), torch.stack(states), rtol=0, atol=2e-5
        )
        torch.testing.assert_close(videos[video].double(), x0, rtol=0, atol=2e-5)
        torch.testing.assert_close(
            rollout.log_probs[video].double(),
            torch.tensor(log_probs, dtype=torch.float64),
            rtol=0,
            atol=2e-5,
            equal_nan=True,
        )


@pytest.mark.parametrize("kind", ["dance", "cps"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_stored_log_probs_are_those_of_the_stored_states_to_the_bit(
    tiny_policy: Any, kind: str, guidance_scale: float
) -> None:
    policy = tiny_policy()
    cfg = config(sde=kind, guidance_scale=guidance_scale, micro_batch_size=2)
    rollout, _ = sampled(policy, ["a cat", "a dog"], cfg)
    for video in range(6):
        for step in range(6 - (kind == "cps")):  # cps ends without noise
            x, after = (rollout.latents[[video, video], i] for i in (step, step + 1))
            t = rollout.timesteps[[step, step]].float()
            text = policy.encode([rollout.prompts[video // 3]] * 2)
            with torch.no_grad():
                cond = policy.velocity(x, t, text)
                empty = (
                    policy.velocity(x, t, policy.encode(["", ""])) if guidance_scale != 1 else None
                )
            transition = Transition(
                x,
                cond,
                float(rollout.a[0, step]),
                float(rollout.b[0, step]),
                float(rollout.std[0, step]),
                velocity_uncond=empty,
                guidance_scale=guidance_scale,
                normalized=kind != "cps",
            )
            again = sde_log_prob(transition, after)
            assert again[0] == rollout.log_probs[video, step]


def test_every_state_is_written_without_a_gradient(tiny_policy: Any) -> None:
    rollout, samples = sampled(tiny_policy(), ["a", "b"], config(micro_batch_size=4))
    assert torch.isfinite(rollout.latents).all()
    assert torch.isfinite(rollout.log_probs).all()
    assert rollout.latents.dtype == rollout.log_probs.dtype == torch.float32
    assert not any(t.requires_grad for t in (rollout.latents, rollout.log_probs, clean(samples)))


def test_samples_name_their_videos_and_captions(tiny_policy: Any) -> None:
    _, samples = sampled(tiny_policy(), ["a", "b"], config(micro_batch_size=4))
    assert [s.sample_indices for s in samples] == [[0, 1, 2, 3], [4, 5]]
    assert [s.prompts for s in samples] == [["a", "a", "a", "b"], ["b", "b"]]
    assert [s.latents.shape for s in samples] == [(4, 3, 2, 2, 2), (2, 3, 2, 2, 2)]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_every_forward_has_the_micro_batch_size(tiny_policy: Any, guidance_scale: float) -> None:
    policy = tiny_policy()
    sampled(policy, ["a", "b"], config(micro_batch_size=4, guidance_scale=guidance_scale))
    branches = 1 if guidance_scale == 1 else 2
    assert policy.batch_sizes == [4] * (2 * 6 * branches)  # two micro-batches, six steps


def same_bits(one: Rollout, of_one: slice, other: Rollout, of_other: slice) -> None:
    for name in ("latents", "log_probs", "noise_seeds", "first_seeds"):
        assert torch.equal(getattr(one, name)[of_one], getattr(other, name)[of_other]), name


@pytest.mark.parametrize(
    ("window", "micro_batch_size"),
    [("all", 1), ("all", 2), ("all", 4), ("all", 8), ("sliding", 4), ("single", 2)],
)
def test_a_prompt_has_the_same_bits_whatever_else_is_in_the_rollout(
    tiny_policy: Any, window: str, micro_batch_size: int
) -> None:
    policy = tiny_policy()
    cfg = config(
        micro_batch_size=micro_batch_size, sde_window=window, window_size=2, guidance_scale=3.0
    )
    both, together = sampled(policy, ["a cat", "a dog"], cfg)
    second, alone = sampled(policy, ["a dog"], cfg, first_slot=1)
    last, _ = sampled(policy, ["a fish", "a cow", "a dog"], cfg, first_slot=-1)
    torch.testing.assert_close(second.latents, both.latents[3:], rtol=0, atol=0)
    torch.testing.assert_close(last.latents[6:], both.latents[3:], rtol=0, atol=0)
    torch.testing.assert_close(second.log_probs, both.log_probs[3:], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(clean(alone), clean(together)[3:])
    assert second.trainable_steps == both.trainable_steps[1:]
    other_slot, _ = sampled(policy, ["a dog"], cfg, first_slot=0)
    assert not torch.equal(other_slot.latents[:, 0], second.latents[:, 0])


def test_a_filled_up_micro_batch_has_the_bits_of_a_full_one(tiny_policy: Any) -> None:
    policy = tiny_policy()
    full, of_full = sampled(policy, ["a"], config(num_generations=6))
    short, of_short = sampled(policy, ["a"], config(num_generations=4))
    same_bits(short, slice(None), full, slice(4))
    assert torch.equal(clean(of_short), clean(of_full)[:4])


def test_the_same_call_gives_the_same_bits_and_another_seed_or_iteration_others(
    tiny_policy: Any,
) -> None:
    policy = tiny_policy()
    first, _ = sampled(policy, ["a"], config())
    again, _ = sampled(policy, ["a"], config())
    same_bits(first, slice(None), again, slice(None))
    for changed in ({"seed": 6}, {"iteration": 3}):
        other, _ = sampled(policy, ["a"], config(), **changed)
        assert not torch.equal(other.latents[:, 0], first.latents[:, 0])
        assert not set(other.noise_seeds.tolist()) & set(first.noise_seeds.tolist())


@pytest.mark.parametrize("same_noise", [True, False])
def test_a_group_starts_from_one_noise_or_from_its_own(tiny_policy: Any, same_noise: bool) -> None:
    rollout, _ = sampled(tiny_policy(), ["a", "b"], config(same_noise=same_noise))
    starts = {tuple(x.flatten().tolist()) for x in rollout.latents[:, 0]}
    assert len(starts) == (2 if same_noise else 6)
    assert torch.equal(rollout.latents[0, 0], rollout.latents[1, 0]) == same_noise
    assert not torch.equal(rollout.latents[0, 0], rollout.latents[3, 0])
    assert torch.equal(rollout.latents[:, 0], gaussian_noise(rollout.first_seeds, 0, (3, 2, 2, 2)))
    # The noise of the SDE is every video's own, and none of it is the first latent's.
    assert len({*rollout.noise_seeds.tolist()}) == 6
    assert not {*rollout.noise_seeds.tolist()} & {*rollout.first_seeds.tolist()}


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("window", "decode"), [("all", "x0"), ("all", "final"), ("sliding", "x0"), ("single", "x0")]
)
@pytest.mark.parametrize(
    # Of two prompts: the micro-batches with one prompt's videos alone, but for the first of each.
    ("num_generations", "micro_batch_size", "left_out"),
    [(4, 1, 6), (4, 2, 2), (4, 3, 0), (4, 4, 0), (4, 8, 0), (5, 2, 2), (1, 1, 0)],
)
def test_a_shared_first_step_has_the_same_bits_from_fewer_forwards(
    tiny_policy: Any,
    guidance_scale: float,
    window: str,
    decode: str,
    num_generations: int,
    micro_batch_size: int,
    left_out: int,
) -> None:
    cfg = config(
        num_generations=num_generations,
        micro_batch_size=micro_batch_size,
        guidance_scale=guidance_scale,
        sde_window=window,
        decode=decode,
    )
    policy, other = tiny_policy(), tiny_policy()
    (shared, samples), (alone, expected) = (
        sampled(p, ["a", "b"], cfg, share=share) for p, share in ((policy, True), (other, False))
    )
    assert torch.equal(shared.latents, alone.latents)
    assert torch.equal(shared.log_probs.nan_to_num(7.0), alone.log_probs.nan_to_num(7.0))
    assert torch.equal(clean(samples), clean(expected))
    branches = 1 if guidance_scale == 1 else 2
    assert other.batch_sizes == [micro_batch_size] * (
        branches * 6 * math.ceil(2 * num_generations / micro_batch_size)
    )
    assert policy.batch_sizes == other.batch_sizes[branches * left_out :]


def test_videos_from_noise_of_their_own_share_nothing(tiny_policy: Any) -> None:
    policy = tiny_policy()
    cfg = config(same_noise=False, micro_batch_size=1)
    shared, _ = sampled(policy, ["a", "b"], cfg)
    assert len(policy.batch_sizes) == 2 * 6 * 6
    same_bits(shared, slice(None), sampled(policy, ["a", "b"], cfg, share=False)[0], slice(None))


def sliding(**overrides: Any) -> RolloutConfig:
    return RolloutConfig(
        sde_window="sliding",
        **({"num_inference_steps": 8, "window_size": 3, "window_interval": 25} | overrides),
    )


@pytest.mark.parametrize(
    ("iteration", "steps"),
    [
        (1, (0, 1, 2)),
        (25, (0, 1, 2)),
        (26, (1, 2, 3)),
        (50, (1, 2, 3)),
        (101, (4, 5, 6)),
        (125, (4, 5, 6)),
        (126, (0, 1, 2)),
        (251, (0, 1, 2)),
    ],
)
def test_the_window_slides_by_one_and_starts_over_before_the_last_step(
    iteration: int, steps: tuple[int, ...]
) -> None:
    assert {
        trainable_steps(sliding(), seed, iteration, slot) for seed in (0, 1) for slot in (0, 5)
    } == {steps}


def test_the_largest_window_stays_where_it_is() -> None:
    assert {trainable_steps(sliding(window_size=7), 0, i, 0) for i in range(1, 200)} == {
        tuple(range(7))
    }


def test_a_random_window_is_drawn_anew_at_every_interval_and_shared_by_the_prompts() -> None:
    cfg = sliding(window_order="random", window_interval=10)
    windows = [
        {
            trainable_steps(cfg, 4, i, slot)
            for i in range(10 * k + 1, 10 * k + 11)
            for slot in range(3)
        }
        for k in range(60)
    ]
    assert all(len(window) == 1 for window in windows)
    drawn = [window.pop() for window in windows]
    assert {*drawn} == {(i, i + 1, i + 2) for i in range(5)}
    assert any(after[0] - before[0] not in (0, 1) for before, after in itertools.pairwise(drawn))
    assert drawn != [trainable_steps(cfg, 5, 10 * k + 1, 0) for k in range(60)]


@pytest.mark.parametrize(
    ("num_steps", "first_half"), [(2, {0}), (3, {0}), (5, {0, 1}), (16, {*range(8)})]
)
def test_the_single_step_comes_from_the_first_half(num_steps: int, first_half: set[int]) -> None:
    cfg = RolloutConfig(sde_window="single", num_inference_steps=num_steps)
    drawn = {(i, slot): trainable_steps(cfg, 0, i, slot) for i in range(1, 21) for slot in range(8)}
    assert set(drawn.values()) == {(i,) for i in first_half}
    if len(first_half) > 1:  # every prompt and every iteration has its own
        assert len({drawn[1, slot] for slot in range(8)}) > 1
        assert len({drawn[i, 0] for i in range(1, 21)}) > 1


@pytest.mark.parametrize("num_steps", [2, 3, 16])
def test_all_steps_but_the_last_are_trained(num_steps: int) -> None:
    assert trainable_steps(RolloutConfig(num_inference_steps=num_steps), 0, 7, 3) == tuple(
        range(num_steps - 1)
    )


@pytest.mark.parametrize("window", ["all", "sliding", "single"])
def test_noise_and_log_probs_are_where_the_window_is(tiny_policy: Any, window: str) -> None:
    policy = tiny_policy()
    cfg = config(
        sde_window=window, window_size=2, window_interval=1, num_generations=2, micro_batch_size=2
    )
    rollout, _ = sampled(policy, ["a", "b", "c"], cfg, iteration=3)
    sigmas = [5 * t / (1 + 4 * t) for t in (1 - i / 6 for i in range(7))]
    for prompt in range(3):
        expected = trainable_steps(cfg, 5, 3, prompt)
        assert rollout.trainable_steps[prompt] == expected
        for i in range(6):
            noisy = (
                window == "all" or i in expected
            )  # the last step of `all` has noise, though it is not trained
            a, b, s = transition("dance" if noisy else "ode", 0.5, sigmas, i)
            row = torch.stack([rollout.a[prompt, i], rollout.b[prompt, i], rollout.std[prompt, i]])
            # Rounded once, to fp32.
            torch.testing.assert_close(row, torch.tensor([a, b, s]), rtol=2e-7, atol=1e-8)
            for video in (2 * prompt, 2 * prompt + 1):
                assert torch.isnan(rollout.log_probs[video, i]) == (not noisy)
            # From one start, the two videos of a group go apart at the first step with noise, and
            # not before.
            together = torch.equal(
                rollout.latents[2 * prompt, i + 1], rollout.latents[2 * prompt + 1, i + 1]
            )
            assert together == (window != "all" and i < expected[0])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_decoded_latent_is_the_last_state_or_the_last_prediction(
    tiny_policy: Any, guidance_scale: float
) -> None:
    policy = tiny_policy()
    cfg = config(guidance_scale=guidance_scale, micro_batch_size=6)
    rollout, predicted = sampled(policy, ["a", "b"], cfg)
    other, final = sampled(
        policy,
        ["a", "b"],
        config(guidance_scale=guidance_scale, micro_batch_size=6, decode="final"),
    )
    same_bits(rollout, slice(None), other, slice(None))
    assert torch.equal(clean(final), rollout.latents[:, -1])
    x, t = (
        rollout.latents[:, -2],
        torch.full((6,), 500.0),
    )  # sigma = 5/6 / (1 + 4/6) = 0.5 at the last of six steps
    with torch.no_grad():
        v, empty = (
            policy.velocity(x, t, policy.encode(["a"] * 3 + ["b"] * 3)),
            policy.velocity(x, t, policy.encode([""] * 6)),
        )
    torch.testing.assert_close(
        clean(predicted), x - 0.5 * (empty + guidance_scale * (v - empty)), rtol=1e-6, atol=1e-6
    )
    assert (clean(predicted) - clean(final)).abs().max() > 0.1  # the last step has noise


def test_the_ode_ends_at_its_own_prediction(tiny_policy: Any) -> None:
    rollout, samples = sampled(tiny_policy(), ["a"], config(sde="ode"))
    torch.testing.assert_close(clean(samples), rollout.latents[:, -1], rtol=1e-6, atol=1e-6)
    assert torch.isnan(rollout.log_probs).all()
    assert torch.equal(rollout.latents[0], rollout.latents[1])  # one first noise, no other


def test_an_impossible_size_is_refused(tiny_policy: Any) -> None:
    with pytest.raises(ValueError, match="height"):
        sampled(tiny_policy(), ["a"], config(height=3))
