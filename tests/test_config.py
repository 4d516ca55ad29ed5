"""The checks of every section: what they refuse, in what words, and the edge that they accept."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.config import (
    CheckpointConfig,
    EvaluationConfig,
    PacingConfig,
    ParallelConfig,
    PromptsConfig,
    RolloutConfig,
    RuntimeConfig,
    ScoringConfig,
    TrackingConfig,
    TrainConfig,
    UpdateConfig,
)


def invalid(
    section: type, key: str, values: Iterable[Any], expected: str
) -> list[tuple[type, dict[str, Any], str, str, Any]]:
    """One case per value of one key: section, what is set, start of the message, expected, got."""
    name = {
        RolloutConfig: "rollout.",
        UpdateConfig: "update.",
        EvaluationConfig: "evaluation.",
        CheckpointConfig: "checkpoint.",
        RuntimeConfig: "runtime.",
        TrainConfig: "",
    }[section]
    return [(section, {key: value}, name + key, expected, value) for value in values]


ONE_OR_MORE = (
    "num_prompts",
    "num_generations",
    "height",
    "width",
    "num_frames",
    "micro_batch_size",
    "window_interval",
)
NAN, INF = math.nan, math.inf
INVALID = [
    (ScoringConfig, {"max_pending": 0}, "scoring.max_pending", "at least 1", 0),
    (
        ScoringConfig,
        {"max_invalid_share": 1.5},
        "scoring.max_invalid_share",
        "a share in [0, 1]",
        1.5,
    ),
    *[case for key in ONE_OR_MORE for case in invalid(RolloutConfig, key, [0], "at least 1")],
    *invalid(RolloutConfig, "num_inference_steps", [1], "at least 2"),
    *[
        case
        for key in ("shift", "eta")
        for case in invalid(RolloutConfig, key, [0.0, -1.0, INF, NAN], "a positive number")
    ],
    *invalid(RolloutConfig, "guidance_scale", [INF, NAN], "a finite number"),
    (RolloutConfig, {"sde": "cps", "eta": 1.0001}, "rollout.eta", "at most 1 for cps", 1.0001),
    (
        RolloutConfig,
        {"sde_window": "sliding", "window_size": 0},
        "rollout.window_size",
        "1 to 15",
        0,
    ),
    (
        RolloutConfig,
        {"sde_window": "sliding", "window_size": 16},
        "rollout.window_size",
        "1 to 15",
        16,
    ),
    (
        RolloutConfig,
        {"sde_window": "sliding", "num_inference_steps": 4},
        "rollout.window_size",
        "1 to 3",
        4,
    ),
    (UpdateConfig, {"num_best": -1}, "update.num_best", "no negative", (-1, 4)),
    (UpdateConfig, {"num_worst": -1}, "update.num_best/num_worst", "no negative", (4, -1)),
    (UpdateConfig, {"num_best": 0, "num_worst": 0}, "update.num_best + num_worst", "at least 1", 0),
    *invalid(UpdateConfig, "timestep_fraction", [0.0, 1.01, NAN], "(0, 1]"),
    *invalid(UpdateConfig, "clip_range", [0.0, 1.0, NAN], "(0, 1)"),
    *invalid(UpdateConfig, "adv_clip", [0.0, -5.0, NAN], "a positive number"),
    *[
        case
        for key in ("kl_coef", "weight_decay")
        for case in invalid(UpdateConfig, key, [-1e-9, INF, NAN], "at least 0")
    ],
    *invalid(UpdateConfig, "optimizer_steps", [0], "at least 1"),
    *invalid(UpdateConfig, "learning_rate", [0.0, -1.0, INF, NAN], "a positive number"),
    *invalid(UpdateConfig, "warmup_iterations", [-1], "at least 0"),
    *invalid(UpdateConfig, "warmup_iterations", [3], "constant_with_warmup"),
    *invalid(UpdateConfig, "betas", [(1.0, 0.9), (0.9, -0.1), (NAN, 0.9)], "two numbers in [0, 1)"),
    *invalid(UpdateConfig, "max_grad_norm", [0.0, NAN], "a positive number"),
    *invalid(UpdateConfig, "ema_decay", [-0.1, 1.0, NAN], "[0, 1)"),
    *invalid(UpdateConfig, "max_skipped_updates", [0], "at least 1"),
    *invalid(EvaluationConfig, "interval", [-1], "at least 0"),
    *invalid(EvaluationConfig, "num_generations", [0], "at least 1"),
    *invalid(EvaluationConfig, "num_videos", [-1], "at least 0"),
    *invalid(CheckpointConfig, "interval", [0], "at least 1"),
    *invalid(CheckpointConfig, "keep", [0], "at least 1"),
    *invalid(RuntimeConfig, "num_threads", [-1], "at least 0"),
    *invalid(RuntimeConfig, "timeout_minutes", [0.0, INF, NAN], "a positive number"),
    *invalid(TrainConfig, "name", ["", ".", "..", "a/b"], "a folder's name"),
    *invalid(TrainConfig, "iterations", [-1], "at least 0"),
    *invalid(TrainConfig, "seed", [-1, 2**63], "[0, 2^63)"),
    (TrainConfig, {"rollout": RolloutConfig(sde="ode")}, "rollout.sde", "a log-probability", "ode"),
    (
        TrainConfig,
        {"rollout": RolloutConfig(eta=1.5), "evaluation": EvaluationConfig(sde="cps")},
        "rollout.eta",
        "at most 1",
        1.5,
    ),
    (
        TrainConfig,
        {"rollout": RolloutConfig(num_generations=7)},
        "rollout.num_generations",
        "num_best + update.num_worst = 8",
        7,
    ),
    (
        TrainConfig,
        {"rollout": RolloutConfig(num_prompts=2), "update": UpdateConfig(optimizer_steps=17)},
        "update.optimizer_steps",
        "at most 16, the videos kept",
        17,
    ),
    (
        TrainConfig,
        {
            "runtime": RuntimeConfig(deterministic=True),
            "parallel": ParallelConfig(compile=True),
        },
        "parallel.compile",
        "false with runtime.deterministic",
        True,
    ),
]


def needed(section: type) -> dict[str, Any]:
    return (
        {"policy": object(), "reward": object(), "prompts": PromptsConfig(train="a.txt")}
        if section is TrainConfig
        else {}
    )


@pytest.mark.parametrize(
    ("section", "values", "key", "expected", "got"), INVALID, ids=lambda value: str(value)[-60:]
)
def test_every_check_names_key_expectation_and_value(
    section: type, values: dict[str, Any], key: str, expected: str, got: Any
) -> None:
    section(**needed(section))  # the rest of it is fine
    with pytest.raises(
        ValueError,
        match=f"^{re.escape(key)}.*{re.escape(expected)}.*, got {re.escape(repr(got))}$",
    ):
        section(**needed(section), **values)


EDGES = [
    (ScoringConfig, {"max_pending": 1, "max_invalid_share": 0.0}),
    (RolloutConfig, {"sde": "cps", "eta": 1.0}),
    (RolloutConfig, {"eta": 1.5}),
    (
        RolloutConfig,
        {"num_inference_steps": 2, "num_generations": 1, "height": 1, "guidance_scale": 0.0},
    ),
    (RolloutConfig, {"sde_window": "sliding", "window_size": 15}),
    (RolloutConfig, {"sde_window": "all", "num_inference_steps": 3, "window_size": 4}),
    (
        UpdateConfig,
        {
            "timestep_fraction": 1.0,
            "num_best": 0,
            "num_worst": 1,
            "betas": (0.0, 0.0),
            "adv_clip": math.inf,
            "ema_decay": 0.0,
        },
    ),
    (EvaluationConfig, {"interval": 0, "num_videos": 0}),
    (TrainConfig, {"seed": 2**63 - 1, "iterations": 0, "name": "a.b"}),
    (TrainConfig, {"rollout": RolloutConfig(num_generations=8)}),
    (TrainConfig, {"rollout": RolloutConfig(eta=1.5)}),
]


@pytest.mark.parametrize(("section", "values"), EDGES, ids=str)
def test_the_edge_of_each_check_is_accepted(section: type, values: dict[str, Any]) -> None:
    built = section(**needed(section), **values)
    assert {key: getattr(built, key) for key in values} == values


def test_run_folder_lies_in_the_output_folder() -> None:
    config = TrainConfig(
        **needed(TrainConfig),
        name="first",
        output_dir="some/runs",
        pacing=PacingConfig(),
        tracking=TrackingConfig(),
    )
    assert config.run_folder == Path("some/runs/first")
