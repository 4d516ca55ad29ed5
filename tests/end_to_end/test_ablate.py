"""`python -m fastgrpo ablate` on tiny runs: the matrix, its table, resumes, failures, signals, and
commands for a cluster.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bare_train
import numpy as np
import pytest
import ranks

from fastgrpo import __main__ as command_line
from fastgrpo.evaluation import ablation

STAGES = ("visual_quality", "temporal_smoothness", "text_alignment")
MODES, SEEDS = ("one_stage", "self_paced"), (0, 1)
CELLS = [f"{mode}_seed{seed}" for seed in SEEDS for mode in MODES]
SMALL = ["--iterations", "4", "--evaluation.interval", "2"]
Ablate = Callable[..., Any]


class Forked:
    """A cell's process that has its imports done, with the part of Popen that is used; `watch()` is
    called whenever it is asked after.
    """

    def __init__(self, process: Any, watch: Callable[[], object]) -> None:
        self.process, self.watch = process, watch

    def poll(self) -> int | None:
        self.watch()
        code: int | None = self.process.exitcode
        return code

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self) -> None:
        self.process.join()


@pytest.fixture(scope="module")
def run_ablate(tiny: Callable[..., list[str]], start: Callable[..., Any]) -> Ablate:
    """run_ablate(folder, *options, watch=..., forked=True): its outcome, and the cells it started,
    forked unless it shall do that itself.

    watch(cell, process) is called now and then while a cell runs.
    """

    def call(
        folder: Path,
        *options: str,
        watch: Callable[[Any, Any], object] = lambda *_: None,
        forked: bool = True,
    ) -> Any:
        started: list[str] = []

        def fork(cell: Any, launcher: Sequence[str]) -> Forked:
            started.append(cell.folder.name)
            cell.log.parent.mkdir(exist_ok=True, parents=True)
            cell.log.touch()
            process = ranks.server.Process(target=bare_train.train, args=(list(cell.arguments),))
            process.start()
            return Forked(process, lambda: watch(cell, process))

        with pytest.MonkeyPatch.context() as patch:
            if forked:
                patch.setattr(ablation, "start_cell", fork)
            outcome = start(folder, ["ablate", *tiny(folder), *options], main=command_line.main)
        return outcome, started

    return call


def words(**lists: Sequence[Any]) -> list[str]:
    return [
        word for key, values in lists.items() for word in (f"--{key}", ",".join(map(str, values)))
    ]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory, run_ablate: Ablate) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("matrix") / "ab"
    outcome, started = run_ablate(folder, *SMALL, *words(modes=MODES, seeds=SEEDS), "--jobs", "2")
    assert outcome.code == 0, outcome.out + outcome.err
    assert started == CELLS
    return outcome, folder


def rows_of(cell: Path) -> list[dict[str, Any]]:
    path = cell / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_cells_are_ordinary_runs(
    matrix: tuple[Any, Path],
    train: Callable[..., Any],
    assert_same_end: Any,
    start: Any,
    tmp_path: Path,
) -> None:
    """Bit for bit what `train` makes of the same settings; `report` and a resume take them."""
    _, folder = matrix
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(
        [*CELLS, "logs"]
    )
    for cell, mode in (("one_stage_seed1", "one_stage"), ("self_paced_seed1", "self_paced")):
        alone = train(tmp_path / cell, *SMALL, "--seed", "1", "--pacing.mode", mode)
        assert_same_end(folder / cell, alone.folder)
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    runs = [str(tmp_path / "copy" / cell) for cell in CELLS[:2]]
    report = start(
        tmp_path, ["report", *runs, "--attach", str(tmp_path / "copy")], main=command_line.main
    )
    assert report.code == 0, report.err
    assert "one_stage_seed0" in (tmp_path / "copy" / "report" / "report.html").read_text()


def test_table_is_what_the_metrics_say(matrix: tuple[Any, Path]) -> None:
    outcome, folder = matrix
    by_mode = {line["mode"]: line for line in read_csv(folder / "table.csv")}
    assert list(by_mode) == ["untrained", *MODES]
    markdown = (folder / "table.md").read_text()
    for mode in by_mode:
        runs = [
            rows_of(folder / f"{'one_stage' if mode == 'untrained' else mode}_seed{seed}")
            for seed in SEEDS
        ]
        last = [run[0 if mode == "untrained" else -1] for run in runs]
        assert (
            {row["iteration"] for row in last}
            == {int(by_mode[mode]["iteration"])}
            == ({0} if mode == "untrained" else {4})
        )
        columns = {stage: [row[f"eval/rewards/{stage}/mean"] for row in last] for stage in STAGES}
        if mode != "untrained":
            columns["training_reward"] = [
                np.mean([row["reward"] for row in run[1:]]) for run in runs
            ]
        for column, values in columns.items():
            assert float(by_mode[mode][column]) == pytest.approx(np.mean(values), rel=1e-5)
            assert float(by_mode[mode][f"{column}_std"]) == pytest.approx(
                np.std(values, ddof=1), rel=1e-5
            )
            shown = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
            assert any(
                line.startswith(f"| {mode} ") and shown in line for line in markdown.splitlines()
            )
            assert any(line.startswith(mode) and shown in line for line in outcome.out.splitlines())
    cells = read_csv(folder / "cells.csv")
    assert [(line["mode"], line["seed"]) for line in cells] == [
        (mode, str(seed)) for seed in SEEDS for mode in MODES
    ]
    assert (folder / "curves.png").stat().st_size > 10_000
    svg = (folder / "curves.svg").read_text()
    assert all(f'id="{mode}/{stage}"' in svg for mode in MODES for stage in STAGES)


def test_finished_cells_are_left_alone(
    matrix: tuple[Any, Path], run_ablate: Ablate, tmp_path: Path
) -> None:
    """A second call starts nothing and gives the same table; with one seed more, that one's cells
    alone.
    """
    shutil.copytree(matrix[1], tmp_path / "ab", symlinks=True)
    table = (tmp_path / "ab" / "table.csv").read_text()
    outcome, started = run_ablate(tmp_path / "ab", *SMALL, *words(modes=MODES, seeds=SEEDS))
    assert (outcome.code, started) == (0, [])
    assert (tmp_path / "ab" / "table.csv").read_text() == table
    assert "4 cells in" in outcome.out
    assert "4 of them finished" in outcome.out
    outcome, started = run_ablate(
        tmp_path / "ab", *SMALL, *words(modes=["one_stage"], seeds=[0, 2])
    )
    assert (outcome.code, started) == (0, ["one_stage_seed2"])


def test_more_iterations_go_on_and_another_setting_is_refused(
    matrix: tuple[Any, Path], run_ablate: Ablate, tmp_path: Path
) -> None:
    shutil.copytree(matrix[1], tmp_path / "ab", symlinks=True)
    for extra in ([], ["--collect"], ["--list"]):
        refused, started = run_ablate(
            tmp_path / "ab",
            *SMALL,
            *words(modes=MODES, seeds=[0]),
            "--update.learning_rate",
            "3e-4",
            *extra,
        )
        assert (refused.code, started) == (2, [])
        (line,) = refused.err.splitlines()
        assert (
            "one_stage_seed0 was made with another configuration: "
            "update.learning_rate: 0.0002 -> 0.0003. " in line
        )
    before = rows_of(tmp_path / "ab" / "one_stage_seed0")
    outcome, started = run_ablate(
        tmp_path / "ab", *SMALL, "--iterations", "6", *words(modes=["one_stage"], seeds=[0])
    )
    assert (outcome.code, started) == (0, ["one_stage_seed0"])
    after = rows_of(tmp_path / "ab" / "one_stage_seed0")
    assert after[:5] == before
    assert [row["iteration"] for row in after] == list(range(7))
    assert read_csv(tmp_path / "ab" / "table.csv")[1]["iteration"] == "6"


def test_collect_says_what_is_missing(
    matrix: tuple[Any, Path], run_ablate: Ablate, tmp_path: Path
) -> None:
    """One cell is not there, one was stopped after iteration 2: means over the others; at iteration
    2 over all three that have begun.
    """
    folder = tmp_path / "ab"
    shutil.copytree(matrix[1], folder, symlinks=True)
    shutil.rmtree(folder / "self_paced_seed1")
    metrics = folder / "one_stage_seed1" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]))
    asked = [*SMALL, *words(modes=MODES, seeds=SEEDS), "--collect"]
    outcome, started = run_ablate(folder, *asked)
    assert (outcome.code, started) == (0, [])
    for line in (
        "one_stage_seed1: at iteration 2 of 4, not in the table",
        "self_paced_seed1: missing",
    ):
        assert line in outcome.out.splitlines()
        assert f"- {line}" in (folder / "table.md").read_text().splitlines()
    table = {line["mode"]: line for line in read_csv(folder / "table.csv")}
    assert (table["one_stage"]["seeds"], table["one_stage"]["visual_quality_std"]) == ("1", "")
    end = rows_of(folder / "one_stage_seed0")[-1]["eval/rewards/visual_quality/mean"]
    assert float(table["one_stage"]["visual_quality"]) == pytest.approx(end, rel=1e-5)
    outcome, _ = run_ablate(folder, *asked, "--iterations", "2")
    table = {line["mode"]: line for line in read_csv(folder / "table.csv")}
    assert (table["one_stage"]["seeds"], table["self_paced"]["seeds"]) == ("2", "1")
    middle = [
        rows_of(folder / f"one_stage_seed{seed}")[2]["eval/rewards/text_alignment/mean"]
        for seed in SEEDS
    ]
    assert float(table["one_stage"]["text_alignment"]) == pytest.approx(np.mean(middle), rel=1e-5)


def test_a_killed_cell_is_named_and_gone_on_with(
    run_ablate: Ablate, train: Any, assert_same_end: Any, tmp_path: Path
) -> None:
    """SIGKILL to one cell, once it has a checkpoint: the next one runs to its end, exit code 1;
    called again, the same end as ever.
    """
    killed: list[int] = []

    def kill(cell: Any, process: Any) -> None:
        if (
            cell.mode == "joint"
            and not killed
            and any((cell.folder / "checkpoints").glob("iteration_*"))
        ):
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)

    asked = [
        "--iterations",
        "10",
        "--checkpoint.interval",
        "1",
        *words(modes=["joint", "one_stage"], seeds=[3]),
    ]
    outcome, started = run_ablate(tmp_path / "ab", *asked, watch=kill)
    assert outcome.code == 1
    assert started == ["joint_seed3", "one_stage_seed3"]
    (named,) = [line for line in outcome.out.splitlines() if line.startswith("failed: ")]
    assert named.startswith("failed: joint_seed3: ended by SIGKILL, see ")
    table = read_csv(tmp_path / "ab" / "table.csv")
    assert {line["mode"]: line["seeds"] for line in table} == {
        "untrained": "1",
        "joint": "0",
        "one_stage": "1",
    }
    again, started = run_ablate(tmp_path / "ab", *asked)
    assert (again.code, started) == (0, ["joint_seed3"])
    undisturbed = train(
        tmp_path / "joint",
        "--iterations",
        "10",
        "--checkpoint.interval",
        "1",
        "--seed",
        "3",
        "--pacing.mode",
        "joint",
    )
    assert_same_end(tmp_path / "ab" / "joint_seed3", undisturbed.folder)


def test_a_signal_stops_all_cells_after_a_checkpoint(run_ablate: Ablate, tmp_path: Path) -> None:
    """SIGINT with two cells running and one waiting; the command that is printed goes on, here to
    the iteration after the stop.
    """
    sent: list[int] = []
    running = [tmp_path / "ab" / f"{mode}_seed0" for mode in ("joint", "one_stage")]

    def interrupt(cell: Any, process: Any) -> None:
        if not sent and all(len(rows_of(folder)) > 2 for folder in running):
            sent.append(os.getpid())
            os.kill(os.getpid(), signal.SIGINT)

    asked = words(modes=["joint", "one_stage", "static"], seeds=[0])
    outcome, started = run_ablate(
        tmp_path / "ab", "--iterations", "4000", *asked, "--jobs", "2", watch=interrupt
    )
    assert outcome.code == 1
    assert started == ["joint_seed0", "one_stage_seed0"]
    ends = [rows_of(folder)[-1]["iteration"] for folder in running]
    for folder, end in zip(running, ends, strict=True):
        assert (folder / "checkpoints" / "latest").resolve().name == f"iteration_{end:06d}"
    assert "failed" not in outcome.out
    assert "nothing to compare yet" in outcome.out
    assert sorted(path.name for path in (tmp_path / "ab").iterdir() if path.is_file()) == [
        "cells.csv",
        "table.csv",
        "table.md",
    ]
    last = outcome.out.splitlines()[-1]
    assert last.startswith("stopped by a signal; go on with: python -m fastgrpo ablate ")
    command = shlex.split(last.partition("go on with: python -m fastgrpo ablate ")[2])
    assert command[-8:] == ["--iterations", "4000", *asked, "--jobs", "2"]
    again, started = run_ablate(
        tmp_path / "ab",
        "--iterations",
        str(max(ends) + 1),
        *words(modes=["joint", "one_stage"], seeds=[0]),
    )
    assert (again.code, started) == (0, ["joint_seed0", "one_stage_seed0"])
    for folder in running:
        assert [row["iteration"] for row in rows_of(folder)] == list(range(max(ends) + 2))


def test_listed_commands_give_the_same_cells(
    matrix: tuple[Any, Path], run_ablate: Ablate, start: Any, assert_same_end: Any, tmp_path: Path
) -> None:
    """Each line as a shell would split it, from a folder whose name a shell would split too."""
    folder = tmp_path / "two words" / "a'b"
    asked = [*SMALL, *words(modes=MODES, seeds=SEEDS)]
    listed, started = run_ablate(
        folder, *asked, "--list", "--launcher", "torchrun --nproc-per-node 8"
    )
    assert (listed.code, started) == (0, [])
    assert not folder.exists()
    assert len(listed.out.splitlines()) == 4
    for line, cell in zip(listed.out.splitlines(), CELLS, strict=True):
        command = shlex.split(line)
        assert command[:6] == ["torchrun", "--nproc-per-node", "8", "-m", "fastgrpo", "train"]
        assert start(folder, command[5:], main=command_line.main).code == 0
        assert_same_end(folder / cell, matrix[1] / cell)
    collected, _ = run_ablate(folder, *asked, "--collect")
    assert collected.code == 0
    assert (folder / "table.csv").read_text() == (matrix[1] / "table.csv").read_text()


def test_processes_of_its_own(
    matrix: tuple[Any, Path],
    run_ablate: Ablate,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    assert_same_end: Any,
    tmp_path: Path,
) -> None:
    """Started as users start them, with a file in one cell's way: its error is shown; the rest is
    listed, and a shell runs it.
    """
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    folder, asked = tmp_path / "two words", [*SMALL, *words(modes=MODES, seeds=[1])]
    folder.mkdir()
    (folder / "self_paced_seed1").write_text("in the way")
    outcome, _ = run_ablate(folder, *asked, "--jobs", "2", forked=False)
    assert outcome.code == 1
    (named,) = [line for line in outcome.out.splitlines() if line.startswith("failed: ")]
    assert named.startswith("failed: self_paced_seed1: exit code 2, see ")
    assert "error: " in named
    assert "not a directory" in named
    assert_same_end(folder / "one_stage_seed1", matrix[1] / "one_stage_seed1")
    assert "done: " in (folder / "logs" / "one_stage_seed1.log").read_text()
    (folder / "self_paced_seed1").unlink()
    listed, _ = run_ablate(folder, *asked, "--list", "--launcher", shlex.quote(sys.executable))
    (line,) = listed.out.splitlines()
    done = subprocess.run(
        line, shell=True, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert_same_end(folder / "self_paced_seed1", matrix[1] / "self_paced_seed1")
    missing, _ = run_ablate(
        folder, *asked, "--launcher", "nowhere/torchrun", "--iterations", "5", forked=False
    )
    assert missing.code == 2
    assert "nowhere/torchrun" in missing.err
