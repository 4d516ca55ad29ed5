"""What the parts of iteration.py share: one session's state, how a measurement is taken and kept,
what `plan` says of it, and the goals G1 to G4 and G6.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from fastgrpo_kernels import guided_velocity
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from benchmarks.common import random_models, rows
from benchmarks.common.rows import Measurement, number
from benchmarks.common.timing import Usage
from fastgrpo.config import TrainConfig, UpdateConfig
from fastgrpo.planning import memory
from fastgrpo.policies.fused import fused_serves
from fastgrpo.training.loop import compute_dtype
from fastgrpo.training.optimizer import make_optimizer
from fastgrpo.training.rollout import sample_videos, start_rollout
from fastgrpo.training.trajectory import Rollout, branch_velocity
from fastgrpo.training.update import (
    TrainedTransition,
    micro_batch,
    trained_rows,
    trained_steps,
    transition_loss,
)


@dataclass(frozen=True, kw_only=True)
class ModelMeasurement(Measurement):
    """One part of an iteration by one implementation."""

    KEY: ClassVar = ("device", "model", "size", "part", "implementation")

    model: str
    size: str
    recipe_size: bool
    """Whether frames and steps are the recipe's (layers may be fewer)."""
    part: str
    implementation: str
    seconds: float | None = None
    whole_s: float | None = None
    """Seconds of all layers, and of the recipe's whole iteration."""
    tflop: float | None = None
    """What has to be computed in `whole_s`, nothing twice."""
    tflop_per_s: float | None = None
    mfu_percent: float | None = None
    peer: str = ""
    """The implementation of the same part that this one is compared with."""
    ratio: float | None = None
    """The peer's whole_s over this one: above 1 is faster than the peer."""
    peak_gb: float | None = None
    planned_gb: float | None = None
    drift: float | None = None
    """Largest |ratio - 1| of a trained step before any update."""
    mismatch: float | None = None
    """Largest rms between the training forward's and the rollout's step, in units of its noise."""
    psnr: float | None = None
    """dB, to the fp32 un-tiled decode."""
    ms_ssim: float | None = None
    g0: str = ""
    """green, red or not checked; nothing for what has no ratio of its own (a decode, the
    DanceGRPO-style loop).
    """
    note: str = ""
    matmul_tflop_per_s: float
    diffusers: str


COLUMNS: list[rows.Column] = [
    ("part", "<19", lambda row: row.part),
    ("by", "<42", lambda row: row.implementation),
    ("seconds", ">9", lambda row: number(row.seconds, 4)),
    ("whole s", ">9", lambda row: number(row.whole_s, 4)),
    ("TFLOP/s", ">8", lambda row: number(row.tflop_per_s, 1)),
    ("MFU %", ">6", lambda row: number(row.mfu_percent, 1)),
    ("ratio", ">7", lambda row: number(row.ratio, 2)),
    ("to", "<12", lambda row: row.peer),
    ("GB", ">8", lambda row: number(row.peak_gb, 1)),
    ("plan GB", ">8", lambda row: number(row.planned_gb, 1)),
    ("notes", "", lambda row: "; ".join(filter(None, [row.note, _red(row), row.goals]))),
]


def _red(row: ModelMeasurement) -> str:
    return "G0 red" if row.g0 == "red" and row.part != "g0" else ""


@dataclass(frozen=True)
class Goal:
    """A goal of docs/performance.md, for one H100."""

    name: str
    seconds: float
    ratios: dict[str, float] = field(default_factory=dict)
    """The least ratio to another row of the part."""
    peak_gb: float | None = None
    """With the optimizer's states."""
    ms_ssim: float | None = None


