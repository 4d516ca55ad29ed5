"""Which part of the reward does it? Train a recipe under several pacing modes and seeds, and
compare: the paper's ablation.

Takes the options of `train`, and --modes one_stage,two_stage,joint,self_paced (also static),
--seeds 0,1,2, --jobs 1 (cells side by side), --launcher "torchrun --nproc-per-node 8" (what
starts a cell; this Python if not given), --list true (only print a command for each cell that is
not finished, for a cluster), --collect true (start nothing, only build the table from what is
there). The cell of a mode and a seed is an ordinary run, <output_dir>/<name>/<mode>_seed<k>; the
same command again goes on with what is not finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast, get_args, get_type_hints

import yaml

from fastgrpo.algorithm.self_paced import check_pacing
from fastgrpo.config import PacingConfig, TrainConfig
from fastgrpo.errors import fail
from fastgrpo.evaluation.ablation_results import (
    CellResult,
    absences,
    caption,
    compared_iteration,
    csv_cells,
    csv_table,
    curves,
    markdown_table,
    table_rows,
    text_table,
)
from fastgrpo.evaluation.figures import save_figure
from fastgrpo.evaluation.report.run_record import NAMES_OF_THE_RUN, read_runs
from fastgrpo.training.checkpoint import list_checkpoints
from fastgrpo.training.config_file import parse_config
from fastgrpo.training.preflight import check_config
from fastgrpo.training.run_folder import differences
from fastgrpo.training.signals import stop_on_signals

logger = logging.getLogger("fastgrpo")

MODES = get_args(get_type_hints(PacingConfig)["mode"])
OWN = {"--seed": "from --seeds", "--pacing.mode": "from --modes", "--resume": "always to auto"}
"""Options of `train` that an ablation sets, and how."""
MAY_DIFFER = (*NAMES_OF_THE_RUN, "iterations")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
}
"""Of the cells, where the user's has no other: one thread each, and time for a checkpoint before
torchrun kills its workers.
"""


@dataclass(frozen=True)
class Cell:
    """One run of the matrix: a mode and a seed."""

    mode: str
    seed: int
    folder: Path
    config: TrainConfig
    values: dict[str, Any]
    """The resolved configuration, as the run's config.yaml will have it."""
    arguments: list[str]
    """Of `train`."""


class OneLineParser(argparse.ArgumentParser):
    """Refuses in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        fail(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, list or collect. 0: done; 1: a cell failed, or a signal came; 2 with one message:
    something that cannot be used.
    """
    argv = sys.argv[1:] if argv is None else argv
    own = OneLineParser(prog="python -m fastgrpo ablate", add_help=False, allow_abbrev=False)
    own.add_argument("--modes", default="one_stage,two_stage,joint,self_paced")
    own.add_argument("--seeds", default="0,1,2")
    own.add_argument("--jobs", type=int, default=1)
    own.add_argument("--launcher")
    own.add_argument("--list", type=yes_or_no, nargs="?", const=True, default=False)
    own.add_argument("--collect", type=yes_or_no, nargs="?", const=True, default=False)
    options, rest = own.parse_known_args(argv)
    config, config_yaml, _ = parse_config(
        rest, prog="python -m fastgrpo ablate", description=__doc__
    )
    try:
        check_options(options, rest, config)
        cells = matrix(
            config, config_yaml, rest, read_modes(options.modes), read_seeds(options.seeds)
        )
        for cell in cells:
            check_pacing(cell.config.pacing, len(config.reward.stages))
            read_result(cell)  # refuses another configuration's before anything is started
        if options.list:
            return list_commands(
                cells, options.launcher or "torchrun --standalone --nproc-per-node 1"
            )
        if options.collect:
            if not any(read_result(cell).rows for cell in cells):
                raise FileNotFoundError(
                    f"collect: expected cells such as {cells[0].folder}, found none with metrics"
                )
            collect(cells, config)
            return 0
        check_config(cells[0].config)
        unfinished = [cell for cell in cells if not is_finished(cell)]
        logger.info(
            f"{len(cells)} cells in {cells[0].folder.parent}, {len(cells) - len(unfinished)} of them finished"
        )
        launcher = shlex.split(options.launcher) if options.launcher else [sys.executable]
        failures, stopped = run_cells(unfinished, launcher, options.jobs)
        collect(cells, config)
    except (ValueError, OSError) as error:
        fail(error)
    for cell, reason in failures:
        logger.info(f"failed: {cell.folder.name}: {reason}")
    if failures or stopped:
        logger.info(
            f"{'stopped by a signal' if stopped else 'not all is done'}; go on with: python -m fastgrpo ablate {shlex.join(argv)}"
        )
    return int(bool(failures or stopped))


