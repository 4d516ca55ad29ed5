"""Recipes and overrides: later files win, and one clear line for whatever is wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastgrpo import files
from fastgrpo.config import PromptsConfig, RolloutConfig, TrainConfig
from fastgrpo.training.recipe_parser import RENAMED, find_recipes, parse_config

RECIPE = """
policy: {class_path: fastgrpo.shapes.policy.ShapesPolicy}
reward: {class_path: fastgrpo.shapes.judge.ShapesJudge}
prompts: {train: captions.txt}
"""


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


def test_a_check_sees_all_but_the_classes_before_these_are_looked_at(tmp_path: Path) -> None:
    file, seen = tmp_path / "a.yaml", []
    file.write_text(RECIPE.replace("ShapesPolicy", "NoPolicy"))
    words = ["--config", str(file), "--policy.init_args.fused", "true", "--seed", "-0"]
    words += ["--reward=fastgrpo.NoJudge", "--rollout.eta", "0.3", "--reward.noise", "0.1"]

    def check(values: Any) -> None:
        seen.append((values.prompts, values.seed, values.rollout.eta))
        raise ValueError("enough")

    with pytest.raises(SystemExit):
        parse_config(words, check=check)
    assert seen == [(PromptsConfig(train="captions.txt"), 0, 0.3)]


def test_help_and_print_config_end_with_code_0(
    parse: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(values: Any) -> None:
        raise ValueError("nothing is started that could be refused")

    _, text, _ = parse()
    for argument, expected in (
        ("--print_config", "num_generations: 16"),
        ("--print_config=skip_default", "class_path: fastgrpo.shapes.judge.ShapesJudge"),
        ("--help", "the videos of one group"),
        ("--policy.help=fastgrpo.shapes.policy.ShapesPolicy", "--policy.checkpoint"),
    ):
        with pytest.raises(SystemExit) as stop:
            parse_config(["--config", str(tmp_path / "0.yaml"), argument], check=refuse)
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
            "policy: {class_path: fastgrpo.shapes.policy.ShapesPolicy, "
            "init_args: {checkpoint: a, checkpoint: b}}",
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
            [
                "policy: expected a subclass of fastgrpo.interfaces.Policy, "
                "got fastgrpo.config.RolloutConfig"
            ],
        ),
        (
            "reward: {class_path: fastgrpo.shapes.policy.ShapesPolicy}",
            [
                "reward: expected a subclass of fastgrpo.interfaces.RewardModel, "
                "got fastgrpo.shapes.policy.ShapesPolicy"
            ],
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
        (
            "policy: {class_path: fastgrpo.policies.shapes.ShapesPolicy}\n"
            "prompts: {heldout: a.txt}",
            [
                "earlier version",
                "fastgrpo.policies.shapes by fastgrpo.shapes.policy",
                "prompts.heldout by prompts.validation",
            ],
        ),
        (
            "reward: {class_path: fastgrpo.rewards.judge.StageJudge, init_args: {engine: "
            "{class_path: fastgrpo.rewards.served.ServerEngine, init_args: {transport: mp4}}}}",
            ["fastgrpo.rewards.judge by fastgrpo.rewards.vlm.judge", "remove transport"],
        ),
        (
            "reward: {class_path: fastgrpo.rewards.vlm.judge.StageJudge, init_args: {engine: "
            "{class_path: fastgrpo.config.RolloutConfig}}}",
            ["expected a subclass of fastgrpo.rewards.vlm.engine.Engine, got fastgrpo.config."],
        ),
        (
            "update: {gradient_accumulation: 4}",
            ["earlier version", "replace update.gradient_accumulation by update.optimizer_steps, "],
        ),
        ("{", ["line 1"]),
        ("[" * 9999, ["nested too deeply"]),
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
        (
            ("--update.gradient_accumulation", "4"),
            ["--update.gradient_accumulation", "write update.optimizer_steps, "],
        ),
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


def test_a_recipe_is_found_beside_the_package_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = "fastgrpo/recipes/shapes.yaml"
    monkeypatch.chdir(tmp_path)
    words = ["--config", recipe, "--config", "other.yaml", "--name", recipe]
    assert find_recipes(words) == ["--config", str(files.PACKAGED / recipe), *words[2:]]
    (tmp_path / "fastgrpo" / "recipes").mkdir(parents=True)
    (tmp_path / recipe).write_text("name: mine\n")
    assert find_recipes(words) == words


def test_the_names_of_today_exist() -> None:
    modules = list(RENAMED.values())
    assert all(importlib.util.find_spec(module) for module in modules)


def test_old_names_in_values_and_comments_are_no_old_configuration(
    tmp_path: Path, parse: Callable[..., Any]
) -> None:
    """A user's own file may be called heldout.txt."""
    text = "# heldout: a note on fastgrpo.rewards.judge\nprompts: {validation: my/heldout.txt}"
    config, _, _ = parse(text)
    assert config.prompts.validation == "my/heldout.txt"
