"""An ablation: ordinary runs of one recipe under several pacing modes and seeds (its cells)."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import yaml

from fastgrpo.algorithm.self_paced import check_pacing
from fastgrpo.config import PacingConfig, TrainConfig
from fastgrpo.errors import UserError, require
from fastgrpo.evaluation import ablation_results as results
from fastgrpo.evaluation.figures import save_figure
from fastgrpo.evaluation.report.run_record import NAMES_OF_THE_RUN, read_runs
from fastgrpo.evaluation.score_file import judge_hash
from fastgrpo.evaluation.tables import render_table, write_csv
from fastgrpo.training.checkpoint_names import list_checkpoints
from fastgrpo.training.run_folder import differences
from fastgrpo.training.signals import stop_on_signals
from fastgrpo.training.trust import check_links

logger = logging.getLogger("fastgrpo")

MODES = get_args(get_type_hints(PacingConfig)["mode"])
SET_BY_ABLATION = {
    "--seed": "from --seeds",
    "--pacing.mode": "from --modes",
    "--resume": "always to auto",
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
}
"""Of the cells, unless the user's environment says otherwise: one thread each, and time for a
checkpoint before torchrun kills its workers.
"""


@dataclass(frozen=True)
class _Cell:
    """One run of the matrix.

    Attributes:
        mode: Its pacing mode.
        seed: Its seed.
        config: Its configuration.
        values: The same as the run's config.yaml will have it.
        arguments: Of `train`.
    """

    mode: str
    seed: int
    config: TrainConfig
    values: dict[str, Any]
    arguments: list[str]

    @property
    def folder(self) -> Path:
        return self.config.run_folder

    @property
    def log(self) -> Path:
        """What the cell prints; not in the cell's own folder, which the run claims for itself."""
        return self.folder.parent / "logs" / f"{self.folder.name}.log"


def read_modes(text: str) -> list[str]:
    """Modes from a comma-separated option."""
    modes = [word.strip() for word in text.split(",")]
    for mode in modes:
        require(mode in MODES, "modes", f"some of {','.join(MODES)}", mode)
    require(len(set(modes)) == len(modes), "modes", "each once", text)
    return modes


def read_seeds(text: str) -> list[int]:
    """Seeds from a comma-separated option."""
    whole = re.fullmatch(r"\s*-?\d+\s*(,\s*-?\d+\s*)*", text)
    require(whole, "seeds", "whole numbers by commas, such as 0,1,2", text)
    seeds = [int(word) for word in text.split(",")]
    require(len(set(seeds)) == len(seeds), "seeds", "each once", text)
    return seeds


def check_ablation(config: TrainConfig, arguments: Sequence[str]) -> None:
    """Check that these arguments of `train` can be the base of an ablation.

    Raises:
        ValueError: An option that the ablation itself sets, a start under torchrun, nothing to
            compare on, or the folder of a run.
    """
    for name in (word.partition("=")[0] for word in arguments):
        if how := SET_BY_ABLATION.get(name):
            raise UserError(f"{name}: an ablation sets it for each cell itself, {how}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            "ablate starts the processes of its cells itself (--launcher), so start it once, not "
            "under torchrun"
        )
    if config.prompts.validation is None and not config.evaluation.num_videos:
        raise UserError(
            "prompts.validation: expected prompts to compare on, got none, and "
            "evaluation.num_videos is 0"
        )
    check_links(config.run_folder, "table.*", "cells.csv", "curves.*", "logs")
    traces = ("config.yaml", "metrics.jsonl", "checkpoints")
    if any((config.run_folder / name).exists() for name in traces):
        raise UserError(f"{config.run_folder} is a run's folder: give the ablation another --name")


def make_cells(
    config: TrainConfig,
    config_yaml: str,
    arguments: Sequence[str],
    modes: Sequence[str],
    seeds: Sequence[int],
) -> list[_Cell]:
    """The cells, seed by seed, so that all modes have one before any has two.

    Raises:
        ValueError: A mode cannot run with this configuration, or a cell's folder was made with
            another one.
    """
    cells = []
    for seed in seeds:
        for mode in modes:
            names: dict[str, Any] = {
                "output_dir": str(config.run_folder),
                "name": f"{mode}_seed{seed}",
            }
            pacing = dataclasses.replace(config.pacing, mode=cast(Any, mode))
            check_pacing(pacing, len(config.reward.stages))
            changed = dataclasses.replace(config, **names, seed=seed, pacing=pacing)
            values = yaml.safe_load(config_yaml) | names | {"seed": seed}
            values["pacing"]["mode"] = mode
            options = names | {"seed": str(seed), "pacing.mode": mode, "resume": "auto"}
            words = [word for key, value in options.items() for word in (f"--{key}", value)]
            cells.append(_Cell(mode, seed, changed, values, [*arguments, *words]))
            read_result(cells[-1])
    return cells


