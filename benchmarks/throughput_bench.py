"""What the parts of throughput.py share: one session's state, how a figure is taken and kept, what
`plan` says of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastgrpo_kernels import guided_velocity
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from benchmarks import generators, stopwatch
from benchmarks.throughput_rows import Figure, compared, table, write
from fastgrpo.config import TrainConfig, UpdateConfig
from fastgrpo.planning import memory
from fastgrpo.policies.pretrained import fused_serves
from fastgrpo.training.loop import compute_dtype
from fastgrpo.training.rollout import sample_groups, start_rollout
from fastgrpo.training.trajectory import Rollout, branch_velocity
from fastgrpo.training.update import (
    Pair,
    make_optimizer,
    micro_batch,
    trained_steps,
    transition_loss,
)


@dataclass
class Spent:
    """Seconds, and on a GPU the allocator's peak in bytes (0 elsewhere)."""

    seconds: float = 0.0
    peak: float = 0.0


@dataclass(frozen=True)
class Bits:
    """How a training forward compares with the rollout's: all velocities equal bit for bit, worst
    ratio and mismatch (see Figure).
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
    before: str
    """What the file held before this run."""
    bits: dict[str, Bits] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    rollout: Rollout | None = None
    """One sampled video, for what needs a trajectory to train on."""
    theirs: Rollout | None = None
    """The videos that the DanceGRPO-style loop sampled first."""
    known: dict[tuple[str, frozenset[str]], dict[str, Spent]] = field(default_factory=dict)
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


# -------- what fits


def planned(bench: Bench, phase: str, activations: str, optimizer: bool = True) -> float:
    """Bytes that `plan` says the phase needs, of so many videos as are measured; without Adam's
    states where there is no optimizer.
    """
    few = dataclasses.replace(
        bench.config,
        rollout=dataclasses.replace(bench.config.rollout, num_generations=bench.options.videos),
        update=dataclasses.replace(bench.config.update, num_best=1, num_worst=1),
    )
    settings: Any = dataclasses.replace(
        memory.resolve(bench.config.parallel, 1), activations=activations
    )  # type: ignore[arg-type]
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


# -------- what is shared


def attempt(bench: Bench, what: str, call: Callable[[], None]) -> None:
    """Make a measurement if there is time; what fails is named and does not stop the others. Memory
    that is too small is no failure.
    """
    if time.monotonic() - bench.started > bench.options.budget:
        print(f"{what}: left out, the budget of {bench.options.budget:.0f} s is spent", flush=True)
        return
    try:
        call()
    except torch.OutOfMemoryError as error:
        print(f"{what}: no number, out of memory: {str(error).splitlines()[0]}", flush=True)
    except (
        Exception
    ) as error:  # one measurement that fails must not cost the others; the exit code tells
        print(f"{what}: FAILED, no number: {type(error).__name__}: {error}", flush=True)
        bench.trouble = True
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def add(
    bench: Bench,
    part: str,
    by: str,
    spent: Spent | None = None,
    *,
    whole_s: float | None = None,
    flop: float | None = None,
    **values: Any,
) -> None:
    """Keep a figure, print its line, and write the file, so that what is ended at a limit leaves
    what it had. flop: done in whole_s.
    """
    rate = flop / whole_s if flop and whole_s else None
    given: dict[str, Any] = dict.fromkeys(
        ("ratio", "planned_gb", "drift", "mismatch", "psnr", "ms_ssim")
    )
    given |= {"peer": "", "g0": "", "words": "", "goals": ""} | bench.about | values
    if whole_s and bench.whole is not bench.counts and part != "decode":
        given["words"] = "; ".join(
            filter(None, [given["words"], "whole s scaled up to all layers"])
        )
    figure = Figure(
        model=bench.options.model,
        size=bench.size,
        recipe_size=bench.options.recipe_size,
        part=part,
        by=by,
        seconds=spent.seconds if spent else None,
        whole_s=whole_s,
        tflop=flop / 1e12 if flop else None,
        tflop_per_s=rate / 1e12 if rate else None,
        mfu_percent=100 * rate / bench.rate if rate else None,
        peak_gb=spent.peak / 1e9 if spent and spent.peak else None,
        matmul_tflop_per_s=bench.rate / 1e12,
        **given,
    )
    bench.figures = compared([*bench.figures, figure])
    write(bench.path, bench.before, bench.figures)
    print(table(bench.figures[-1:], head=len(bench.figures) == 1), flush=True)


def start(bench: Bench, policy: Any, videos: int) -> Rollout:
    """An empty rollout of the recipe's with so many videos of one prompt."""
    cfg, dtype = (
        dataclasses.replace(bench.config.rollout, num_generations=videos),
        compute_dtype(bench.config.runtime, bench.device),
    )
    return start_rollout(
        policy,
        [generators.PROMPT],
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
        for _ in sample_groups(policy, bench.rollout):
            pass
    return bench.rollout


def with_optimizer(policy: Any, cfg: UpdateConfig) -> torch.optim.Optimizer:
    """The trainer's optimizer with its state made, as Trainer makes it."""
    optimizer = make_optimizer([p for p in policy.transformer.parameters() if p.requires_grad], cfg)
    get_optimizer_state_dict(policy.transformer, optimizer)
    return optimizer


def g0_of(bench: Bench, name: str) -> str:
    """The colour of an backend's G0."""
    return "not checked" if name not in bench.bits else "green" if bench.bits[name].green else "red"


# -------- measuring


@contextmanager
def spending(spent: Spent, device: torch.device) -> Iterator[None]:
    """Add what happens in the meantime to `spent`, the device's queued work waited for."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    yield
    synchronize(device)
    spent.seconds += time.perf_counter() - begin
    if device.type == "cuda":
        spent.peak = max(spent.peak, torch.cuda.max_memory_allocated(device))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(call: Callable[[], Any], device: torch.device, repeats: int) -> Spent:
    """The median seconds and the largest peak of so many calls, after one that is not counted."""
    call()
    runs = [Spent() for _ in range(repeats)]
    for run in runs:
        with spending(run, device):
            call()
    return Spent(statistics.median(run.seconds for run in runs), max(run.peak for run in runs))


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a product of square matrices: bf16 of 8192 on a GPU, fp32 of 1024 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return (
        2
        * size**3
        / stopwatch.measure(lambda: [lambda: left @ right], device, seconds=0.5).us
        * 1e6
    )


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
        for _ in sample_groups(policy, rollout):
            pass
    equal, ratios, mismatches = True, [], []
    for step in trained_steps(rollout, 0, cfg.timestep_fraction, seed=0):
        batch = micro_batch(rollout, [Pair(0, step, 1.0)])
        at = batch.latents, batch.videos, batch.steps
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


def likeness(frames: Tensor, exact: Tensor) -> dict[str, Any]:
    """PSNR in dB (none for equal frames), MS-SSIM where torchmetrics is installed and the frames
    are large enough, greatest error.
    """
    error = (frames - exact).double()
    square = float(error.square().mean())
    found = {
        "psnr": -10 * math.log10(square) if square else None,
        "words": f"greatest error {float(error.abs().max()):.2g} of [0, 1]",
    }
    if importlib.util.find_spec("torchmetrics") and min(frames.shape[-2:]) > 160:
        metrics: Any = importlib.import_module(
            "torchmetrics.functional.image"
        )  # no dependency: where it is installed
        measure = metrics.multiscale_structural_similarity_index_measure
        found["ms_ssim"] = float(measure(frames.flatten(0, 1), exact.flatten(0, 1), data_range=1.0))
    return found