# --- options and the matrix
# -------------------------------------------------------------------------------------------


def yes_or_no(word: str) -> bool:
    """true or false."""
    if word not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return word == "true"


def read_modes(words: str) -> list[str]:
    """Modes, by commas. ValueError: none, one that there is not, one twice."""
    modes = [word.strip() for word in words.split(",")]
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"modes: expected some of {','.join(MODES)}, got {mode or words!r}")
    return all_different("modes", modes)


def read_seeds(words: str) -> list[int]:
    """Seeds, by commas. ValueError: none, one that is no whole number, one twice."""
    try:
        seeds = [int(word) for word in words.split(",")]
    except ValueError as error:
        raise ValueError(
            f"seeds: expected whole numbers by commas, such as 0,1,2, got {words!r}"
        ) from error
    return all_different("seeds", seeds)


def all_different(key: str, values: list[Any]) -> list[Any]:
    """The values. ValueError: one comes twice."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{key}: expected each once, got {value} {values.count(value)} times")
    return values


def check_options(options: argparse.Namespace, rest: Sequence[str], config: TrainConfig) -> None:
    """ValueError for what goes against being an ablation."""
    for word in rest:
        if (name := word.partition("=")[0]) in OWN:
            raise ValueError(f"{name}: an ablation sets it for each cell itself, {OWN[name]}")
    if options.jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {options.jobs}")
    if options.launcher is not None and not options.launcher.strip():
        raise ValueError("--launcher: expected a command, got none")
    if options.list and options.collect:
        raise ValueError("--list and --collect: expected one of them")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ValueError(
            "ablate starts the processes of its cells itself (--launcher), so start it once, not under torchrun"
        )
    if config.prompts.validation is None and not config.evaluation.num_videos:
        raise ValueError(
            "prompts.validation: expected captions to compare on, got none, and evaluation.num_videos is 0"
        )
    if any(
        (config.run_folder / name).exists()
        for name in ("config.yaml", "metrics.jsonl", "checkpoints")
    ):
        raise ValueError(f"{config.run_folder} is a run's folder: give the ablation another --name")


def matrix(
    config: TrainConfig,
    config_yaml: str,
    rest: Sequence[str],
    modes: Sequence[str],
    seeds: Sequence[int],
) -> list[Cell]:
    """The cells, seed by seed, so that all modes have one before any has two."""
    cells = []
    for seed in seeds:
        for mode in modes:
            output_dir, name = str(config.run_folder), f"{mode}_seed{seed}"
            pacing = dataclasses.replace(config.pacing, mode=cast(Any, mode))
            ours = dataclasses.replace(
                config, output_dir=output_dir, name=name, seed=seed, pacing=pacing
            )
            values = yaml.safe_load(config_yaml) | {
                "output_dir": output_dir,
                "name": name,
                "seed": seed,
            }
            values["pacing"] |= {"mode": mode}
            own = [
                "--output_dir",
                output_dir,
                "--name",
                name,
                "--seed",
                str(seed),
                "--pacing.mode",
                mode,
                "--resume",
                "auto",
            ]
            cells.append(Cell(mode, seed, ours.run_folder, ours, values, [*rest, *own]))
    return cells


# --- what is there
# ----------------------------------------------------------------------------------------------------


def read_result(cell: Cell) -> CellResult:
    """The cell's metrics up to the iterations that are asked for.

    ValueError: it was made with another configuration (another number of iterations is none), or
    a file in it is broken.
    """
    if not any((cell.folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        return CellResult(cell.mode, cell.seed, [])
    record = read_runs([cell.folder])[0]
    before, now = (
        {k: v for k, v in values.items() if k not in MAY_DIFFER}
        for values in (record.config, cell.values)
    )
    changed = differences(before, now) if record.config else []
    if changed:
        raise ValueError(
            f"{cell.folder} was made with another configuration: {'; '.join(changed)}. Ask for the same, or take another --name"
        )
    return CellResult(
        cell.mode,
        cell.seed,
        [row for row in record.rows if row["iteration"] <= cell.config.iterations],
    )


def is_finished(cell: Cell) -> bool:
    """Whether all iterations are done and the report, which is the last that a run writes, is newer
    than the last checkpoint.
    """
    report, saved = (
        cell.folder / "report" / "report.html",
        list_checkpoints(cell.folder / "checkpoints"),
    )
    whole = (
        bool(saved)
        and report.is_file()
        and report.stat().st_mtime >= (saved[0] / "manifest.json").stat().st_mtime
    )
    return whole and read_result(cell).last >= cell.config.iterations


def list_commands(cells: Sequence[Cell], launcher: str) -> int:
    """Print a shell command for each cell that is not finished, and nothing else on stdout; 0."""
    unfinished = [cell for cell in cells if not is_finished(cell)]
    for cell in unfinished:
        print(f"{launcher} -m fastgrpo train {shlex.join(cell.arguments)}")
    print(
        f"{len(unfinished)} commands; {len(cells) - len(unfinished)} of {len(cells)} cells are finished",
        file=sys.stderr,
    )
    return 0


def collect(cells: Sequence[Cell], config: TrainConfig) -> None:
    """Write table.md, table.csv, cells.csv and the curves beside the cells, and print the table and
    what is not in it.
    """
    results, stages, folder = (
        [read_result(cell) for cell in cells],
        config.reward.stages,
        config.run_folder,
    )
    iteration = compared_iteration(results, config.iterations)
    rows, words, absent = (
        table_rows(results, stages, iteration),
        caption(iteration),
        absences(results, config.iterations, iteration),
    )
    folder.mkdir(parents=True, exist_ok=True)
    paragraphs = [
        markdown_table(rows, stages),
        words,
        *(["\n".join(f"- {line}" for line in absent)] if absent else []),
    ]
    (folder / "table.md").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    (folder / "table.csv").write_text(csv_table(rows, stages, iteration), encoding="utf-8")
    (folder / "cells.csv").write_text(csv_cells(results, stages, iteration), encoding="utf-8")
    drawn = ["curves.png", "curves.svg"]
    for name in drawn:  # those of an earlier call belong to another table
        (folder / name).unlink(missing_ok=True)
    if iteration is not None:
        save_figure(curves(results, stages, iteration), folder / "curves")
    written = ["table.md", "table.csv", "cells.csv", *(drawn if iteration is not None else [])]
    logger.info(
        "\n".join(
            ["", text_table(rows, stages), "", words, *absent, f"{', '.join(written)}: {folder}"]
        )
    )


# --- running
# ----------------------------------------------------------------------------------------------------------


def run_cells(
    cells: Sequence[Cell], launcher: Sequence[str], jobs: int
) -> tuple[list[tuple[Cell, str]], bool]:
    """Train the cells, `jobs` side by side; those that failed, each with the reason, and whether a
    signal ended it.

    A signal is handed on to the cells, which finish their iteration and write a checkpoint; none
    is started after it.
    """
    waiting, running, failures, told = (
        list(cells),
        list[tuple[Cell, subprocess.Popen[bytes]]](),
        list[tuple[Cell, str]](),
        False,
    )
    try:
        with stop_on_signals() as stop:
            while running or (waiting and not stop.requested):
                while waiting and len(running) < jobs and not stop.requested:
                    cell = waiting.pop(0)
                    running.append((cell, start_cell(cell, launcher)))
                    logger.info(f"{cell.folder.name}: started, {log_of(cell)}")
                if stop.requested and not told:
                    told = True
                    for _, process in running:
                        process.terminate()
                for cell, process in [entry for entry in running if entry[1].poll() is not None]:
                    running.remove((cell, process))
                    reason = "" if is_finished(cell) else why(cell, process.poll())
                    if reason and stop.requested:  # torchrun calls that a failure
                        reason = f"stopped, see {log_of(cell)}"
                    elif reason:
                        failures.append((cell, reason))
                    logger.info(f"{cell.folder.name}: {reason or 'finished'}")
                time.sleep(0.1)
    finally:  # after an error of ours, leave no cell behind
        for _, process in running:
            process.terminate()
            process.wait()
    return failures, stop.requested


def start_cell(cell: Cell, launcher: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that trains the cell, in a session of its own: a Ctrl-C would reach it twice, and a
    second one kills torchrun's workers.

    OSError: no such launcher.
    """
    log = log_of(cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        command = [*launcher, "-m", "fastgrpo", "train", *cell.arguments]
        return subprocess.Popen(
            command,
            env=ENVIRONMENT | os.environ,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def log_of(cell: Cell) -> Path:
    """What a cell prints; not in the cell's own folder, which the run claims for itself."""
    return cell.folder.parent / "logs" / f"{cell.folder.name}.log"


def why(cell: Cell, code: int | None) -> str:
    """Why a cell has ended and is not finished: exit code or signal, and the last line that it
    said.
    """
    how = (
        f"ended by {signal.Signals(-code).name}"
        if code and code < 0
        else f"exit code {code}"
        if code
        else "stopped before its end"
    )
    lines = [
        line.strip()
        for line in log_of(cell).read_text(errors="replace").splitlines()
        if line.strip(" =-")
    ]
    return f"{how}, see {log_of(cell)}" + (f": {lines[-1][:300]}" if code and lines else "")
