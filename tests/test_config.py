"""Recipes and overrides: the paper's defaults, later files win, and one clear line for whatever is
wrong.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastgrpo import files
from fastgrpo.config import (
    CheckpointConfig,
    EvaluationConfig,
    PacingConfig,
    PromptsConfig,
    RolloutConfig,
    RuntimeConfig,
    ScoringConfig,
    TrackingConfig,
    TrainConfig,
    UpdateConfig,
    packaged_recipes,
    parse_config,
)
from fastgrpo.errors import fail
from fastgrpo.files import find_file

RECIPE = """
policy: {class_path: fastgrpo.shapes.policy.ShapesPolicy}
reward: {class_path: fastgrpo.shapes.judge.ShapesJudge}
prompts: {train: captions.txt}
"""

# method.md, section 4, "Common", and the marked defaults of sections 1 to 3.
PAPER = {
    "rollout": {
        "sde": "dance",
        "num_inference_steps": 16,
        "eta": 0.5,
        "shift": 5.0,
        "num_generations": 16,
        "same_noise": True,
        "decode": "x0",
        "timestep_rounding": "trunc",
        "sde_window": "all",
        "window_size": 4,
        "window_interval": 25,
    },
    "update": {
        "optimizer": "adamw",
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
        "lr_scheduler": "constant",
        "warmup_iterations": 0,
        "timestep_fraction": 0.6,
        "num_best": 4,
        "num_worst": 4,
        "clip_range": 1e-4,
        "adv_clip": 5.0,
        "gradient_accumulation": 4,
        "cfg_grad": "both",
        "kl_coef": 0.0,
        "ema_decay": 0.0,
    },
    "pacing": {
        "mode": "self_paced",
        "gate": "difference",
        "saturation": "one_minus_hoyer",
        "competence": "ema",
        "momentum": 0.9,
        "sharpness": 5.0,
        "sparsity_weight": 0.5,
    },
}
# The same section's Wan2.1-T2V-1.3B column, from which the sizes and rates of the defaults come.
WAN_1_3B = {
    "": {"iterations": 150},
    "rollout": {
        "height": 480,
        "width": 832,
        "num_frames": 53,
        "num_prompts": 8,
        "guidance_scale": 5.0,
    },
    "update": {"learning_rate": 5e-6},
    "pacing": {"thresholds": (0.75, 0.75)},
}


@pytest.fixture
def parse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """parse(YAML, more YAML, ..., arguments=[...]): the configuration, or the error that was
    printed.
    """

    def run(*texts: str, arguments: tuple[str, ...] = (), options: type | None = None) -> Any:
        argv = []
        for number, text in enumerate((RECIPE, *texts)):
            file = tmp_path / f"{number}.yaml"
            file.write_text(text)
            argv += ["--config", str(file)]
        try:
            return parse_config([*argv, *arguments], options)
        except SystemExit as stop:
            captured = capsys.readouterr()
            return (
                captured.err if stop.code == 2 and not captured.out else (stop.code, captured.out)
            )

    return run


@pytest.mark.parametrize("column", [PAPER, WAN_1_3B])
def test_defaults_are_the_papers(
    column: dict[str, dict[str, Any]], parse: Callable[..., Any]
) -> None:
    config, _, _ = parse()
    for section, values in column.items():
        got = getattr(config, section) if section else config
        assert {key: getattr(got, key) for key in values} == values
    assert config.update.num_best + config.update.num_worst == 8


def test_later_files_win_and_overrides_beat_them_all(parse: Callable[..., Any]) -> None:
    config, _, _ = parse(
        "rollout: {height: 240, width: 416}\nseed: 3\n",
        "rollout: {height: 320}\nupdate: {learning_rate: 1e-4}\n",
        arguments=(
            "--rollout.num_generations",
            "12",
            "--seed=7",
            "--pacing.thresholds",
            "[0.5, 0.25]",
        ),
    )
    assert (config.rollout.height, config.rollout.width, config.rollout.num_generations) == (
        320,
        416,
        12,
    )
    assert (config.seed, config.pacing.thresholds, config.update.learning_rate) == (
        7,
        (0.5, 0.25),
        1e-4,
    )
    assert config.rollout == RolloutConfig(
        height=320, width=416, num_generations=12
    )  # nothing else has moved


def test_an_override_before_a_file_loses_to_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + "seed: 5\n")
    config, _, _ = parse_config(["--seed", "4", "--config", str(recipe)])
    assert config.seed == 5


def test_saved_yaml_loads_to_an_equal_configuration(
    parse: Callable[..., Any], tmp_path: Path
) -> None:
    changed = """
