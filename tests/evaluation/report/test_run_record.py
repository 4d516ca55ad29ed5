"""What is read from a run folder, against folders written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgrpo.evaluation.report.run_record import (
    MISSING,
    RunRecord,
    Scores,
    config_differences,
    flatten,
    judged_alike,
    read_runs,
    scores_of,
)


def record(rows: list[dict], config: dict | None = None, judge: dict | None = None) -> RunRecord:
    return RunRecord(Path("run"), "run", rows, config or {}, {}, judge or {})


def test_a_run_folder_is_read_with_what_is_there(
    tmp_path: Path, make_run: Callable[..., Path], add_samples: Callable[..., None]
) -> None:
    run = make_run(tmp_path / "x" / "demo", iterations=3)
    (run / "config.until_000002.yaml").write_text("seed: 1\n")
    (run / "config.until_now.yaml").write_text("seed: 2\n")  # none that a run writes
    (run / "judge.json").write_text('{"answer": "parsed"}')
    add_samples(run, 20, ["a"], 1)
    add_samples(run, 0, ["a"], 1)
    (run / "samples" / "iteration_000030").mkdir()
    bare = make_run(tmp_path / "y" / "demo", iterations=0, evaluate=False)
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2, "re')
    first, second, third = read_runs([run, bare, tmp_path / "z"])
    assert first.label == "x/demo"  # with as much of the path as tells it from y/demo
    assert (second.label, third.label) == ("y/demo", f"{tmp_path.name}/z")
    assert [row["iteration"] for row in first.rows] == [0, 1, 2, 3]
    assert [row["iteration"] for row in first.trained] == [1, 2, 3]
    assert first.stages == ("visual_quality", "temporal_coherence", "text_alignment")
    assert (first.earlier, first.judge, first.thresholds) == (
        {2: {"seed": 1}},
        {"answer": "parsed"},
        [0.54, 0.35],
    )
    assert [folder.name for folder in first.samples] == ["iteration_000000", "iteration_000020"]
    assert (second.rows, second.stages, second.samples, second.judge) == ([], (), [], {})
    assert (third.rows, third.config, third.thresholds) == ([{"iteration": 1}], {}, [])
    assert [run.label for run in read_runs([run])] == ["demo"]


def test_modes_without_gates_have_no_thresholds() -> None:
    def thresholds(mode: str) -> list[float]:
        return record([], {"pacing": {"mode": mode, "thresholds": [0.1, 0.2]}}).thresholds

    assert [
        thresholds(mode) for mode in ("self_paced", "two_stage", "joint", "one_stage", "static")
    ] == [[0.1, 0.2]] * 2 + [[]] * 3


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.jsonl", '{"iteration": 1}\nnonsense\n{"iteration": 2}\n', r"jsonl, line 2"),
        ("judge.json", "{", r"judge\.json: "),
        ("config.yaml", "a: [1", r"config\.yaml: "),
        ("config.yaml", "- 1", r"config\.yaml: expected keys and their values, got \[1\]"),
        ("config.yaml", "", r"config\.yaml: expected keys and their values, got None"),
        ("config.yaml", "a: \0", r"config\.yaml: cannot be read as YAML"),
        ("config.yaml", "a: &a {b: *a}", r"config\.yaml: expected at most 10000 nested values"),
        ("config.yaml", "[" * 9999, r"config\.yaml: cannot be read as YAML"),
        ("config.yaml", "pacing: [1]", r"config\.yaml: pacing: expected keys and their values"),
        ("config.yaml", "evaluation: all", r"config\.yaml: evaluation: expected keys"),
        ("config.yaml", "iterations: many", r"config\.yaml: iterations: expected an integer"),
        ("config.yaml", "pacing: {thresholds: [a]}", "pacing.thresholds: expected a list of numb"),
        ("config.until_000001.yaml", "- 1", r"config\.until_000001\.yaml: expected keys"),
        ("judge.json", "[" * 99999, r"judge\.json: cannot be read as JSON"),
        ("judge.json", "3", r"judge\.json: expected keys and their values, got 3"),
        ("metrics.jsonl", '{"iteration": 1}\n{"iteration": 2, "r": "x"}\n', r"jsonl, line 2"),
        ("metrics.jsonl", f'{{"iteration": 1, "r": {10**400}}}\n', r"jsonl, line 1"),
        ("metrics.jsonl", f'{{"iteration": {10**300}}}\n', "a number of at most 1e.15"),
        (
            "metrics.jsonl",
            '{"iteration": 1, "r": -1e308}\n',
            "1: 'r': expected a number of at most",
        ),
        (
            "metrics.jsonl",
            '{"iteration": 1, "step_time": 1e11}\n',
            "'step_time': expected a number",
        ),
        ("metrics.jsonl", '{"iteration": 1, "rewards/\\ud800/mean": 1}\n', "can be printed"),
    ],
)
def test_a_broken_file_is_named(
    tmp_path: Path, make_run: Callable[..., Path], file: str, content: str, words: str
) -> None:
    run = make_run(tmp_path / "run", iterations=2)
    (run / file).write_text(content)
    with pytest.raises(ValueError, match=words):
        read_runs([run])


@pytest.mark.parametrize(
    ("iterations", "checkpoint", "missing"),
    [
        ([0, 1, 2, 3], None, []),
        ([], None, []),
        ([4], None, [(0, 3)]),
        ([0, 1, 4, 6], None, [(2, 3), (5, 5)]),
        ([0, 1], "iteration_000003", [(2, 3)]),
        ([], "iteration_000003", [(0, 3)]),
        ([10**12], None, [(0, 10**12 - 1)]),
    ],
)
def test_rows_that_were_lost(
    tmp_path: Path, iterations: list[int], checkpoint: str | None, missing: list[tuple[int, int]]
) -> None:
    (tmp_path / "checkpoints" / (checkpoint or "other")).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"iteration": {iteration}}}\n' for iteration in iterations)
    )
    (run,) = read_runs([tmp_path])
    assert run.missing == missing


def test_what_is_no_run_is_refused(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    run = make_run(tmp_path / "run", iterations=2)
    for runs, words in (
        ([], r"at least one run folder, got \[\]"),
        ([run, run / ".." / "run"], "expected different runs, got .*run 2 times"),
        ([tmp_path], r"expected a run folder with config\.yaml or metrics\.jsonl, got"),
    ):
        with pytest.raises(ValueError, match=words):
            read_runs(runs)


def test_differences_of_configurations() -> None:
    first = {
        "seed": 1,
        "name": "a",
        "pacing": {"mode": "joint", "thresholds": [0.1]},
        "policy": {"init_args": {}},
        "same": {"x": None},
    }
    second = {
        "seed": 1,
        "name": "b",
        "pacing": {"mode": "joint", "thresholds": [0.2]},
        "policy": {"init_args": {"lora": 8}},
        "same": {"x": None},
    }
    assert flatten(first)["pacing.thresholds"] == [0.1]
    assert flatten({"a": {"b": {"c": 1}, "d": {}}}) == {"a.b.c": 1, "a.d": {}}
    assert config_differences([first, second]) == {
        "pacing.thresholds": [[0.1], [0.2]],
        "policy.init_args": [{}, MISSING],
        "policy.init_args.lora": [MISSING, 8],
    }
    assert config_differences([first, first, first]) == {}
    assert config_differences([{"x": 1}, {"x": True}, {}])["x"] == [1, True, MISSING]


def test_scores_compare_only_where_judge_captions_and_sampler_are_the_same() -> None:
    config = {
        "reward": {"class_path": "Judge"},
        "prompts": {"validation": "a.txt", "train": "t"},
        "evaluation": {"sde": "ode"},
        "seed": 0,
    }
    runs = [
        record([], config),
        record([], config | {"seed": 1, "prompts": {"validation": "a.txt", "train": "other"}}),
    ]
    assert judged_alike(runs)
    for change in (
        {"reward": {"class_path": "Other"}},
        {"prompts": {"validation": "b.txt", "train": "t"}},
        {"evaluation": {"sde": "dance"}},
        {"evaluation": None},
    ):
        assert not judged_alike([record([], config), record([], config | change)])
    assert not judged_alike([record([], config), record([], config, {"answer": "parsed"})])


def test_scores_are_the_first_and_the_last_validation_ones() -> None:
    rows = [
        {"iteration": 0, "eval/rewards/a/mean": 0.1, "eval/rewards/b/mean": 0.2},
        {"iteration": 5, "rewards/a/mean": 0.9, "rewards/b/mean": 0.9},
        {"iteration": 10, "eval/rewards/a/mean": 0.4, "eval/rewards/b/mean": None},
    ]
    assert scores_of(record(rows), 3) == Scores(
        (0, 10), True, {"a": 0.1, "b": 0.2}, {"a": 0.4, "b": None}
    )
    # One evaluation alone shows no change: the training scores do, smoothed over three iterations
    # and cut at the ends.
    rows = rows[:1] + [
        {"iteration": i, "rewards/a/mean": value}
        for i, value in enumerate((0.2, 0.4, math.nan, 0.6, 0.8), start=1)
    ]
    scores = scores_of(record(rows), 3)
    assert scores is not None
    assert (scores.iterations, scores.validation) == ((1, 5), False)
    assert (scores.first["a"], scores.last["a"]) == pytest.approx((0.3, 0.7))
    assert scores_of(record(rows[:1]), 3) is None
    assert scores_of(record([]), 3) is None
