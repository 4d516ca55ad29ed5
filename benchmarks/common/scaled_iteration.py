"""One iteration of few videos and train units, extrapolated to the recipe's by counts: the
trainer's, and that of the DanceGRPO-style loop with and without each of its handicaps.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import dancegrpo as peer
from benchmarks.common import random_models
from benchmarks.common.session import (
    Bench,
    add,
    best_activations,
    g0_of,
    planned,
    sampled,
    start,
    with_optimizer,
)
from benchmarks.common.timing import Usage, spending, synchronize
from fastgrpo.config import UpdateConfig
from fastgrpo.distributed.sharding import gathered
from fastgrpo.planning import memory
from fastgrpo.training.decode import decode
from fastgrpo.training.rollout import sample_videos
from fastgrpo.training.update import TrainedTransition, backpropagate, trained_rows, update

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "eager": {"fused": False},
    "fa2": {"fused": False, "attention": "_native_flash"},
    "compiled": {"fused": False, "compiled": True},
    "fused": {"fused": True},
}
"""eager: diffusers' blocks. fa2: these, with torch's FlashAttention-2. compiled: these, each
compiled by Inductor, as diffusers' compile_repeated_blocks does. fused: with fastgrpo_kernels'
operations.
"""
OPEN = 0.99
"""The clip range where only time is measured: a peer whose ratio is not 1 has a gradient too."""


def scaled_update(bench: Bench) -> UpdateConfig:
    """The recipe's update for the few videos of the scaled iteration: --units train units over all
    of them, and as large a share of on-policy ones as the recipe has.

    ValueError: numbers that do not divide.
    """
    cfg, videos, units = bench.config.update, bench.options.videos, bench.options.units
    most = memory.trained_steps(bench.config)
    if videos % cfg.optimizer_steps:
        raise ValueError(f"--videos: expected a multiple of {cfg.optimizer_steps}, got {videos}")
    steps, rest = divmod(units, videos * bench.branches)
    if rest or not 1 <= steps <= most:
        unit = videos * bench.branches
        raise ValueError(f"--units: expected a multiple of {unit} up to {unit * most}, got {units}")
    fraction = (steps + 0.5) / (bench.config.rollout.num_inference_steps - 1)
    return dataclasses.replace(
        cfg,
        timestep_fraction=min(1.0, fraction),
        num_best=videos,
        num_worst=0,
        clip_range=OPEN,
    )


def scales(bench: Bench, shared: bool) -> dict[str, tuple[int, int]]:
    """Forwards of a rollout's one branch, videos decoded, transitions trained and optimizer steps:
    in the recipe's iteration and here.
    """
    cfg, roll, videos = bench.config.update, bench.config.rollout, bench.options.videos
    G, N, kept = roll.num_generations, roll.num_inference_steps, cfg.num_best + cfg.num_worst
    here = videos * int(scaled_update(bench).timestep_fraction * (N - 1))
    return {
        "rollout": (N * G - (G - 1) * shared, N * videos - (videos - 1) * shared),
        "decode": (G, videos),
        "update": (kept * memory.trained_steps(bench.config), here),
        "optimizer": (cfg.optimizer_steps, cfg.optimizer_steps),
    }


def add_iteration(
    bench: Bench,
    name: str,
    phases: dict[str, Usage],
    shared: bool,
    *,
    activations: str = "",
    g0: str = "",
    note: str = "",
) -> None:
    """The rows of an iteration and, of ours and of the whole peer, of its phases. The optimizer's
    time is scaled apart from the rest.

    Args:
        activations: ours, of which `plan` has an estimate.
    """
    times = {phase: whole / here for phase, (whole, here) in scales(bench, shared).items()}
    whole, part = bench.flop("none")
    seconds = {phase: usage.seconds * times[phase] for phase, usage in phases.items()}
    seconds["rollout"] *= whole / part
    optimizer_here = phases["optimizer"].seconds * times["update"]
    seconds["update"] += seconds.pop("optimizer") - optimizer_here
    seconds["update"] *= whole / part
    once = dataclasses.replace(
        bench.config, update=dataclasses.replace(bench.config.update, branchwise=False)
    )
    flop = {phase: work.flop for phase, work in memory.work(once, bench.whole, "none", 1).items()}
    plans = {
        phase: planned(bench, phase, activations) / 1e9
        for phase in seconds
        if activations and bench.ours == "fused"
    }
    common: dict[str, Any] = {"peer": "peer", "g0": g0}
    for phase in seconds if name in ("ours", "peer") else ():
        figures = {"whole_s": seconds[phase], "flop": flop[phase], "planned_gb": plans.get(phase)}
        add(bench, f"iteration: {phase}", name, phases[phase], **figures, **common)
    peak = max(usage.peak for usage in phases.values())
    total = Usage(sum(phases[phase].seconds for phase in seconds), peak)
    videos_per_s = bench.config.rollout.num_generations / sum(seconds.values())
    notes = [
        f"{videos_per_s:.3g} videos/s per GPU",
        ", ".join(f"{phase} {s:.3g} s" for phase, s in seconds.items()),
        note,
    ]
    add(
        bench,
        "iteration",
        name,
        total,
        whole_s=sum(seconds.values()),
        flop=sum(flop.values()),
        planned_gb=max(plans.values(), default=None),
        note="; ".join(filter(None, notes)),
        **common,
    )


@contextmanager
def timed_steps(
    optimizer: torch.optim.Optimizer, usage: Usage, device: torch.device
) -> Iterator[None]:
    """Add the seconds that the optimizer's own steps take."""
    begun = [0.0]

    def before(*_: Any) -> None:
        synchronize(device)
        begun[0] = time.perf_counter()

    def after(*_: Any) -> None:
        synchronize(device)
        usage.seconds += time.perf_counter() - begun[0]

    hooks = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def chosen_videos(bench: Bench) -> dict[int, float]:
    """The videos that are trained, and their advantages."""
    return {video: 1.0 if video % 2 else -1.0 for video in range(bench.options.videos)}


