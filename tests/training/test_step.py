"""One step as the paper puts it, with each quantity recomputed here from the videos, and the state
that lives through a run.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tiny_training import CPU, same_bits, weights_of, without_times

from fastgrpo.config import PacingConfig, PromptsConfig, RolloutConfig, TrainConfig, UpdateConfig
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training import step
from fastgrpo.training.step import Trainer

CAPTIONS = ["a cat", "a dog", "a fish", "a cow", "a horse"]
STAGES = ("red", "green", "blue")
NAN = math.nan
ROLLOUT = {
    "num_prompts": 2,
    "num_generations": 6,
    "height": 2,
    "width": 2,
    "num_frames": 2,
    "num_inference_steps": 5,
    "guidance_scale": 3.0,
    "micro_batch_size": 4,
}
UPDATE = {"num_best": 2, "num_worst": 1, "optimizer_steps": 2, "learning_rate": 0.01}


@pytest.fixture
def make(one_rank: Any, tiny_policy: Any, tiny_judge: Any) -> Iterator[Callable[..., Trainer]]:
    """make(rollout={...}, update={...}, pacing={...}, captions=[...]): a trainer of the tiny
    policy.
    """
    judges: list[ScoringQueue] = []

    def build(
        rollout: Any = None,
        update: Any = None,
        pacing: Any = None,
        captions: list[str] = CAPTIONS,
        shuffle: bool = True,
        reward: Any = None,
        **top: Any,
    ) -> Trainer:
        policy, reward = tiny_policy(), reward or tiny_judge()
        config = TrainConfig(
            policy=policy,
            reward=reward,
            prompts=PromptsConfig(train="-", shuffle=shuffle),
            rollout=RolloutConfig(**(ROLLOUT | (rollout or {}))),
            update=UpdateConfig(**(UPDATE | (update or {}))),
            pacing=PacingConfig(**({"thresholds": (0.5, 0.5)} | (pacing or {}))),
            **top,
        )
        judges.append(ScoringQueue(reward))
        return Trainer(config, policy, judges[-1], list(captions), CPU, torch.float32)

    yield build
    for judge in judges:
        judge.close()


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [*weights_of(trainer.policy).values()]


def normalised(rewards: Sequence[float]) -> list[float]:
    """Eq. 10."""
    return [(r - statistics.fmean(rewards)) / statistics.stdev(rewards) for r in rewards]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each call of `update` gets: rollout, chosen, advantages and its keywords."""
    found: list[Any] = []

    def watched(policy: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        found.append((*args[:3], kwargs))
        return own(policy, optimizer, *args, **kwargs)

    own = step.update
    monkeypatch.setattr(step, "update", watched)
    return found


def channel_means(trainer: Trainer, rollout: Any) -> list[list[float]]:
    """The judge's scores [B][3], from the stored trajectories: x0 at the last step, logistic, mean
    of each channel.
    """
    policy, scores = trainer.policy, []
    for video in range(rollout.num_videos):
        x, sigma = rollout.latents[video, -2][None], float(rollout.sigmas[-2])
        t = torch.tensor([float(int(1000 * sigma))])
        with torch.no_grad():
            text, none = policy.encode([rollout.prompts[video // 6]]), policy.encode([""])
            v = policy.velocity(x, t, none) + 3.0 * (
                policy.velocity(x, t, text) - policy.velocity(x, t, none)
            )
        scores.append(torch.sigmoid(x - sigma * v)[0].double().mean(dim=(1, 2, 3)).tolist())
    return scores


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_trains_the_best_and_the_worst_of_each_group(
    make: Callable[..., Trainer], calls: list[Any], stage: int
) -> None:
    trainer = make(pacing={"mode": "static", "static_stage": stage})
    untouched = make()
    metrics = trainer.step(1)
    ((rollout, chosen, advantages, _),) = calls
    assert len({*rollout.prompts}) == 2
    assert {*rollout.prompts} <= {*CAPTIONS}
    scores = channel_means(untouched, rollout)  # before the update
    rewards = [row[stage - 1] for row in scores]
    for group in (range(6), range(6, 12)):
        expected = normalised([rewards[i] for i in group])
        assert [advantages[i] for i in group] == pytest.approx(expected, rel=1e-3)
        ranked = sorted(group, key=lambda i: rewards[i])
        trained = [i for i in chosen if i in group]
        assert sorted(trained) == sorted([ranked[0], *ranked[-2:]])
    assert len(chosen) == 6
    assert [i < 6 for i in chosen] == [True] * 3 + [False] * 3
    # One optimizer step for each 3 videos of int(0.6 * 4) = 2 steps; the first is on-policy.
    assert metrics["ratio_drift"] == 0.0
    assert metrics["num_skipped_updates"] == 0
    assert metrics["reward"] == pytest.approx(statistics.fmean(rewards), abs=1e-6)
    assert metrics["reward_std"] == pytest.approx(
        (statistics.stdev(rewards[:6]) + statistics.stdev(rewards[6:])) / 2, abs=1e-6
    )
    for k, name in enumerate(STAGES):
        assert metrics[f"rewards/{name}/mean"] == pytest.approx(
            statistics.fmean(row[k] for row in scores), abs=1e-6
        )
        assert metrics[f"weights/{name}"] == (k == stage - 1)
        assert metrics[f"competence/{name}"] == pytest.approx(
            metrics[f"rewards/{name}/mean"], abs=1e-9
        )
    assert not same_bits(weights(trainer), weights(untouched))
    assert metrics["iteration"] == 1
    assert {
        "time/rollout",
        "time/reward",
        "time/update",
        "step_time",
        "learning_rate",
    } <= metrics.keys()
    assert trainer.step(2)["iteration"] == 2
    assert not {*calls[1][0].noise_seeds.tolist()} & {*rollout.noise_seeds.tolist()}


def test_the_reward_is_the_self_paced_mixture(
    make: Callable[..., Trainer], calls: list[Any]
) -> None:
    """Two stages below their thresholds and above: weights as Eqs. 6 and 9 written out, and
    advantages of the mixture.
    """
    trainer = make(
        pacing={
            "thresholds": (0.4, 0.55),
            "gate_temperature": 0.1,
            "sparsity_weight": 0.7,
            "sharpness": 2.0,
        }
    )
    untouched = make()
    metrics = trainer.step(1)
    ((rollout, _, advantages, _),) = calls
    scores = channel_means(untouched, rollout)
    groups = [scores[:6], scores[6:]]
    means = [statistics.fmean(row[k] for row in scores) for k in range(3)]
    saturation = []
    for k in range(3):
        indices = [
            (math.sqrt(6) - sum(row[k] for row in g) / math.sqrt(sum(row[k] ** 2 for row in g)))
            / (math.sqrt(6) - 1)
            for g in groups
        ]
        saturation.append(1 - statistics.fmean(indices))
    H = [1 / (1 + math.exp(-(means[k] - tau) / 0.1)) for k, tau in enumerate((0.4, 0.55))]
    gates = [
        1 - H[0],
        H[0] - H[0] * H[1] + 0.7 * (saturation[0] - saturation[1]),
        H[0] * H[1] + 0.7 * (saturation[1] - saturation[2]),
    ]
    total = sum(math.exp(2 * g) for g in gates)
    w = [math.exp(2 * g) / total for g in gates]
    assert min(w) > 0.05
    assert [metrics[f"weights/{name}"] for name in STAGES] == pytest.approx(w, abs=1e-5)
    for g, group in enumerate(groups):
        mixed = [sum(a * b for a, b in zip(w, row, strict=True)) for row in group]
        got = [advantages[6 * g + i] for i in range(6)]
        assert got == pytest.approx(normalised(mixed), abs=2e-3)


def test_a_group_without_scores_is_skipped_and_counted(
    make: Callable[..., Trainer], calls: list[Any]
) -> None:
    trainer = make(captions=["an unseen cat", "a dog"], shuffle=False)
    metrics = trainer.step(1)
    ((_, chosen, advantages, _),) = calls
    assert sorted(advantages) == [*range(6, 12)]
    assert {*chosen} <= {*range(6, 12)}
    assert len(chosen) == 3
    assert (
        metrics["num_skipped_groups"],
        metrics["num_invalid_videos"],
        metrics["frac_reward_zero_std"],
    ) == (1, 6, 0.0)


def test_a_video_without_a_score_is_in_no_mean_and_not_trained(
    make: Callable[..., Trainer], calls: list[Any], tiny_judge: Any
) -> None:
    seen: list[tuple[list[list[float]], list[bool]]] = []

    class Blind(tiny_judge):  # type: ignore[misc]
        def score(
            self, videos: torch.Tensor, prompts: Any, fps: float
        ) -> tuple[torch.Tensor, torch.Tensor]:
            scores, _ = super().score(videos, prompts, fps)
            valid = torch.tensor([len(seen) + i not in (1, 2, 7) for i in range(len(videos))])
            seen.extend(zip(scores.tolist(), valid.tolist(), strict=True))  # type: ignore[arg-type]
            return scores, valid

    metrics = make(pacing={"mode": "one_stage"}, reward=Blind()).step(1)
    ((_, chosen, advantages, _),) = calls
    assert metrics["num_invalid_videos"] == 3
    assert not {1, 2, 7} & {*chosen}
    for group in ([0, 3, 4, 5], [6, 8, 9, 10, 11]):
        expected = normalised([seen[i][0][0] for i in group])
        assert [advantages[i] for i in group] == pytest.approx(expected, rel=1e-5)
    assert sorted(advantages) == [0, 3, 4, 5, 6, 8, 9, 10, 11]
    assert metrics["reward"] == pytest.approx(statistics.fmean(row[0] for row, ok in seen if ok))


def test_no_group_with_scores_is_no_update_and_no_crash(make: Callable[..., Trainer]) -> None:
    trainer = make(captions=["an unseen cat"], shuffle=False)
    before = weights(trainer)
    metrics = trainer.step(1)
    assert same_bits(weights(trainer), before)
    assert metrics["num_skipped_groups"] == 2
    assert math.isnan(metrics["reward"])
    assert math.isnan(metrics["loss"])
    assert "competence/red" not in metrics
    assert trainer.prompts_drawn == 2


def test_equal_videos_are_no_signal(make: Callable[..., Trainer]) -> None:
    """One first noise, and an SDE with hardly any: rewards within 1e-6 of each other."""
    trainer = make(rollout={"eta": 1e-7})
    before = weights(trainer)
    metrics = trainer.step(1)
    assert metrics["frac_reward_zero_std"] == 1.0
    assert same_bits(weights(trainer), before)


def test_prompts_are_walked_through_and_dealt_in_blocks(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(rollout={"num_prompts": 4}, shuffle=False)
    assert trainer.next_prompts() == (range(4), CAPTIONS[:4])
    trainer.prompts_drawn = 3
    walk = []
    for number in (0, 1):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", "2")
        slots, prompts = trainer.next_prompts()
        assert slots == range(2 * number, 2 * number + 2)
        walk += prompts
    assert walk == [CAPTIONS[i] for i in (3, 4, 0, 1)]


def test_updates_skipped_in_a_row_are_counted_over_iterations(make: Callable[..., Trainer]) -> None:
    trainer = make(update={"optimizer_steps": 2})
    hook = trainer.policy.transformer.A.register_hook(lambda grad: grad * NAN)
    before = weights(trainer)
    assert trainer.step(1)["num_skipped_updates"] == 2
    assert trainer.skipped_in_a_row == 2
    trainer.step(2)
    assert trainer.skipped_in_a_row == 4
    assert same_bits(weights(trainer), before)
    hook.remove()
    assert trainer.step(3)["num_skipped_updates"] == 0
    assert trainer.skipped_in_a_row == 0


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", [1 / 2, 1, 1, 1, 1, 1]),
        ("linear", [1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", [1 / 2, 1, *[(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]]),
    ],
)
def test_learning_rate_follows_the_iterations(
    make: Callable[..., Trainer], schedule: str, factors: list[float]
) -> None:
    """Two iterations of warm-up and six in all; the schedule is a function of the iteration,
    whatever was run before.
    """
    warmup = 0 if schedule == "constant" else 2
    trainer = make(
        update={"lr_scheduler": schedule, "warmup_iterations": warmup, "learning_rate": 0.5},
        iterations=6,
    )
    for iteration in (1, 2, 3, 4, 5, 6, 2):
        trainer.set_learning_rate(iteration)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(
            0.5 * factors[iteration - 1], abs=1e-12
        )
    assert trainer.step(4)["learning_rate"] == pytest.approx(0.5 * factors[3])


def test_optimizer_state_is_there_from_the_start_at_step_0(
    make: Callable[..., Trainer], tiny_policy: Any
) -> None:
    trainer = make()
    assert same_bits(weights(trainer), [p.detach() for p in tiny_policy().transformer.parameters()])
    assert len(trainer.optimizer.state) == 3
    for state in trainer.optimizer.state.values():
        assert float(state["step"]) == 0
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01


def test_ema_is_taken_after_each_optimizer_step(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(update={"ema_decay": 0.75})
    seen, expected = [], weights(trainer)  # the average starts at the base weights
    average = trainer.update_ema

    def watched() -> None:
        average()
        seen.append(weights(trainer))

    monkeypatch.setattr(trainer, "update_ema", watched)
    for iteration in (1, 2):
        trainer.step(iteration)
    assert len(seen) == 4
    for after in seen:
        expected = [0.75 * e + 0.25 * p for e, p in zip(expected, after, strict=True)]
    assert trainer.evaluation_weights is not None
    for p, e in zip(trainer.evaluation_weights.values(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-6, atol=1e-7)
    assert make().evaluation_weights is None


def test_reference_is_a_frozen_copy_of_the_first_weights(
    make: Callable[..., Trainer], calls: list[Any]
) -> None:
    trainer = make(update={"kl_coef": 0.1})
    before = weights(trainer)
    metrics = [trainer.step(i) for i in (1, 2)]
    reference = calls[-1][3]["reference"]
    assert same_bits([*reference.values()], before)
    assert not any(p.requires_grad for p in reference.values())
    assert not same_bits(weights(trainer), before)
    assert metrics[1]["kl"] > 0
    assert make().reference is None


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_a_trainer_goes_on_from_its_state_to_the_bit(
    make: Callable[..., Trainer], ema_decay: float
) -> None:
    settings: dict[str, Any] = {
        "update": {"ema_decay": ema_decay, "lr_scheduler": "linear", "kl_coef": 0.01},
        "pacing": {"gate_temperature": 0.1},
        "iterations": 9,
    }
    one, other = make(**settings), make(**settings)
    for iteration in (1, 2):
        one.step(iteration)
    one.skipped_in_a_row = 3
    tensors, state = copy.deepcopy(one.tensors()), json.loads(json.dumps(one.state_dict()))
    other.load_tensors(tensors)
    other.load_state_dict(state)
    assert (other.prompts_drawn, other.skipped_in_a_row) == (4, 3)
    assert same_bits(weights(other), weights(one))
    for iteration in (3, 4):
        assert without_times(other.step(iteration)) == without_times(one.step(iteration))
        assert same_bits(weights(other), weights(one))
    if ema_decay:
        assert one.evaluation_weights is not None
        assert other.evaluation_weights is not None
        assert same_bits([*other.evaluation_weights.values()], [*one.evaluation_weights.values()])
    # And it is the state that does it:
    fresh = make(**settings)
    assert without_times(fresh.step(5)) != without_times(one.step(5))


def test_a_resume_takes_rates_from_the_configuration(make: Callable[..., Trainer]) -> None:
    one = make(update={"learning_rate": 0.1, "weight_decay": 0.2, "betas": (0.5, 0.6)})
    one.step(1)
    other = make(update={"learning_rate": 0.3, "weight_decay": 0.4, "betas": (0.7, 0.8)})
    other.load_tensors(copy.deepcopy(one.tensors()))
    group = other.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (0.3, 0.4, (0.7, 0.8))
    moments = [s["exp_avg"] for s in other.optimizer.state.values()]
    assert same_bits(moments, [s["exp_avg"] for s in one.optimizer.state.values()])
    assert all(m.any() for m in moments)


RANKS = """
import json, torch
from conftest import TinyJudge, TinyPolicy
from fastgrpo.config import *
from fastgrpo.distributed import collectives
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training.step import Trainer

device, answers = collectives.start(RuntimeConfig(device="cpu")), []
for captions in {captions!r}:
    policy, reward = TinyPolicy(), TinyJudge()
    config = TrainConfig(
        policy=policy,
        reward=reward,
        prompts=PromptsConfig(train="-", shuffle=False),
        rollout=RolloutConfig(**{rollout!r}),
        update=UpdateConfig(**{update!r}),
        pacing=PacingConfig(thresholds=(0.5, 0.5)),
    )
    judge = ScoringQueue(reward)
    trainer = Trainer(config, policy, judge, captions, device, torch.float32)
    trainer.optimizer = torch.optim.SGD(policy.transformer.parameters(), lr=1.0)
    metrics = trainer.step(1)
    passes = collectives.gather(len(policy.batch_sizes))
    weights = [p.flatten().tolist() for p in policy.transformer.parameters()]
    answers.append([metrics, weights, passes, trainer.prompts_drawn])
    judge.close()
print(json.dumps(answers))
collectives.stop()
"""


@pytest.mark.parametrize(("num_ranks", "optimizer_steps"), [(2, 8), (4, 2)])
def test_ranks_make_the_step_of_one(
    run_ranks: Callable[..., list[Any]],
    make: Callable[..., Trainer],
    num_ranks: int,
    optimizer_steps: int,
) -> None:
    """Four prompts on two and on four ranks against one, with the same settings; then with no score
    for any video of the last two prompts, whose ranks keep step all the same.

    Three videos a group are kept, which two optimizer steps on four ranks cannot share evenly. Two
    ranks keep six each, and in some of eight steps one of them has none.
    """
    both = [CAPTIONS[:4], [*CAPTIONS[:2], "an unseen cow", "an unseen horse"]]
    rollout = ROLLOUT | {"num_prompts": 4}
    # Clipped to a part of what the first step moves it by, a ratio would hang on its last bits.
    free = {"max_grad_norm": 1e9, "clip_range": 0.9}
    update = UPDATE | free | {"optimizer_steps": optimizer_steps, "learning_rate": 0.05}
    script = RANKS.format(captions=both, rollout=rollout, update=update)
    for captions, *ranks in zip(both, *run_ranks(script, num_ranks), strict=True):
        here = ranks[0]
        for there in ranks[1:]:
            assert without_times(here[0]) == without_times(there[0])
            assert here[1] == there[1]
        assert len({*here[2]}) == 1
        assert [of_rank[3] for of_rank in ranks] == [4] * num_ranks
        alone = make(rollout=rollout, update=update, captions=captions, shuffle=False)
        alone.optimizer = torch.optim.SGD(alone.policy.transformer.parameters(), lr=1.0)
        before = weights(alone)
        metrics = alone.step(1)
        of_the_rollout = [
            k
            for k in metrics
            if k.startswith(
                ("reward", "weights", "competence", "hoyer", "num_", "frac_", "ratio_drift")
            )
        ]
        assert {k: here[0][k] for k in of_the_rollout} == {k: metrics[k] for k in of_the_rollout}
        assert here[0]["ratio_drift"] == 0.0
        assert here[0]["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-5)
        assert here[0]["loss"] == pytest.approx(metrics["loss"], rel=1e-4, abs=1e-6)
        for got, p, q in zip(here[1], weights(alone), before, strict=True):
            moved = (torch.tensor(got).view_as(q) - q, p - q)
            assert moved[1].abs().max() > 1e-4
            torch.testing.assert_close(*moved, rtol=1e-3, atol=1e-6)
