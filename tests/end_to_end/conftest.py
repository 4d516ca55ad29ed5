"""Tiny runs of the embedded world through the real command line: in this process, forked off it to
be killed, or under torchrun.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import fastgrpo.cli.report  # before `start` replaces what it imports
import fastgrpo.cli.train
import fastgrpo.evaluation.report.page
from fastgrpo.distributed import collectives
from fastgrpo.shapes.captions import train_captions, validation_captions
from fastgrpo.training.step import Trainer

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "fastgrpo" / "recipes" / "shapes.yaml"
TORCHRUN = Path(sys.executable).with_name("torchrun")
MAIN_SCRIPT = ROOT / "fastgrpo" / "train.py"
MODULES = Path(__file__).resolve().parent / "modules"
sys.path.insert(
    0, str(MODULES)
)  # tiny_parts, for the runs in this process and for those forked off it

# The recipe at the least size that still has several prompts, a choice of videos and of steps, and
# padding nowhere. About half a second.
TINY: dict[str, Any] = {
    "iterations": 3,
    "reward": {"class_path": "tiny_parts.SmoothJudge"},
    "rollout": {
        "num_prompts": 2,
        "num_generations": 4,
        "num_inference_steps": 5,
        "micro_batch_size": 4,
    },
    "update": {"num_best": 1, "num_worst": 1, "optimizer_steps": 1},
    "evaluation": {"num_generations": 1, "num_videos": 0},
    "tracking": {"trackers": []},
}


logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(
    logging.WARNING
)  # fifteen lines a checkpoint in the report of a failed test


def words(argv: Sequence[str]) -> list[str]:
    """Arguments, where "--key value --other value" may stand for four of them."""
    return [
        word for given in argv for word in (given.split() if given.startswith("--") else [given])
    ]


@dataclass(frozen=True)
class Outcome:
    """What a start of the trainer gave: exit code, run folder and what it printed."""

    code: int
    folder: Path
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()
        ]

    @property
    def trained_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["iteration"] > 0]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """tiny(folder, *overrides): the arguments of a tiny run in that folder."""
    common = tmp_path_factory.mktemp("tiny")
    (common / "train.txt").write_text("\n".join(map(str, train_captions())) + "\n")
    (common / "validation.txt").write_text("\n".join(map(str, validation_captions()[:3])) + "\n")
    prompts = {"train": str(common / "train.txt"), "validation": str(common / "validation.txt")}
    (common / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"prompts": prompts}))

    def arguments(folder: Path, *overrides: str) -> list[str]:
        where = ["--output_dir", str(folder.parent), "--name", folder.name]
        recipes = ["--config", str(RECIPE), "--config", str(common / "tiny.yaml")]
        return [*recipes, *where, *words(overrides)]

    return arguments


@pytest.fixture(scope="session")
def start() -> Callable[..., Outcome]:
    """start(folder, argv, main=..., report=False): a command in this process, its output taken
    down.
    """

    def call(
        folder: Path,
        argv: Sequence[str],
        main: Callable[..., int] = fastgrpo.cli.train.main,
        report: bool = False,
    ) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        write_report = fastgrpo.evaluation.report.page.write_report
        if not report:  # four figures, three times the cost of the run
            fastgrpo.evaluation.report.page.write_report = lambda run, smoothing_window=10: run
        try:
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                warnings.catch_warnings(),
            ):
                warnings.filterwarnings(
                    "ignore", message="Unable to enable fault handler"
                )  # it wants a stderr with a file number
                code = main(words(argv)) or 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        finally:
            fastgrpo.evaluation.report.page.write_report = write_report
            collectives.stop()
        return Outcome(code, folder, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def train(tiny: Callable[..., list[str]], start: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """train(folder, *overrides): a tiny run in this process."""
    return lambda folder, *overrides, report=False: start(
        folder, tiny(folder, *overrides), report=report
    )


@pytest.fixture(scope="session")
def torchrun() -> Callable[..., subprocess.Popen[str]]:
    """torchrun(argv, ranks, cwd, ...): the trainer as a job of its own, in a process group of its
    own; stdout and stderr in one pipe.
    """

    def popen(argv: Sequence[str], ranks: int, cwd: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                str(TORCHRUN),
                "--standalone",
                "--nproc-per-node",
                str(ranks),
                str(MAIN_SCRIPT),
                *words(argv),
            ],
            cwd=cwd,
            env=job_environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    return popen


def job_environment() -> dict[str, str]:
    paths = os.pathsep.join(map(str, (MODULES, ROOT, ROOT / "kernels")))
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": paths}


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of a process that finds the packages and `modules`."""
    return job_environment()