GOALS = {
    ("wan2.1_t2v_1.3b", "forward", "fused"): Goal(
        "G1", 0.25, {"eager": 1.25, "compiled": 1.0, "fa2": 1.5}
    ),
    ("wan2.1_t2v_14b", "forward", "fused"): Goal("G3", 0.28),
    ("wan2.1_t2v_1.3b", "decode", "un-tiled bf16"): Goal(
        "G4", 0.70, {"tiled bf16": 2.2}, ms_ssim=0.9999
    ),
    ("wan2.1_t2v_1.3b", "iteration", "ours"): Goal(
        "G6", 265.0, {"peer": 1.6, "peer with fa2": 2.0}
    ),
}
for _kept in ("none", "keep_attention"):  # whichever of them fits
    GOALS["wan2.1_t2v_1.3b", "train", f"fused, {_kept}"] = Goal(
        "G2", 0.87, {"eager, full": 1.5}, peak_gb=75.0
    )
    GOALS["wan2.1_t2v_14b", "train", f"fused, {_kept}"] = Goal("G3", 0.90)
WITH_ADAM, WITHOUT_ADAM = "with Adam's states", "without Adam's states"
"""Notes of a train unit: whether the optimizer's memory was taken beside it."""


def compared(measured: list[ModelMeasurement]) -> list[ModelMeasurement]:
    """The same with the ratios to their peers, and with their goals. Where G0 is red there is no
    ratio: it is no gain.
    """
    seconds = {(row.part, row.implementation): row.whole_s for row in measured}
    found = []
    for row in measured:
        peer_s = seconds.get((row.part, row.peer))
        ratio = peer_s / row.whole_s if peer_s and row.whole_s and row.g0 != "red" else None
        found.append(dataclasses.replace(row, ratio=ratio, goals=judge(row, seconds)))
    return found


def judge(row: ModelMeasurement, seconds: dict[tuple[str, str], float | None]) -> str:
    """The goals of a row, each met or not met: for an H100 or an H200, the recipe's own size, and a
    green G0.

    Args:
        seconds: whole_s of all rows of this run, by part and implementation.
    """
    goal = GOALS.get((row.model, row.part, row.implementation))
    if goal is None or not rows.has_goals(row.device) or not row.whole_s or not row.recipe_size:
        return ""
    if row.g0 not in ("green", ""):
        return f"{goal.name}: G0 is {row.g0}"
    asked = [(f"{goal.name} {goal.seconds:g} s", row.whole_s <= goal.seconds)]
    for peer, least in goal.ratios.items():
        if peer_s := seconds.get((row.part, peer)):
            asked.append((f"{goal.name} {least:g}x {peer}", peer_s / row.whole_s >= least))
    if goal.peak_gb is not None and row.peak_gb is not None:
        is_met = row.peak_gb < goal.peak_gb and WITH_ADAM in row.note
        asked.append((f"{goal.name} {goal.peak_gb:g} GB", is_met))
    if goal.ms_ssim is not None and row.ms_ssim is not None:
        asked.append((f"{goal.name} MS-SSIM {goal.ms_ssim:g}", row.ms_ssim >= goal.ms_ssim))
    return rows.met(asked)


@dataclass(frozen=True)
class Bits:
    """How a training forward compares with the rollout's: all velocities equal bit for bit, worst
    ratio and mismatch (see ModelMeasurement).
    """

    equal: bool
    drift: float
    mismatch: float
    steps: int

    @property
    def green(self) -> bool:
        return self.equal and self.drift == 0.0


@dataclass
class Bench:
    """What the parts share."""

    options: argparse.Namespace
    config: TrainConfig
    device: torch.device
    size: str
    counts: memory.Counts
    whole: memory.Counts
    """Of the network with all its layers."""
    rate: float
    """FLOP/s of matrix products, measured."""
    about: dict[str, str]
    path: Path
    bits: dict[str, Bits] = field(default_factory=dict)
    rows: list[ModelMeasurement] = field(default_factory=list)
    rollout: Rollout | None = None
    """One sampled video, for what needs a trajectory to train on."""
    peer_rollout: Rollout | None = None
    """The videos that the DanceGRPO-style loop sampled first."""
    known: dict[tuple[str, frozenset[str]], dict[str, Usage]] = field(default_factory=dict)
    """Phases of that loop, by the handicaps that each feels."""
    trouble: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def ours(self) -> str:
        """What `policy.fused` comes to on this device."""
        fused = getattr(self.config.policy, "fused", False)
        return "fused" if (fused_serves(self.device) if fused == "auto" else fused) else "eager"

    @property
    def branches(self) -> int:
        """Forwards of one step."""
        return 2 if self.config.rollout.guidance_scale != 1 else 1

    def flop(self, activations: str | None) -> tuple[float, float]:
        """Of one branch: with all layers, and as measured."""
        sharded = self.config.parallel.shard == "full"
        return self.whole.velocity(activations, sharded).flop, self.counts.velocity(
            activations, sharded
        ).flop