def read_result(cell: _Cell) -> results.CellResult:
    """The cell's metrics up to the iterations that are asked for.

    Raises:
        ValueError: It was made with another configuration (another number of iterations is none),
            or a file in it is broken.
    """
    if not any((cell.folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        return results.CellResult(cell.mode, cell.seed, [])
    (record,) = read_runs([cell.folder])
    may_differ = dict.fromkeys((*NAMES_OF_THE_RUN, "iterations"))
    changed = differences(record.config | may_differ, cell.values | may_differ)
    if record.config and changed:
        raise UserError(
            f"{cell.folder} was made with another configuration: {'; '.join(changed)}. Ask for the "
            "same, or take another --name"
        )
    rows = [row for row in record.rows if row["iteration"] <= cell.config.iterations]
    judge = judge_hash(record.judge) if record.judge else ""
    return results.CellResult(cell.mode, cell.seed, rows, judge)


def is_finished(cell: _Cell) -> bool:
    """True if all iterations are done and the report, the last that a run writes, is newer than the
    last checkpoint.
    """
    report = cell.folder / "report" / "report.html"
    saved = list_checkpoints(cell.folder / "checkpoints")
    if not saved or not report.is_file():
        return False
    reported = report.stat().st_mtime >= (saved[0] / "manifest.json").stat().st_mtime
    return reported and read_result(cell).last >= cell.config.iterations


def collect(cells: Sequence[_Cell]) -> str:
    """Write table.md, table.csv, cells.csv and the curves beside the cells.

    Returns:
        The table and what is not in it, for the console.
    """
    found, config = [read_result(cell) for cell in cells], cells[0].config
    stages, folder = config.reward.stages, cells[0].folder.parent
    iteration = results.compared_iteration(found, config.iterations)
    records = results.mode_records(found, stages, iteration)
    absent = results.absences(found, config.iterations, iteration)
    words, table = results.caption(iteration), results.table_cells(records, stages)
    folder.mkdir(parents=True, exist_ok=True)
    paragraphs = [render_table(table, "markdown"), words, "\n".join(f"- {a}" for a in absent)]
    text = "\n\n".join(filter(None, paragraphs))
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    cell_records = results.cell_records(found, stages, iteration)
    for name, rows in (("table.csv", records), ("cells.csv", cell_records)):
        write_csv(folder / name, [{key: _digits(row[key]) for key in row} for row in rows])
    for name in ("curves.png", "curves.svg"):  # those of an earlier call belong to another table
        (folder / name).unlink(missing_ok=True)
    if iteration is not None:
        save_figure(results.curves(found, stages, iteration), folder / "curves")
    return "\n".join(["", render_table(table), "", words, *absent, f"tables and curves: {folder}"])


def _digits(value: Any) -> Any:
    """A number to six digits, for a CSV file; anything else as it is."""
    return f"{value:.6g}" if isinstance(value, float) else value


def run_cells(
    cells: Sequence[_Cell], launcher: Sequence[str], jobs: int
) -> tuple[dict[str, str], bool]:
    """Train the cells, `jobs` side by side.

    A signal is handed on to the cells, which finish their iteration and write a checkpoint; no cell
    is started after it.

    Returns:
        The reason of each cell that failed, by name, and whether a signal ended the ablation.
    """
    waiting, failures, told = list(cells), dict[str, str](), False
    running: list[tuple[_Cell, subprocess.Popen[bytes]]] = []
    try:
        with stop_on_signals() as stop:
            while running or (waiting and not stop.requested):
                while waiting and len(running) < jobs and not stop.requested:
                    cell = waiting.pop(0)
                    running.append((cell, start_cell(cell, launcher)))
                    logger.info(f"{cell.folder.name}: started, {cell.log}")
                if stop.requested and not told:
                    told = True
                    for _, process in running:
                        process.terminate()
                for cell, process in [entry for entry in running if entry[1].poll() is not None]:
                    running.remove((cell, process))
                    reason = "" if is_finished(cell) else _why_unfinished(cell, process.poll())
                    if reason and stop.requested:  # torchrun calls that a failure
                        reason = f"stopped, see {cell.log}"
                    elif reason:
                        failures[cell.folder.name] = reason
                    logger.info(f"{cell.folder.name}: {reason or 'finished'}")
                time.sleep(0.1)
    finally:  # after an error of ours, leave no cell behind
        for _, process in running:
            process.terminate()
            process.wait()
    return failures, stop.requested


def start_cell(cell: _Cell, launcher: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the cell's process.

    Raises:
        OSError: There is no such launcher.
    """
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    with open(cell.log, "ab") as file:
        # In a session of its own: a Ctrl-C would reach it twice, and a second one kills torchrun's
        # workers.
        return subprocess.Popen(
            [*launcher, "-m", "fastgrpo", "train", *cell.arguments],
            env=ENVIRONMENT | os.environ,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def _why_unfinished(cell: _Cell, code: int | None) -> str:
    """Exit code or signal of a cell that has ended, and the last line that it printed."""
    if not code:
        return f"stopped before its end, see {cell.log}"
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = cell.log.read_text(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip(" =-")]
    return f"{how}, see {cell.log}" + (f": {said[-1][:300]}" if said else "")