name: a b
policy: {class_path: fastgrpo.shapes.policy.ShapesPolicy, init_args: {checkpoint: some/where}}
prompts: {validation: other.txt, shuffle: false}
rollout: {eta: 0.1, guidance_scale: 3, sde: cps}
pacing: {thresholds: [0.1, 0.30000000000000004]}
update: {betas: [0.8, 0.95], learning_rate: 3e-5}
tracking: {trackers: []}
"""
    first, text, _ = parse(changed, arguments=("--resume", "auto"))
    assert first.resume == "auto"
    saved = tmp_path / "saved.yaml"
    saved.write_text(text)
    second, again, _ = parse_config(["--config", str(saved)])
    assert again == text
    for field in dataclasses.fields(TrainConfig):
        if field.name not in ("policy", "reward", "resume"):
            assert getattr(second, field.name) == getattr(first, field.name), field.name
    assert type(second.policy) is type(first.policy)
    assert second.policy.checkpoint == first.policy.checkpoint == "some/where"
    assert second.resume == "never"  # how a start was asked for is not part of the run
    # The values that were given, and not only two equal sets of defaults:
    assert (second.pacing.thresholds, second.update.betas, second.tracking.trackers) == (
        (0.1, 0.30000000000000004),
        (0.8, 0.95),
        (),
    )
    assert (second.rollout.guidance_scale, second.prompts.validation) == (3.0, "other.txt")


@dataclass(frozen=True)
class Options:
    """Options of a command."""

    repeats: int = 3
    """Times."""


def test_a_commands_own_options(parse: Callable[..., Any]) -> None:
    config, text, options = parse(arguments=("--options.repeats", "5"), options=Options)
    assert options == Options(repeats=5)
    assert "repeats" not in text
    assert config.rollout == RolloutConfig()
    assert "repeats" in parse(arguments=("--options.repeats", "x"), options=Options)


def test_help_and_print_config_end_with_code_0(
    parse: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, text, _ = parse()
    for argument, expected in (
        ("--print_config", "num_generations: 16"),
        ("--help", "the videos of one group"),
    ):
        with pytest.raises(SystemExit) as stop:
            parse_config(["--config", str(tmp_path / "0.yaml"), argument])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert expected in out
        if argument == "--print_config":
            saved = tmp_path / "printed.yaml"
            saved.write_text(out)
            assert parse_config(["--config", str(saved)])[1] == text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rollout: {height: 3}\nseed: 1\nrollout: {width: 3}", ["'rollout'", "twice", "line 3"]),
        ("rollout:\n  height: 3\n  height: 3\n", ["'height'", "twice", "line 3"]),
        (
            "policy: {class_path: fastgrpo.shapes.policy.ShapesPolicy, init_args: {checkpoint: a, checkpoint: b}}",
            ["'checkpoint'", "twice"],
        ),
        ("rollout: {heigth: 3}", ["rollout", "'heigth'"]),
        ("rolout: {height: 3}", ["rolout"]),
        (
            "policy: {class_path: fastgrpo.shapes.policy.ShapesPolicy, init_args: {chekpoint: a}}",
            ["policy", "'chekpoint'"],
        ),
        ("policy: {class_path: no.such.Thing}", ["policy", "no.such.Thing"]),
        (
            "policy: {class_path: fastgrpo.config.RolloutConfig}",
            ["policy", "RolloutConfig", "protocol Policy"],
        ),
        (
            "reward: {class_path: fastgrpo.shapes.policy.ShapesPolicy}",
            ["reward", "protocol RewardModel"],
        ),
        ("rollout: {height: tall}", ["rollout.height", "int", "tall"]),
        ("rollout: {height: 1.5}", ["rollout.height", "int", "1.5"]),
        ("rollout: {height: true}", ["rollout.height", "int", "True"]),
        ("rollout: {same_noise: 3}", ["rollout.same_noise", "bool", "3"]),
        ("rollout: {sde: euler}", ["rollout.sde", "'cps'", "euler"]),
        ("pacing: {thresholds: 0.5}", ["pacing.thresholds", "tuple", "0.5"]),
        ("pacing: {thresholds: [high]}", ["pacing.thresholds", "float", "high"]),
        ("update: {betas: [0.9]}", ["update.betas", "2 elements", "[0.9]"]),
        ("rollout: {height: null}", ["rollout.height", "int", "None"]),
        ("pacing: {mode: null}", ["pacing.mode", "'joint'", "None"]),
        ("resume: null", ["resume", "'auto'", "None"]),
        ("seed: null", ["seed", "int", "None"]),
        ("rollout: null", ["rollout", "keys and their values", "None"]),
        ("rollout: [1, 2]", ["rollout", "keys and their values", "[1, 2]"]),
        ("update: 3", ["update", "keys and their values", "3"]),
        ("prompts: {train: null}", ["prompts.train", "required"]),
        ("{", ["line 1"]),
        ("- 1\n", ["config"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named_in_one_line(
    text: str, parts: list[str], parse: Callable[..., Any]
) -> None:
    error = parse(text)
    assert isinstance(error, str)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--rollout.heigth", "3"), ["--rollout.heigth"]),
        (("--rollout.height", "tall"), ["rollout.height", "int", "tall"]),
        (("--rollout.height", "0"), ["rollout.height", "at least 1", "0"]),
        (("--config", "no_such_file.yaml"), ["no_such_file.yaml"]),
        (("--seed", "-1"), ["seed", "[0, 2^63)", "-1"]),
    ],
)
def test_what_is_wrong_in_an_argument_is_named(
    arguments: tuple[str, ...], parts: list[str], parse: Callable[..., Any]
) -> None:
    error = parse(arguments=arguments)
    assert isinstance(error, str)
    for part in parts:
        assert part in error


def test_arguments_alone_will_do_and_a_missing_policy_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--reward", "fastgrpo.shapes.judge.ShapesJudge", "--prompts.train", "a"]
    config, _, _ = parse_config([*arguments, "--policy", "fastgrpo.shapes.policy.ShapesPolicy"])
    assert config.prompts == PromptsConfig(train="a")
    with pytest.raises(SystemExit) as stop:
        parse_config(arguments)
    assert stop.value.code == 2
    assert "policy" in capsys.readouterr().err


def invalid(
    section: type, key: str, values: Iterable[Any], expected: str
) -> list[tuple[type, dict[str, Any], str, str, Any]]:
    """One case a value of one key: section, what is set, start of the message, what was expected,
    what came.
    """
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
    *invalid(UpdateConfig, "gradient_accumulation", [0], "at least 1"),
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


def test_a_file_is_looked_for_here_and_then_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, installed = tmp_path / "here", tmp_path / "installed"
    (installed / "fastgrpo").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(files, "PACKAGED", installed)
    with pytest.raises(FileNotFoundError) as caught:
        find_file("fastgrpo/a.txt", "prompts.train")
    for part in ("prompts.train", str(here / "fastgrpo/a.txt"), str(installed / "fastgrpo/a.txt")):
        assert part in str(caught.value)
    (installed / "fastgrpo" / "a.txt").write_text("beside")
    assert find_file("fastgrpo/a.txt", "key").read_text() == "beside"
    (here / "fastgrpo").mkdir()
    (here / "fastgrpo" / "a.txt").write_text("here")
    assert find_file("fastgrpo/a.txt", "key").read_text() == "here"
    with pytest.raises(FileNotFoundError, match="prompts"):
        find_file("fastgrpo", "prompts.train")  # a folder is no file


def test_a_recipe_is_found_beside_the_package_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = "fastgrpo/recipes/shapes.yaml"
    monkeypatch.chdir(tmp_path)
    words = ["--config", recipe, "--config", "other.yaml", "--name", recipe]
    assert packaged_recipes(words) == ["--config", str(files.PACKAGED / recipe), *words[2:]]
    (tmp_path / "fastgrpo" / "recipes").mkdir(parents=True)
    (tmp_path / recipe).write_text("name: mine\n")
    assert packaged_recipes(words) == words


def test_refuse_speaks_once_a_node_and_ends_with_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, local, expected in (
        ("0", "0", "error: what is wrong\n"),
        ("1", "1", ""),
        ("8", "0", "error on rank 8: what is wrong\n"),
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(SystemExit) as stop:
            fail("what is wrong")
        assert stop.value.code == 2
        assert capsys.readouterr().err == expected