@pytest.fixture(scope="session")
def forked() -> Callable[..., ranks.Job]:
    """forked(argv, folder, world_size=None): `python -m fastgrpo ARGV`, or ranks as under torchrun,
    in processes that have all imports done, a ranks.Job; training without its figures.
    """
    from bare_train import main

    def begin(
        argv: Sequence[object], folder: Path, world_size: int | None = None, main: ranks.Main = main
    ) -> ranks.Job:
        return ranks.start_job(main, words([*map(str, argv)]), folder, world_size)

    return begin


@pytest.fixture(scope="session")
def background() -> Callable[[Sequence[str]], Any]:
    """background(argv): the trainer without its figures in a process of its own that has all
    imports done, to be killed; a multiprocessing.Process.
    """
    from bare_train import train

    def begin(argv: Sequence[str]) -> Any:
        process = ranks.server.Process(target=train, args=(words(argv),))
        process.start()
        return process

    return begin


@pytest.fixture(scope="session")
def each_step() -> Callable[[Callable[[int], object]], contextlib.AbstractContextManager[None]]:
    """with each_step(f): f(iteration) is called at the beginning of every training step."""

    @contextlib.contextmanager
    def calling(call: Callable[[int], object]) -> Iterator[None]:
        def step(self: Trainer, iteration: int, *leave: Any) -> dict[str, Any]:
            call(iteration)
            return own(self, iteration, *leave)

        own = Trainer.step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "step", step)
            yield

    return calling


@pytest.fixture(scope="session")
def interrupt(
    each_step: Callable[..., Any],
) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """with interrupt(k): the process gets SIGTERM at the beginning of iteration k."""
    return lambda number: each_step(
        lambda iteration: iteration == number and os.kill(os.getpid(), signal.SIGTERM)
    )


@pytest.fixture(scope="session")
def tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """tensors(checkpoint folder): everything in it by its flattened name, read with torch's own
    converter.
    """

    def read(checkpoint: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            dcp_to_torch_save(checkpoint, Path(scratch) / "all.pt")
            return dict(flatten(torch.load(Path(scratch) / "all.pt", weights_only=False)))

    return read


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}{key}/")
    elif isinstance(tree, list | tuple) and any(isinstance(item, dict) for item in tree):
        for index, item in enumerate(tree):
            yield from flatten(item, f"{prefix}{index}/")
    else:
        yield prefix.rstrip("/"), tree


@pytest.fixture(scope="session")
def rows_without_times() -> Callable[[Path], list[str]]:
    """The rows of a run as text, every digit of them, but for what the clock says."""

    def read(folder: Path) -> list[str]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [
            json.dumps(
                {k: v for k, v in row.items() if not k.startswith("time/") and k != "step_time"}
            )
            for row in rows
        ]

    return read


@pytest.fixture(scope="session")
def assert_same_end(
    tensors: Callable[[Path], dict[str, Any]], rows_without_times: Callable[[Path], list[str]]
) -> Callable[[Path, Path], None]:
    """assert_same_end(a, b): two runs ended in the same state, bit for bit: last checkpoint, its
    counters, metrics, exported weights.
    """

    def check(one: Path, other: Path) -> None:
        assert rows_without_times(one) == rows_without_times(other)
        last_one, last_other = (folder / "checkpoints" / "latest" for folder in (one, other))
        assert last_one.resolve().name == last_other.resolve().name
        assert (last_one / "state.json").read_text() == (last_other / "state.json").read_text()
        assert_same_tensors(tensors(last_one), tensors(last_other))
        assert_same_tensors(
            *(
                load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
                for folder in (one, other)
            )
        )

    return check


def assert_same_tensors(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype, name
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name
