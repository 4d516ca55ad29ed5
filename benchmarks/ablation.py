"""The paper's ablation on the embedded world: which reward teaches the small generator most in a
given number of iterations?

    python benchmarks/ablation.py                       # seven rows, three seeds, two at a time
    python benchmarks/ablation.py --judge rounded_0.25  # under a judge that rounds; or
                                                        # rounded_0.1, or noisy

Every row is a real run of `train` with the shipped recipe; rows differ in the `pacing`
section alone. What is compared is not the reward that was trained on: visual quality (VQ),
motion quality (MQ) and text alignment (TA) of validation captions by the clean judge, on videos
sampled with noise that is the same for every row. Writes benchmarks/data/ablation_<judge>.csv
and .png; runs go to runs/ablation/<revision of the code>/, where finished ones are reused.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jsonargparse
import torch
from matplotlib.figure import Figure

from fastgrpo.config import TrainConfig
from fastgrpo.evaluation.tables import render_table, write_csv
from fastgrpo.shapes.captions import COLOURS, DIRECTIONS, SHAPES
from fastgrpo.shapes.judge import ShapesJudge
from fastgrpo.shapes.policy import ShapesPolicy
from fastgrpo.training.decode import decode
from fastgrpo.training.prompts import read_prompts
from fastgrpo.training.recipe_parser import parse_config
from fastgrpo.training.rollout import sample_videos, start_rollout

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "fastgrpo" / "recipes" / "shapes.yaml"
LITERAL_THRESHOLDS = ROOT / "fastgrpo" / "recipes" / "shapes_literal_gate.yaml"
REVISION = subprocess.run(
    ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.strip()
Judge = Literal["clean", "rounded_0.1", "rounded_0.25", "noisy"]

ROWS: dict[str, list[str] | None] = {
    "untrained": None,
    "one_stage": ["--pacing.mode", "one_stage"],
    "two_stage": ["--pacing.mode", "two_stage"],
    "joint": ["--pacing.mode", "joint"],
    "stage III alone": ["--pacing.mode", "static"],
    "self_paced, literal gate": ["--config", str(LITERAL_THRESHOLDS)],
    "self_paced": ["--pacing.mode", "self_paced"],
}
JUDGES: dict[str, list[str]] = {
    "clean": [],
    "rounded_0.1": ["--reward.init_args.rounding", "0.1"],
    "rounded_0.25": ["--reward.init_args.rounding", "0.25"],
    "noisy": ["--reward.init_args.noise", "0.3"],
}
UNATTENDED = (
    "--resume auto --evaluation.interval 0 --evaluation.num_videos 1 --tracking.trackers []"
)
METRICS = ("VQ", "MQ", "TA", "geometric mean")


@dataclass(frozen=True)
class Result:
    """One trained generator on validation captions: means of the metrics, and the shares of what it
    draws.
    """

    row: str
    seed: int
    metrics: tuple[float, ...]
    shares: dict[str, float]


def main(
    judge: Judge = "clean",
    seeds: tuple[int, ...] = (0, 1, 2),
    iterations: int = 150,
    processes: int = 2,
    videos_per_caption: int = 16,
) -> None:
    """Train, measure, print the table, write CSV and figure.

    Args:
        judge: what the training sees: the clean judge, one that rounds, or one whose noise falls
            as visual quality rises. seeds: one run each, for every row. iterations: length of
            each run. processes: runs at a time, one thread each. videos_per_caption: videos of
            each validation caption that are measured.
    """
    started = time.perf_counter()
    config, _, _ = parse_config(
        ["--config", str(RECIPE), "--rollout.num_generations", str(videos_per_caption)]
    )
    jobs = [(row, seed) for seed in seeds for row in ROWS]
    with ThreadPoolExecutor(processes) as pool:
        results = list(
            pool.map(lambda job: train_and_measure(job[0], job[1], judge, iterations, config), jobs)
        )
    seconds = time.perf_counter() - started
    # Not with_suffix: the name of a judge may hold a dot.
    table_file, figure_file = (
        ROOT / "benchmarks" / "data" / f"ablation_{judge}.{kind}" for kind in ("csv", "png")
    )
    table_file.parent.mkdir(exist_ok=True)
    write_csv(table_file, records(results, iterations))
    draw(results, judge, iterations).savefig(figure_file, dpi=160)
    runs = f"{judge} judge, {iterations} iterations, {len(seeds)} seeds, {seconds / 60:.1f} minutes"
    print(f"\n{runs}; mean ± standard deviation over seeds\n")
    print(table(results))
    print(f"\n{table_file}, {figure_file}")


def train_and_measure(
    row: str, seed: int, judge: str, iterations: int, config: TrainConfig
) -> Result:
    overrides = ROWS[row]
    if overrides is None:
        return measure(None, row, seed, config)
    name = f"{row.replace(', ', '_').replace(' ', '_')}-{iterations}-seed{seed}"
    folder = ROOT / "runs" / "ablation" / REVISION / judge
    options = [*overrides, *JUDGES[judge], f"--seed={seed}", f"--iterations={iterations}"]
    options += [f"--name={name}", f"--output_dir={folder}", *UNATTENDED.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "fastgrpo", "train", "--config", str(RECIPE)]
    done = subprocess.run(
        [*command, *options], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    if "changed since the last start" in done.stdout:
        raise RuntimeError(
            f"{folder / name} was made with another configuration; remove it:\n{done.stdout[:2000]}"
        )
    result = measure(folder / name / "transformer", row, seed, config)
    print(
        f"{row:<26} seed {seed}  "
        + "  ".join(f"{m} {v:.3f}" for m, v in zip(METRICS, result.metrics, strict=True)),
        flush=True,
    )
    return result


@torch.no_grad()
def measure(transformer: Path | None, row: str, seed: int, config: TrainConfig) -> Result:
    """VQ, MQ, TA and the shares of colours, shapes and directions on validation captions, by the
    clean judge.
    """
    torch.set_num_threads(1)
    assert config.prompts.validation is not None
    policy, judge, device = (
        ShapesPolicy(None if transformer is None else str(transformer)),
        ShapesJudge(),
        torch.device("cpu"),
    )
    policy.load(device)
    judge.load(device)
    prompts = read_prompts(config.prompts.validation, "prompts.validation")
    # Independent noise for every video: with one noise a group, a caption would count once, not
    # sixteen times.
    sampler = dataclasses.replace(config.rollout, same_noise=False)
    rollout = start_rollout(
        policy, prompts, sampler, seed=10**6 + seed, iteration=0, first_slot=0, device=device
    )
    components, kinds = [], []
    for sample in sample_videos(policy, rollout):
        videos = decode(policy, sample.latents)
        components.append(judge.qualities(videos, sample.prompts))
        kinds.append(torch.stack(judge.classify(videos), dim=1))
    vq, mq, ta = torch.cat(components).double().mean(dim=0).tolist()
    drawn = torch.cat(kinds)
    shares = {
        name: float((drawn[:, axis] == index).double().mean())
        for axis, names in enumerate((COLOURS, SHAPES, DIRECTIONS))
        for index, name in enumerate(names)
    }
    return Result(row, seed, (vq, mq, ta, (vq * mq * ta) ** (1 / 3)), shares)


def of_row(results: Iterable[Result], row: str) -> list[Result]:
    return [r for r in results if r.row == row]


def spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def table(results: list[Result]) -> str:
    """The two Markdown tables: metrics, and shares of what is drawn (validation prompts ask for
    each about equally).
    """
    names, metrics, shares = list(results[0].shares), [], []
    for row in ROWS:
        found = of_row(results, row)
        metrics.append([row, *map(spread, zip(*(r.metrics for r in found), strict=True))])
        means = (statistics.mean(r.shares[name] for r in found) for name in names)
        shares.append([row, *(f"{mean:.2f}" for mean in means)])
    tables = [["reward", *METRICS], *metrics], [["share drawn", *names], *shares]
    return "\n\n".join(render_table(rows, "markdown") for rows in tables)


def records(results: list[Result], iterations: int) -> list[dict[str, object]]:
    """A row of the CSV file for each trained generator."""
    rows = []
    for r in results:
        values = dict(zip(METRICS, r.metrics, strict=True)) | r.shares
        row: dict[str, object] = {"reward": r.row, "seed": r.seed, "iterations": iterations}
        row |= {name: f"{value:.4f}" for name, value in values.items()}
        rows.append(row | {"torch": torch.__version__, "commit": REVISION})
    return rows


def draw(results: list[Result], judge: str, iterations: int) -> Figure:
    """Dots for seeds, bars for means, one panel a metric."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for m, (axes, metric) in enumerate(
        zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True)
    ):
        for y, row in enumerate(ROWS):
            values = [r.metrics[m] for r in of_row(results, row)]
            axes.barh(
                y,
                statistics.mean(values),
                color="#0072B2" if row == "self_paced" else "#B0B7BF",
                height=0.65,
            )
            axes.plot(values, [y] * len(values), "o", color="black", markersize=3)
        axes.set_title(metric, loc="left", fontsize=10)
        axes.set_yticks(range(len(ROWS)), list(ROWS), fontsize=9)
        axes.set_xlim(0, math.ceil(10 * max(max(r.metrics[m] for r in results), 0.5)) / 10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Validation captions after {iterations} iterations, {judge} judge",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
