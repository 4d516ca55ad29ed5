"""Validation prompts: the same noise every time, over any number of ranks; what is shown is what
was scored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgrpo.config import (
    EvaluationConfig,
    PromptsConfig,
    RolloutConfig,
    TrainConfig,
    UpdateConfig,
)
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training.validation import ValidationSet, evaluate, sample_validation

PROMPTS = ["a cat", "a dog", "an unseen fish", "a cow", "a horse"]
SETTING = {
    "height": 2,
    "width": 2,
    "num_frames": 2,
    "num_inference_steps": 4,
    "num_generations": 2,
    "micro_batch_size": 3,
    "sde": "ode",
}


@pytest.fixture
def sample(one_rank: Any, tiny_judge: Any) -> Any:
    """sample(policy, prompts, ...): a ValidationSet of this process alone."""

    def run(
        policy: Any,
        prompts: list[str] = PROMPTS,
        *,
        seed: int = 3,
        num_videos: int = 5,
        **overrides: Any,
    ) -> ValidationSet:
        judge = ScoringQueue(tiny_judge())
        try:
            return sample_validation(
                policy,
                judge,
                prompts,
                RolloutConfig(**(SETTING | overrides)),
                seed=seed,
                num_videos=num_videos,
                device=torch.device("cpu"),
                compute_dtype=torch.float32,
            )
        finally:
            judge.close()

    return run


def test_scores_are_those_of_the_videos_shown(sample: Any, tiny_policy: Any) -> None:
    validation = sample(tiny_policy())
    assert validation.prompts == PROMPTS
    assert [len(scores) for scores in validation.scores_PGK] == [2] * 5
    assert validation.valid_PG == [
        [True, True],
        [True, True],
        [False, False],
        [True, True],
        [True, True],
    ]
    assert validation.videos.shape == (5, 2, 3, 2, 2)
    assert validation.videos.dtype == torch.uint8
    means = (
        validation.videos.double().mean(dim=(1, 3, 4)) / 255
    )  # the judge's scores are channel means
    for prompt in range(5):
        assert validation.scores_PGK[prompt][0] == pytest.approx(
            means[prompt].tolist(), abs=0.5 / 255
        )
    assert len({tuple(video.flatten().tolist()) for video in validation.videos}) == 5


def test_noise_is_fixed_by_seed_and_number(sample: Any, tiny_policy: Any) -> None:
    policy = tiny_policy()
    first = sample(policy, same_noise=False)
    again = sample(policy, same_noise=False)
    assert (again.scores_PGK, again.valid_PG) == (first.scores_PGK, first.valid_PG)
    assert torch.equal(again.videos, first.videos)
    fewer = sample(policy, PROMPTS[:2], same_noise=False)
    assert fewer.scores_PGK == first.scores_PGK[:2]
    assert sample(policy, seed=4, same_noise=False).scores_PGK != first.scores_PGK
    assert first.scores_PGK[0][0] != first.scores_PGK[0][1]
    one = sample(
        policy
    )  # and one noise a group where the rollouts have it so: equal videos, as the ODE has no other
    assert one.scores_PGK[0][0] == one.scores_PGK[0][1]
    assert one.scores_PGK[0][0] == first.scores_PGK[0][0]


def test_evaluation_noise_is_not_the_trainings(sample: Any, tiny_policy: Any) -> None:
    from fastgrpo.training.rollout import start_rollout

    seen: list[torch.Tensor] = []

    class Watched(tiny_policy):  # type: ignore[misc]
        def velocity(
            self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Any
        ) -> torch.Tensor:
            if timesteps[0] == 1000:
                seen.append(latents[0].clone())
            return super().velocity(latents, timesteps, conditioning)

    policy = Watched()
    sample(policy, PROMPTS[:1], num_generations=1, micro_batch_size=1, guidance_scale=1.0)
    for iteration in (0, 1):
        cfg = RolloutConfig(**(SETTING | {"micro_batch_size": 1}))
        training = start_rollout(
            policy,
            PROMPTS[:1],
            cfg,
            seed=3,
            iteration=iteration,
            first_slot=0,
            device=torch.device("cpu"),
        )
        from fastgrpo_kernels import gaussian_noise

        assert not torch.equal(
            gaussian_noise(training.first_seeds[:1], 0, training.latent_shape)[0], seen[0]
        )


@pytest.mark.parametrize("num_videos", [0, 1, 3, 5, 9])
def test_the_first_video_of_each_of_the_first_prompts_is_kept(
    sample: Any, tiny_policy: Any, num_videos: int
) -> None:
    everything, some = sample(tiny_policy()), sample(tiny_policy(), num_videos=num_videos)
    assert len(some.videos) == min(num_videos, 5)
    if num_videos:
        assert torch.equal(some.videos, everything.videos[:num_videos])
    assert some.scores_PGK == everything.scores_PGK


def test_what_is_not_finite_is_invalid_and_shown_black(sample: Any, tiny_policy: Any) -> None:
    policy = tiny_policy()
    with torch.no_grad():
        policy.transformer.A[0, 0] = math.nan
    validation = sample(policy, ["a cat"])
    assert validation.valid_PG == [[False, False]]
    assert not validation.videos.any()


def test_stage_means_are_over_valid_videos() -> None:
    nothing = [math.nan, math.nan]
    validation = ValidationSet(
        ["a", "b"],
        [[[0.25, 0.5], nothing], [[0.75, 1.0], [0.5, 0.0]]],
        [[True, False], [True, False]],
        torch.empty(0),
    )
    assert validation.stage_means(2) == [0.5, 0.75]
    none = ValidationSet(["a"], [[nothing]], [[False]], torch.empty(0))
    assert all(math.isnan(mean) for mean in none.stage_means(2))
    assert len(none.stage_means(2)) == 2


def test_two_ranks_give_what_one_gives(
    run_ranks: Callable[..., list[Any]], sample: Any, tiny_policy: Any
) -> None:
    """Five prompts, then one, over two ranks: all scores in order, each prompt once, on both; the
    same number of passes on each.
    """
    script = f"""