def our_iteration(bench: Bench) -> None:
    """The trainer's rollout, decode and update."""
    cfg, device, activations = scaled_update(bench), bench.device, best_activations(bench, True)
    policy = random_models.build(
        bench.config, device, activations=activations, **IMPLEMENTATIONS[bench.ours]
    )
    optimizer, warm = with_optimizer(policy, cfg), sampled(bench, policy)
    (rows,) = trained_rows(warm, [TrainedTransition(0, 0, 1.0)])
    backpropagate(policy, warm, rows, cfg, None, scale=1.0, on_policy=True)
    optimizer.zero_grad(set_to_none=True)
    decode(policy, warm.latents[:, -1])

    phases = {name: Usage() for name in ("rollout", "decode", "update", "optimizer")}
    rollout, roll = start(bench, policy, bench.options.videos), bench.config.rollout
    samples = sample_videos(policy, rollout, share_first_step=roll.share_first_step)
    frames: list[Tensor] = []
    with gathered(policy.transformer, bench.config.parallel.keep_gathered):
        for _ in range(bench.options.videos):
            with spending(phases["rollout"], device):
                sample = next(samples)
            with spending(phases["decode"], device):
                frames = [*frames[-1:], decode(policy, sample.latents)]  # one is still being scored
    advantages = chosen_videos(bench)
    with spending(phases["update"], device), timed_steps(optimizer, phases["optimizer"], device):
        stats = update(policy, optimizer, rollout, [*advantages], advantages, cfg)
    first, share = stats.ratios[: stats.num_first], roll.share_first_step and roll.same_noise
    formula = " + ".join(
        f"{name} x {whole}/{here}" for name, (whole, here) in scales(bench, share).items()
    )
    print(f"whole iteration = {formula} (update without the optimizer; no judge)", flush=True)
    exact = sum(ratio == 1.0 for ratio in first)
    note = f"activations {activations}; ratio exactly 1 on {exact} of {len(first)}"
    g0 = g0_of(bench, bench.ours)
    add_iteration(bench, "ours", phases, share, activations=activations, g0=g0, note=note)


