"""Which part of the reward does it? Train a recipe under several pacing modes and seeds, and
compare: the paper's ablation.

Takes the options of `train`, and --modes one_stage,two_stage,joint,self_paced (also static),
--seeds 0,1,2, --jobs 1 (cells side by side), --launcher "torchrun --nproc-per-node 8" (what starts
a cell; this Python by default), --list (only print a command for each cell that is not finished,
for a cluster), --collect (start nothing, only build the table from what is there). The cell of a
mode and a seed is an ordinary run, <output_dir>/<name>/<mode>_seed<k>; the same command again goes
on with what is not finished.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastgrpo.errors import UserError, fail, require
from fastgrpo.training.recipe_parser import parse_config

logger = logging.getLogger("fastgrpo")


class OneLineParser(argparse.ArgumentParser):
    """Refuses in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        fail(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, list or collect; exit code 1 if a cell failed or a signal stopped the ablation."""
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineParser(prog="python -m fastgrpo ablate", add_help=False, allow_abbrev=False)
    parser.add_argument("--modes", default="one_stage,two_stage,joint,self_paced")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--launcher")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--collect", action="store_true")
    options, rest = parser.parse_known_args(argv)
    config, config_yaml, _ = parse_config(rest, prog=parser.prog, description=__doc__)
    from fastgrpo.evaluation import ablation
    from fastgrpo.training.preflight import check_config

    try:
        require(options.jobs >= 1, "--jobs", "at least 1", options.jobs)
        launcher = [sys.executable] if options.launcher is None else shlex.split(options.launcher)
        require(launcher, "--launcher", "a command", options.launcher)
        if options.list and options.collect:
            raise UserError("--list and --collect: expected one of them, got both")
        ablation.check_ablation(config, rest)
        modes, seeds = ablation.read_modes(options.modes), ablation.read_seeds(options.seeds)
        cells = ablation.make_cells(config, config_yaml, rest, modes, seeds)
        if options.collect:
            if not any(ablation.read_result(cell).rows for cell in cells):
                raise FileNotFoundError(
                    f"collect: expected cells such as {cells[0].folder}, found none with metrics"
                )
            print(ablation.collect(cells))
            return 0
        unfinished = [cell for cell in cells if not ablation.is_finished(cell)]
        done = len(cells) - len(unfinished)
        if options.list:
            command = options.launcher or "torchrun --standalone --nproc-per-node 1"
            for cell in unfinished:
                print(f"{command} -m fastgrpo train {shlex.join(cell.arguments)}")
            counts = f"{len(unfinished)} commands; {done} of {len(cells)} cells are finished"
            print(counts, file=sys.stderr)
            return 0
        check_config(cells[0].config)
        logger.info(f"{len(cells)} cells in {config.run_folder}, {done} of them finished")
        failures, stopped = ablation.run_cells(unfinished, launcher, options.jobs)
        print(ablation.collect(cells))
    except (ValueError, OSError) as error:
        fail(error)
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}")
    if failures or stopped:
        how = "stopped by a signal" if stopped else "not all is done"
        print(f"{how}; go on with: {parser.prog} {shlex.join(argv)}")
    return int(bool(failures or stopped))