import json, torch
from conftest import TinyJudge, TinyPolicy
from fastgrpo.distributed import collectives
from fastgrpo.config import RolloutConfig, RuntimeConfig
from fastgrpo.training.validation import sample_validation
from fastgrpo.rewards.queue import ScoringQueue
device = collectives.start(RuntimeConfig(device="cpu"))
judge, answers = ScoringQueue(TinyJudge()), []
for prompts, num_videos in (({PROMPTS!r}, 4), (["a cat"], 1)):
    policy = TinyPolicy()
    cfg = RolloutConfig(**{SETTING!r})
    v = sample_validation(
        policy, judge, prompts, cfg,
        seed=3, num_videos=num_videos, device=device, compute_dtype=torch.float32,
    )
    passes = collectives.gather(len(policy.batch_sizes))
    answers.append([v.prompts, v.scores_PGK, v.valid_PG, v.videos.tolist(), passes])
print(json.dumps(answers))
judge.close()
collectives.stop()
"""
    first, second = run_ranks(script)
    assert first == second
    for answer, (prompts, num_videos) in zip(first, ((PROMPTS, 4), (["a cat"], 1)), strict=True):
        alone = sample(tiny_policy(), prompts, num_videos=num_videos)
        expected = [alone.prompts, alone.scores_PGK, alone.valid_PG, alone.videos.tolist()]
        assert answer[:4] == json.loads(json.dumps(expected))
        assert answer[4][0] == answer[4][1]


@pytest.mark.parametrize("uses_average", [False, True])
@pytest.mark.parametrize("sde", ["ode", "cps"])
def test_the_evaluation_has_its_own_sampler_and_the_averaged_weights(
    sample: Any, tiny_policy: Any, tiny_judge: Any, tmp_path: Path, sde: Any, uses_average: bool
) -> None:
    """Neither the training's sampler nor, if there is an average, the weights that are trained."""
    policy, average = tiny_policy(), dict(tiny_policy(7).transformer.named_parameters())
    rollout = RolloutConfig(**(SETTING | {"sde": "dance"}))
    config = TrainConfig(
        policy,
        tiny_judge(),
        PromptsConfig("-"),
        seed=3,
        output_dir=str(tmp_path),
        rollout=rollout,
        update=UpdateConfig(num_best=1, num_worst=1),
        evaluation=EvaluationConfig(sde=sde, num_generations=2, num_videos=0),
    )
    judge = ScoringQueue(config.reward)
    trainer: Any = SimpleNamespace(
        config=config,
        policy=policy,
        judge=judge,
        evaluation_weights=average if uses_average else None,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
    )
    found = evaluate(trainer, PROMPTS, 1)
    judge.close()
    expected = sample(tiny_policy(7 if uses_average else 0), sde=sde, same_noise=False)
    stages = config.reward.stages
    means = expected.stage_means(len(stages))
    assert [found[f"eval/rewards/{stage}/mean"] for stage in stages] == means
    other = sample(tiny_policy(0 if uses_average else 7), sde=sde, same_noise=False)
    dance = sample(tiny_policy(7 if uses_average else 0), sde="dance", same_noise=False)
    assert means not in [made.stage_means(len(stages)) for made in (other, dance)]


def test_without_prompts_there_is_no_evaluation() -> None:
    assert evaluate(object(), [], 0) == {}  # type: ignore[arg-type]