def peer_iteration(bench: Bench, name: str, handicaps: frozenset[str]) -> None:
    """An iteration of the DanceGRPO-style loop; a phase that feels none of what differs from an
    earlier one is taken from there.
    """
    keys = {phase: (phase, handicaps & frozenset(names)) for phase, names in peer.TOUCHES.items()}
    missing = [phase for phase, key in keys.items() if key not in bench.known]
    if missing:
        for phase, found in measure_peer(bench, handicaps, missing).items():
            bench.known[keys[phase]] = found
    phases = {phase: usage for key in keys.values() for phase, usage in bench.known[key].items()}
    shared = "no_shared_step" not in handicaps and bench.config.rollout.same_noise
    note = "" if missing else "all of it measured before"
    add_iteration(bench, name, phases, shared, note=note)


def measure_peer(
    bench: Bench, handicaps: frozenset[str], missing: Sequence[str]
) -> dict[str, dict[str, Usage]]:
    """Some phases of that loop, each after a warm-up."""
    cfg, device, advantages = scaled_update(bench), bench.device, chosen_videos(bench)
    settings: dict[str, Any] = {"attention": "_native_flash"} if "fa2" in handicaps else {}
    policy = random_models.build(
        bench.config,
        device,
        fused="eager" not in handicaps,
        masked="mask" in handicaps,
        vae_tiling="tiling" in handicaps,
        activations="full" if "checkpointing" in handicaps else best_activations(bench, True),
        **settings,
    )
    warm, found = sampled(bench, policy), {phase: {phase: Usage()} for phase in missing}
    if "rollout" in missing:
        with torch.no_grad():
            peer.velocities(policy, warm, warm.latents[:, 0], 0, 0, handicaps)
        rollout = start(bench, policy, bench.options.videos)
        with (
            spending(found["rollout"]["rollout"], device),
            gathered(policy.transformer, bench.config.parallel.keep_gathered),
        ):
            peer.sample(policy, rollout, handicaps)
        bench.peer_rollout = bench.peer_rollout or rollout
    assert bench.peer_rollout is not None, "the whole peer samples first"
    if "decode" in missing:
        decode(policy, warm.latents[:, -1])
        with spending(found["decode"]["decode"], device), tempfile.TemporaryDirectory() as folder:
            for latents in bench.peer_rollout.latents[:, -1]:
                frames = decode(policy, latents[None])
                if "mp4" in handicaps:
                    peer.mp4_round_trip(frames[0], policy.fps, Path(folder) / "video.mp4")
    if "update" in missing:
        optimizer, usage = with_optimizer(policy, cfg), Usage()
        peer.transition_loss(policy, warm, 0, 0, 1.0, cfg, handicaps).backward()
        optimizer.zero_grad(set_to_none=True)
        with spending(found["update"]["update"], device), timed_steps(optimizer, usage, device):
            peer.train(
                policy, optimizer, bench.peer_rollout, [*advantages], advantages, cfg, handicaps
            )
        found["update"]["optimizer"] = usage
    return found


def variants(bench: Bench) -> dict[str, frozenset[str]]:
    """The whole peer, and the peer with each handicap alone taken away or added (and what goes with
    it).
    """
    has = bench.branches == 2, bench.options.model == "hunyuanvideo"
    whole = peer.possible(bench.options.handicaps, *has)
    found = {"peer": whole}
    for name in peer.HANDICAPS:
        other = peer.toggled(whole, name, *has)
        changed = {"with": other - whole, "without": whole - other}
        changes = [
            f"{word} {' and '.join(sorted(names))}" for word, names in changed.items() if names
        ]
        if changes:
            found[f"peer {' '.join(changes)}"] = other
    return found
