"""An ablation's table and curves against numbers worked out by hand, its cells against the
overlays, and what it refuses.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fastgrpo import __main__ as command_line
from fastgrpo.evaluation.ablation import MODES, check_ablation, make_cells, read_result
from fastgrpo.evaluation.ablation_results import (
    LAST_ITERATIONS,
    UNTRAINED,
    CellResult,
    absences,
    caption,
    cell_records,
    compared_iteration,
    curves,
    mode_records,
    table_cells,
)
from fastgrpo.training.recipe_parser import parse_config
from fastgrpo.training.run_folder import differences

RECIPES = Path(__file__).resolve().parents[2] / "fastgrpo" / "recipes"
STAGES = ("easy", "very_hard")


def result(
    mode: str,
    seed: int,
    easy: list[float | None],
    hard: list[float | None],
    last: int | None = None,
) -> CellResult:
    """Evaluated at iterations 0, 4, 8, ...; the training reward of iteration i is i/100 + seed."""
    last = 4 * (len(easy) - 1) if last is None else last
    rows: list[dict[str, Any]] = [
        {"iteration": i} | ({"reward": i / 100 + seed} if i else {}) for i in range(last + 1)
    ]
    for i, (e, h) in enumerate(zip(easy, hard, strict=True)):
        rows[4 * i] |= {"eval/rewards/easy/mean": e, "eval/rewards/very_hard/mean": h}
    return CellResult(mode, seed, rows)


def complete() -> list[CellResult]:
    return [
        result("one_stage", 0, [0.2, 0.5, 0.7, 0.8], [0.1, 0.1, 0.1, 0.1]),
        result("joint", 0, [0.2, 0.4, 0.5, 0.6], [0.1, 0.2, 0.3, 0.4]),
        result("one_stage", 1, [0.4, 0.5, 0.7, 0.9], [0.3, 0.2, 0.1, 0.2]),
        result("joint", 1, [0.4, 0.5, 0.6, 0.7], [0.3, 0.4, 0.5, 0.7]),
    ]


def test_records_of_modes_by_hand() -> None:
    """The untrained model counts once a seed; the training reward is that of iterations 3 to 12."""
    cells = complete()
    assert compared_iteration(cells, 12) == 12
    untrained, one_stage, joint = mode_records(cells, STAGES, 12)
    assert (untrained["mode"], untrained["seeds"], untrained["iteration"]) == (UNTRAINED, 2, 0)
    assert (untrained["easy"], untrained["very_hard"]) == pytest.approx((0.3, 0.2))
    assert untrained["training_reward"] is untrained["training_reward_std"] is None
    assert (one_stage["mode"], one_stage["easy"]) == ("one_stage", pytest.approx(0.85))
    assert (joint["mode"], joint["seeds"], joint["iteration"]) == ("joint", 2, 12)
    assert joint["very_hard"] == pytest.approx(0.55)
    assert joint["very_hard_std"] == pytest.approx(np.std([0.4, 0.7], ddof=1))
    assert joint["training_reward"] == pytest.approx(np.mean([0.075, 1.075]))
    assert LAST_ITERATIONS == 10
    assert cells[0].training_reward(4) == pytest.approx((0.01 + 0.02 + 0.03 + 0.04) / 4)
    assert cells[0].training_reward(0) is None


def test_one_table_for_readers() -> None:
    head, *lines = table_cells(mode_records(complete(), STAGES, 12), STAGES)
    assert head == ["reward", "seeds", "easy", "very hard", "training reward"]
    assert lines[2] == ["joint", "2", "0.650 ± 0.071", "0.550 ± 0.212", "0.575 ± 0.707"]
    one_seed = table_cells(mode_records(complete()[1:2], STAGES, 12), STAGES)
    assert one_seed[1:] == [
        [UNTRAINED, "1", "0.200", "0.100", "–"],
        ["joint", "1", "0.600", "0.400", "0.075"],
    ]
    assert "iteration 12" in caption(12)


def test_cells_as_records() -> None:
    cells = [
        *complete()[:2],
        result("one_stage", 1, [0.4, 0.5], [None, 0.2], last=6),
        CellResult("joint", 1, []),
    ]
    assert [list(record.values()) for record in cell_records(cells, STAGES, 12)] == [
        ["one_stage", 0, 12, 12, 0.8, 0.1, pytest.approx(0.075)],
        ["joint", 0, 12, 12, 0.6, 0.4, pytest.approx(0.075)],
        ["one_stage", 1, 6, None, None, None, None],
        ["joint", 1, None, None, None, None, None],
    ]


def test_unfinished_cells_are_left_out_and_named() -> None:
    cells = [
        *complete()[:2],
        result("one_stage", 1, [0.4, 0.5], [0.3, 0.2], last=6),
        CellResult("joint", 1, []),
    ]
    assert compared_iteration(cells, 12) == 12
    assert [row["seeds"] for row in mode_records(cells, STAGES, 12)] == [2, 1, 1]
    assert absences(cells, 12, 12) == [
        "one_stage_seed1: at iteration 6 of 12, not in the table",
        "joint_seed1: missing",
    ]
    assert absences(complete(), 12, 12) == []
    cells = [replace(cell, judge="" if i == 1 else "0f") for i, cell in enumerate(complete())]
    missing, line = absences([*cells, CellResult("joint", 2, [])], 12, 12)
    assert missing == "joint_seed2: missing"
    assert line.startswith("not scored by the same judge as one_stage_seed0 (judge.json)")
    assert line.endswith(": joint_seed0")


def test_while_none_is_finished_all_are_compared_where_all_have_been() -> None:
    cells = [
        result("one_stage", 0, [0.2, 0.5, 0.7], [0.1, 0.1, 0.1]),
        result("joint", 0, [0.2, 0.4], [0.1, 0.2], last=7),
    ]
    assert compared_iteration(cells, 12) == 4
    assert [row["easy"] for row in mode_records(cells, STAGES, 4)] == [0.2, 0.5, 0.4]
    assert absences(cells, 12, 4) == [
        "one_stage_seed0: at iteration 8 of 12",
        "joint_seed0: at iteration 7 of 12",
    ]
    just_begun = [*cells, result("joint", 1, [0.2], [0.1])]
    assert compared_iteration(just_begun, 12) is None
    assert [row["seeds"] for row in mode_records(just_begun, STAGES, None)] == [2, 0, 0]
    assert "nothing to compare yet" in caption(None)
    assert compared_iteration([CellResult("joint", 0, [])], 12) is None


def test_a_run_that_went_further_was_perhaps_not_evaluated_here() -> None:
    """`evaluation.interval 4` and 6 iterations asked of cells of which one ended there and one went
    on.
    """
    cells = [
        result("joint", 0, [0.2, 0.4], [0.1, 0.2], last=6),
        result("joint", 1, [0.2, 0.4], [0.1, 0.2], last=6),
    ]
    cells[0].rows[6]["eval/rewards/easy/mean"] = 0.5
    assert compared_iteration(cells, 6) == 6
    assert absences(cells, 6, 6)[0] == "joint_seed1: at iteration 6 of 6, not in the table"


def test_a_score_that_could_not_be_had_is_left_out() -> None:
    cells = [
        result("joint", 0, [0.2, None], [0.1, 0.2]),
        result("joint", 1, [0.4, 0.8], [0.1, 0.4]),
    ]
    joint = mode_records(cells, STAGES, 4)[1]
    assert (joint["easy"], joint["easy_std"]) == (0.8, None)
    assert joint["very_hard"] == pytest.approx(0.3)


def test_curves_are_means_with_bands() -> None:
    figure = curves(complete(), STAGES, 12)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["easy", "very hard"]
    hard = figure.axes[1]
    lines = {line.get_gid(): line for line in hard.lines}
    assert lines.keys() == {"one_stage/very_hard", "joint/very_hard"}
    assert list(lines["joint/very_hard"].get_xdata()) == [0, 4, 8, 12]
    means, deviations = (
        np.array([0.2, 0.3, 0.4, 0.55]),
        np.std([[0.1, 0.2, 0.3, 0.4], [0.3, 0.4, 0.5, 0.7]], axis=0, ddof=1),
    )
    assert lines["joint/very_hard"].get_ydata() == pytest.approx(means)
    corners = hard.collections[1].get_paths()[0].vertices
    for at, mean, deviation in zip((0, 4, 8, 12), means, deviations, strict=True):
        ys = corners[corners[:, 0] == at][:, 1]
        assert (ys.min(), ys.max()) == pytest.approx((mean - deviation, mean + deviation))
        assert hard.get_ylim()[0] < mean - deviation
        assert mean + deviation < hard.get_ylim()[1], "the whole band is in the picture"


def test_curves_of_one_seed_have_no_band_and_leave_out_what_the_table_does() -> None:
    cells = [*complete()[:2], result("joint", 1, [0.4, 0.5], [0.3, 0.2])]
    figure = curves(cells, STAGES, 12)
    assert [len(axes.collections) for axes in figure.axes] == [0, 0]
    (joint,) = [line for line in figure.axes[0].lines if line.get_gid() == "joint/easy"]
    assert list(joint.get_ydata()) == [0.2, 0.4, 0.5, 0.6]


@pytest.mark.parametrize("recipe", [["shapes.yaml"], ["shapes.yaml", "shapes_literal_gate.yaml"]])
def test_cells_are_the_overlays(recipe: list[str], tmp_path: Path) -> None:
    """A cell's configuration, as written and as its arguments parse, is the recipe's under
    ablation_<mode>.yaml (or dancegrpo.yaml).
    """
    base = [word for name in recipe for word in ("--config", str(RECIPES / name))] + [
        "--output_dir",
        str(tmp_path),
        "--name",
        "ab",
    ]
    config, text, _ = parse_config(base)
    cells = make_cells(config, text, base, MODES, [0, 7])
    assert [(cell.mode, cell.seed) for cell in cells] == [
        (mode, seed) for seed in (0, 7) for mode in MODES
    ]
    assert len(cells) == 10
    for cell in cells:
        if cell.mode == "static":  # its recipe, dancegrpo.yaml, has another judge too
            assert cell.config.pacing == replace(config.pacing, mode="static")
            continue
        overlay = RECIPES / f"ablation_{cell.mode}.yaml"
        where = [
            "--output_dir",
            str(tmp_path / "ab"),
            "--name",
            f"{cell.mode}_seed{cell.seed}",
            "--seed",
            str(cell.seed),
        ]
        expected, expected_text, _ = parse_config([*base, "--config", str(overlay), *where])
        assert (
            cell.folder == expected.run_folder == tmp_path / "ab" / f"{cell.mode}_seed{cell.seed}"
        )
        assert cell.config.pacing == expected.pacing
        assert cell.config.pacing.thresholds == config.pacing.thresholds
        own, own_text, _ = parse_config(cell.arguments)
        assert own_text == expected_text
        assert own.resume == "auto"
        assert differences(cell.values, yaml.safe_load(expected_text)) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--modes", "joint,jiont"],
            "modes: expected some of self_paced,one_stage,two_stage,joint,static, got 'jiont'",
        ),
        (
            ["--modes", "joint,one_stage,joint"],
            "modes: expected each once, got 'joint,",
        ),
        (["--seeds", "0,1,1"], "seeds: expected each once, got '0,1,1'"),
        (["--seeds", "0,x"], "seeds: expected whole numbers by commas"),
        (["--seeds=-1"], "seed: expected an integer in [0, 2^63), got -1"),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["--launcher", " "], "--launcher: expected a command"),
        (["--list", "--collect"], "--list and --collect: expected one of them"),
        (["--collect"], "collect: expected cells such as"),
        (["--seed", "3"], "--seed: an ablation sets it for each cell itself, from --seeds"),
        (
            ["--pacing.mode=joint"],
            "--pacing.mode: an ablation sets it for each cell itself, from --modes",
        ),
        (
            ["--resume", "never"],
            "--resume: an ablation sets it for each cell itself, always to auto",
        ),
        (["--mode", "joint"], "--mode"),
        (
            ["--prompts.validation", "null", "--evaluation.num_videos", "0"],
            "prompts.validation: expected prompts to compare on",
        ),
        (["--prompts.train", "nowhere.txt"], "prompts.train: expected a file"),
        (
            ["--pacing.thresholds", "[0.5]"],
            "pacing.thresholds: expected 2 of them (mode self_paced",
        ),
    ],
)
def test_refused_in_one_line(
    argv: list[str], words: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.main(
            [
                "ablate",
                "--config",
                str(RECIPES / "shapes.yaml"),
                "--output_dir",
                str(tmp_path),
                *argv,
            ]
        )
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_refused_under_torchrun_and_in_a_runs_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = ["--config", str(RECIPES / "shapes.yaml"), "--output_dir", str(tmp_path)]
    config, _, _ = parse_config(base)
    check_ablation(config, base)
    config.run_folder.mkdir()
    (config.run_folder / "table.md").symlink_to(tmp_path / "elsewhere.md")
    with pytest.raises(ValueError, match=r"table\.md: expected a file in"):
        check_ablation(config, base)
    (config.run_folder / "table.md").unlink()
    (config.run_folder / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="is a run's folder: give the ablation another --name"):
        check_ablation(config, base)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match="not under torchrun"):
        check_ablation(config, base)


def test_a_cell_knows_its_judge(tmp_path: Path) -> None:
    base = ["--config", str(RECIPES / "shapes.yaml"), "--output_dir", str(tmp_path)]
    config, text, _ = parse_config(base)
    (cell,) = make_cells(config, text, base, ["joint"], [0])
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(yaml.safe_dump(cell.values))
    (cell.folder / "metrics.jsonl").write_text('{"iteration": 0}\n')
    assert read_result(cell).judge == ""
    found = set()
    for judge in ({"name": "a"}, {"name": "b"}):
        (cell.folder / "judge.json").write_text(json.dumps(judge))
        found.add(read_result(cell).judge)
    assert len(found - {""}) == 2


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.main(["ablate", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("modes", "seeds", "jobs", "launcher", "list", "collect", "rollout.num_prompts"):
        assert f"--{option}" in text