def planned(bench: Bench, phase: str, activations: str, optimizer: bool = True) -> float:
    """Bytes that `plan` says the phase needs, of so many videos as are measured; without Adam's
    states where there is no optimizer.
    """
    few = dataclasses.replace(
        bench.config,
        rollout=dataclasses.replace(bench.config.rollout, num_generations=bench.options.videos),
        update=dataclasses.replace(bench.config.update, num_best=1, num_worst=1),
    )
    chosen: Any = {"activations": activations}
    settings = dataclasses.replace(memory.resolve(bench.config.parallel, 1), **chosen)
    parts = memory.memory(few, bench.counts, settings, 1)[phase]
    return sum(size for name, size in parts.items() if optimizer or name != "Adam")


def fits(bench: Bench, activations: str, optimizer: bool) -> bool:
    """Whether `plan` says that an update fits into this GPU; on a CPU all is taken to fit."""
    if bench.device.type != "cuda":
        return True
    total = torch.cuda.get_device_properties(bench.device).total_memory
    return planned(bench, "update", activations, optimizer) + memory.RESERVE <= total


def best_activations(bench: Bench, optimizer: bool) -> str:
    """--activations, or the policy that computes least again among those that fit."""
    chosen: str = bench.options.activations
    return (
        chosen
        if chosen != "best"
        else next((name for name in memory.ACTIVATIONS if fits(bench, name, optimizer)), "full")
    )


def run_guarded(bench: Bench, what: str, measure: Callable[..., None], *given: Any) -> None:
    """Make a measurement if there is time; what fails is named and does not stop the others. Memory
    that is too small is no failure.
    """
    if time.monotonic() - bench.started > bench.options.budget:
        print(f"{what}: left out, the budget of {bench.options.budget:.0f} s is spent", flush=True)
        return
    try:
        measure(bench, *given)
    except torch.OutOfMemoryError as error:
        print(f"{what}: no number, out of memory: {str(error).splitlines()[0]}", flush=True)
    except Exception as error:  # must not cost the other measurements; the exit code tells
        print(f"{what}: FAILED, no number: {type(error).__name__}: {error}", flush=True)
        bench.trouble = True
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def add(
    bench: Bench,
    part: str,
    implementation: str,
    usage: Usage | None = None,
    *,
    whole_s: float | None = None,
    flop: float | None = None,
    **values: Any,
) -> None:
    """Keep a measurement, print its line, and write the file, so that what is ended at a limit
    leaves what it had.

    Args:
        flop: done in whole_s.
    """
    rate = flop / whole_s if flop and whole_s else None
    if whole_s and bench.whole is not bench.counts and part != "decode":
        notes = [values.get("note"), "whole s scaled up to all layers"]
        values["note"] = "; ".join(filter(None, notes))
    row = ModelMeasurement(
        model=bench.options.model,
        size=bench.size,
        recipe_size=bench.options.recipe_size,
        part=part,
        implementation=implementation,
        seconds=usage.seconds if usage else None,
        whole_s=whole_s,
        tflop=flop / 1e12 if flop else None,
        tflop_per_s=rate / 1e12 if rate else None,
        mfu_percent=100 * rate / bench.rate if rate else None,
        peak_gb=usage.peak / 1e9 if usage and usage.peak else None,
        matmul_tflop_per_s=bench.rate / 1e12,
        **(values | bench.about),
    )
    bench.rows = compared([*bench.rows, row])
    rows.write_csv(bench.path, bench.rows)
    print(rows.table(bench.rows[-1:], COLUMNS, head=len(bench.rows) == 1), flush=True)


