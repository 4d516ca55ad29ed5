"""How cost grows: seconds of CPU against the size of what is worked on, and the power of the size
by which they grow (1 is linear).

    python benchmarks/growth.py [--only iteration ranks run report bias prompts] [--csv FOLDER]

iteration: rollout and update of the embedded network against frames, videos of a group and prompts.
ranks: the same whole step on one and on two processes, in seconds of the wall (on idle cores).
run: a tiny run of 1,000 iterations by hundreds. report: the page of a run by its length, and its
size. bias: k-means over 10 to 20 clusters and five seeds, by videos. prompts: reading and drawing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common.rows import (
    ROOT,
    Measurement,
    csv_path,
    number,
    provenance,
    table,
    write_csv,
)
from fastgrpo.config import TrainConfig
from fastgrpo.distributed import collectives
from fastgrpo.evaluation.kappa import cluster_all, directions
from fastgrpo.evaluation.report.page import write_report
from fastgrpo.shapes.captions import train_captions
from fastgrpo.shapes.policy import ShapesPolicy
from fastgrpo.training.prompts import draw_prompts, read_prompts
from fastgrpo.training.recipe_parser import parse_config
from fastgrpo.training.rollout import sample_videos, start_rollout
from fastgrpo.training.update import update

CPU = torch.device("cpu")
RECIPE = "fastgrpo/recipes/shapes.yaml"
TINY = (
    "--rollout.num_prompts 1 --rollout.num_generations 4 --rollout.num_inference_steps 4 "
    "--rollout.micro_batch_size 4 --update.num_best 1 --update.num_worst 1 "
    "--evaluation.interval 0 --evaluation.num_videos 0 --checkpoint.interval 100000"
)


@dataclass(frozen=True, kw_only=True)
class Growth(Measurement):
    """One size of one thing."""

    KEY: ClassVar = ("device", "what", "size")

    what: str
    size: int
    seconds: float
    """Of CPU; of the wall where there are several processes."""
    megabytes: float | None = None
    power: float | None = None
    """Of the size, by which the seconds have grown since the size before."""


COLUMNS = [
    ("what", "32", lambda row: row.what),
    ("size", ">8", lambda row: str(row.size)),
    ("seconds", ">10", lambda row: number(row.seconds, 3)),
    ("MB", ">8", lambda row: number(row.megabytes, 1)),
    ("power", ">6", lambda row: number(row.power, 2)),
]

Found = Iterator[tuple[str, int, float, float | None]]
"""What, size, seconds and megabytes."""


class AnyLength(ShapesPolicy):
    """The embedded network on latents of any number of frames, which its codec could not decode."""

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """[96, T, 1, 1]."""
        return (super().latent_shape(height, width, 8)[0], num_frames, 1, 1)


def seconds_of(work: Callable[[], Any], repeats: int = 3) -> float:
    """Median seconds of CPU, after one call that warms up."""
    found = []
    for _ in range(repeats + 1):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return statistics.median(found[1:])


def iteration() -> Found:
    """Rollout and update of an iteration, without judge and decoding."""
    config, _, _ = parse_config(["--config", str(ROOT / RECIPE)])
    collectives.start(config.runtime)
    policy = AnyLength()
    policy.load(CPU)
    captions = [str(caption) for caption in train_captions()]
    for what, key, sizes in (
        ("iteration, frames", "num_frames", (8, 16, 32)),
        ("iteration, videos of a group", "num_generations", (16, 32, 64)),
        ("iteration, prompts", "num_prompts", (4, 8, 16)),
    ):
        for size in sizes:
            changes: dict[str, Any] = {key: size}
            cfg = dataclasses.replace(config.rollout, **changes)
            work = _step(config, policy, captions[: cfg.num_prompts], cfg)
            yield what, size, seconds_of(work), None
    collectives.stop()


def _step(
    config: TrainConfig, policy: ShapesPolicy, prompts: list[str], cfg: Any
) -> Callable[[], None]:
    G = cfg.num_generations
    cfg_update = dataclasses.replace(config.update, num_best=G // 2, num_worst=0)
    chosen = [G * group + i for group in range(len(prompts)) for i in range(G // 2)]
    optimizer = torch.optim.SGD(policy.transformer.parameters(), lr=0.0)

    def work() -> None:
        rollout = start_rollout(policy, prompts, cfg, seed=0, iteration=1, first_slot=0, device=CPU)
        for _ in sample_videos(policy, rollout):
            pass
        update(policy, optimizer, rollout, chosen, dict.fromkeys(chosen, 1.0), cfg_update)

    return work


def _train(folder: Path, name: str, processes: int, *arguments: str) -> list[dict[str, Any]]:
    """The rows of a run's iterations."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, str(ROOT / "fastgrpo" / "train.py"), "--config", RECIPE]
    where = ["--output_dir", str(folder), "--name", name, "--tracking.trackers", "[]"]
    words = [word for argument in arguments for word in argument.split()]
    subprocess.run(
        [sys.executable, *command, *where, *words], cwd=ROOT, check=True, capture_output=True
    )
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["iteration"]]