def start(bench: Bench, policy: Any, videos: int) -> Rollout:
    """An empty rollout of the recipe's with so many videos of one prompt."""
    cfg, dtype = (
        dataclasses.replace(bench.config.rollout, num_generations=videos),
        compute_dtype(bench.config.runtime, bench.device),
    )
    return start_rollout(
        policy,
        [random_models.PROMPT],
        cfg,
        seed=0,
        iteration=1,
        first_slot=0,
        device=bench.device,
        compute_dtype=dtype,
    )


def sampled(bench: Bench, policy: Any) -> Rollout:
    """One sampled video, made by the first policy that comes: all have the same weights."""
    if bench.rollout is None:
        bench.rollout = start(bench, policy, 1)
        for _ in sample_videos(policy, bench.rollout):
            pass
    return bench.rollout


def with_optimizer(policy: Any, cfg: UpdateConfig) -> torch.optim.Optimizer:
    """The trainer's optimizer with its state made, as Trainer makes it."""
    optimizer = make_optimizer([p for p in policy.transformer.parameters() if p.requires_grad], cfg)
    get_optimizer_state_dict(policy.transformer, optimizer)
    return optimizer


def g0_of(bench: Bench, name: str) -> str:
    """green, red or not checked: the G0 of an implementation."""
    return "not checked" if name not in bench.bits else "green" if bench.bits[name].green else "red"


@contextmanager
def recording(policy: Any) -> Iterator[list[Tensor]]:
    """The velocities that the policy gives in the meantime, in order."""
    outputs: list[Tensor] = []
    velocity = policy.velocity

    def record(*given: Any) -> Tensor:
        output: Tensor = velocity(*given)
        outputs.append(output.detach().clone())
        return output

    policy.velocity = record
    try:
        yield outputs
    finally:
        del policy.velocity


def check_bits(policy: Any, rollout: Rollout, cfg: UpdateConfig) -> Bits:
    """Sample the rollout's one video, then run the training forward of its trained steps on what
    was stored.
    """
    branches = 1 if rollout.unconditional is None else 2
    with recording(policy) as sampled_velocities:
        for _ in sample_videos(policy, rollout):
            pass
    equal, ratios, mismatches = True, [], []
    for step in trained_steps(rollout, 0, cfg.timestep_fraction, seed=0):
        batch = micro_batch(rollout, *trained_rows(rollout, [TrainedTransition(0, step, 1.0)]))
        at = batch.latents, batch.index
        again = [
            branch_velocity(policy, rollout, *at, conditional=c).detach()
            for c in (True, False)[:branches]
        ]
        before = sampled_velocities[branches * step : branches * (step + 1)]
        equal &= all(torch.equal(one, other) for one, other in zip(again, before, strict=True))
        pairs = [(pair[0], pair[1] if branches == 2 else None) for pair in (again, before)]
        with torch.no_grad():
            _, (ratio, *_) = transition_loss(rollout, batch, *pairs[0], None, cfg)
            velocities = [guided_velocity(*pair, rollout.guidance_scale).float() for pair in pairs]
        ratios.append(float(ratio))
        # A step is a x + b v + s eps: what differs in v moves it by b / s of that, in units of s.
        mismatches.append(
            float(
                (batch.b / batch.std).abs() * (velocities[0] - velocities[1]).square().mean().sqrt()
            )
        )
    return Bits(equal, max(abs(ratio - 1.0) for ratio in ratios), max(mismatches), len(ratios))


def similarity(frames: Tensor, exact: Tensor) -> dict[str, Any]:
    """PSNR in dB (none for equal frames), MS-SSIM where torchmetrics is installed and the frames
    are large enough, greatest error.
    """
    error = (frames - exact).double()
    square = float(error.square().mean())
    found = {
        "psnr": -10 * math.log10(square) if square else None,
        "note": f"greatest error {float(error.abs().max()):.2g} of [0, 1]",
    }
    if importlib.util.find_spec("torchmetrics") and min(frames.shape[-2:]) > 160:
        metrics: Any = importlib.import_module(
            "torchmetrics.functional.image"
        )  # no dependency: where it is installed
        measure = metrics.multiscale_structural_similarity_index_measure
        found["ms_ssim"] = float(measure(frames.flatten(0, 1), exact.flatten(0, 1), data_range=1.0))
    return found