def ranks() -> Found:
    """A whole step of the embedded world."""
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            length = "--iterations 20 --evaluation.num_videos 0"
            rows = _train(Path(folder), f"ranks_{processes}", processes, length)
            seconds = statistics.median(row["step_time"] for row in rows[2:])
            yield "step, processes (wall)", processes, seconds, None


def run() -> Found:
    """The iterations of a tiny run."""
    with tempfile.TemporaryDirectory() as folder:
        rows = _train(Path(folder), "run", 1, TINY, "--iterations 1000")
    for end in (100, 500, 1000):
        steps = [row["step_time"] for row in rows[end - 100 : end]]
        yield "step of a tiny run, iteration", end, statistics.median(steps), None


def report() -> Found:
    """The page of a run that is this long, made from a short one by repeating its rows."""
    with tempfile.TemporaryDirectory() as folder:
        made = _train(Path(folder), "run", 1, TINY, "--iterations 10")
        record = Path(folder) / "run"
        for length in (250, 1000, 4000):
            draw = np.random.default_rng(0)
            rows = [
                {
                    key: value + 0.1 * draw.normal() * value if isinstance(value, float) else value
                    for key, value in made[i % len(made)].items()
                }
                | {"iteration": i + 1}
                for i in range(length)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (record / "metrics.jsonl").write_text(text, encoding="utf-8")
            seconds = seconds_of(lambda: write_report(record), repeats=1)
            size = (record / "report" / "report.html").stat().st_size
            yield "report, iterations", length, seconds, size / 1e6


def bias() -> Found:
    """All partitions of prompts around 40 topics, 4,096 dimensions."""
    for videos in (1000, 3000, 10_000):
        draw = np.random.default_rng(0)
        topics, topic = draw.normal(size=(40, 4096)), draw.integers(0, 40, videos)
        vectors = directions(0.7 * topics[topic] + draw.normal(size=(videos, 4096)))
        begun = time.process_time()
        cluster_all(vectors, range(10, 21), range(5))
        yield "bias, videos", videos, time.process_time() - begun, None


def prompts() -> Found:
    """What a start does with its prompts."""
    with tempfile.TemporaryDirectory() as folder:
        for size in (5000, 50_000, 500_000):
            file = Path(folder) / f"{size}.txt"
            file.write_text("".join(f"prompt number {i}\n" for i in range(size)), encoding="utf-8")

            def start(file: Path = file) -> None:
                draw_prompts(read_prompts(str(file), "prompts"), 0, 8, seed=0)

            yield "start, prompts", size, seconds_of(start, repeats=1), None


PARTS: dict[str, Callable[[], Found]] = {
    part.__name__: part for part in (iteration, ranks, run, report, bias, prompts)
}


def rows_of(part: Callable[[], Found], given: dict[str, str]) -> Iterator[Growth]:
    """The measurements of one part, each with its power."""
    before: Growth | None = None
    for what, size, seconds, megabytes in part():
        power = None
        if before is not None and before.what == what:
            power = math.log(seconds / before.seconds) / math.log(size / before.size)
        values: dict[str, Any] = given | {"what": what, "size": size, "power": power}
        before = Growth(seconds=seconds, megabytes=megabytes, **values)
        yield before


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--csv", type=Path, help="folder of the CSV file (default: benchmarks/data)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: list[Growth] = []
    given, path = provenance(CPU), csv_path(options.csv, CPU, "growth")
    for name in options.only:
        for row in rows_of(PARTS[name], given):
            print(table([row], COLUMNS, head=not found), flush=True)
            found.append(row)
        write_csv(path, found)  # a part that fails leaves those before it
    return 0


if __name__ == "__main__":
    sys.exit(main())
