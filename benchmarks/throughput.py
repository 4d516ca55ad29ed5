"""How fast the real generators are sampled and trained, at their true size with random weights,
next to a DanceGRPO-style loop.

    python benchmarks/throughput.py --model wan2.1_t2v_1.3b --random-weights python
    benchmarks/throughput.py --model wan2.1_t2v_14b --random-weights --layers 20 --parts g0
    forward train decode python benchmarks/throughput.py --model hunyuanvideo --random-weights
    --scale tiny          # a CPU, seconds

The code that is measured is the trainer's own: the policies, sample_groups, decode, update. In
this order:

    g0         the training forward against the rollout's, bit for bit, and the ratio of every trained step, which must be exactly 1;
               where it is not, the mismatch (rms, in units of the step's noise s). What is not right here gets no goal
    forward    one branch, no gradient
    train      one train unit, that is one branch of one step, forward and backward, by what backward keeps
    decode     the VAE, un-tiled and tiled, and how far from the fp32 un-tiled one
    iteration  a scaled one of --videos videos and --units train units, extrapolated to the recipe's by the formula that it prints; and the
               same of the DanceGRPO-style loop (dancegrpo_loop.py), whole, then with each handicap alone taken away (or added, fa2)

Each row has a peer, named in it, and the ratio of the peer's seconds to its own. MFU is the work
that has to be done (nothing computed twice) over the seconds, over the rate of bf16 matrix
products of 8192 measured in the same process (on a CPU fp32, of 1024). GB are the allocator's
peak, beside what `plan` says of that phase; a CPU does not measure it. With --layers a network
of so many blocks is measured, and "whole s" is scaled up by the FLOP of all of them. Figures are
medians of --repeats after a warm-up; an iteration is one run, warmed up, without a judge and
with nothing overlapped. Options that are not named below are the recipe's own (--parallel.shard
full). Rows are added to benchmarks/data/<GPU or cpu>_throughput.csv. Exit code: 1 where a
measurement failed or the trainer's own forward is red in g0, 2 for options that cannot be. No
line of this has been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # for `python benchmarks/throughput.py`
sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent / "kernels")
)  # where the package is not installed

from benchmarks import dancegrpo_loop as peer
from benchmarks import generators
from benchmarks.rows import DATA, csv_name, provenance
from benchmarks.throughput_bench import (
    Bench,
    Spent,
    add,
    attempt,
    best_activations,
    check_bits,
    fits,
    g0_of,
    likeness,
    matmul_rate,
    median,
    planned,
    sampled,
    spending,
    start,
    synchronize,
    with_optimizer,
)
from benchmarks.throughput_rows import WITH_ADAM, WITHOUT_ADAM, number, table, write
from fastgrpo.config import RuntimeConfig, UpdateConfig
from fastgrpo.distributed import collectives
from fastgrpo.distributed.sharding import gathered
from fastgrpo.planning import memory
from fastgrpo.training.decode import decode
from fastgrpo.training.loop import compute_dtype
from fastgrpo.training.rollout import sample_groups
from fastgrpo.training.trajectory import branch_velocity
from fastgrpo.training.update import Pair, backpropagate, update

PARTS = ("g0", "forward", "train", "decode", "iteration")
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
NEEDED = {
    "rollout.micro_batch_size": 1,
    "rollout.sde_window": "all",
    "rollout.sde": "dance",
    "update.cfg_grad": "both",
    "update.kl_coef": 0.0,
}
"""What the recipes have, and every figure and the DanceGRPO-style loop take for granted."""
OPEN = 0.99
"""The clip range where only time is measured: a peer whose ratio is not 1 has a gradient too."""


# -------- g0, forward, train unit, decode


def look_at(bench: Bench, name: str) -> None:
    """G0 and one forward of an backend. fa2 is a peer and no more: no G0."""
    activations = best_activations(bench, fits(bench, "full", True))
    policy = generators.build(
        bench.config, bench.device, activations=activations, **IMPLEMENTATIONS[name]
    )
    if "g0" in bench.options.parts and name != "fa2":
        rollout = start(bench, policy, 1)
        bits = bench.bits[name] = check_bits(policy, rollout, bench.config.update)
        bench.rollout = bench.rollout or rollout
        words = f"{bits.steps} steps, velocities {'' if bits.equal else 'not '}bit-equal, |ratio - 1| {number(bits.drift, 9)}"
        words += f", mismatch {number(bits.mismatch, 6)} s; activations {activations}"
        add(
            bench,
            "g0",
            name,
            drift=bits.drift,
            mismatch=bits.mismatch,
            g0=g0_of(bench, name),
            words=words,
        )
    if "forward" not in bench.options.parts:
        return
    rollout = sampled(bench, policy)
    at = rollout.latents[:1, 0], torch.tensor([0]), torch.tensor([0])
    call = torch.no_grad()(lambda: branch_velocity(policy, rollout, *at, conditional=True))
    spent, (whole, part) = median(call, bench.device, bench.options.repeats), bench.flop(None)
    add(
        bench,
        "forward",
        name,
        spent,
        whole_s=spent.seconds * whole / part,
        flop=whole,
        peer="eager",
        g0="" if name == "fa2" else g0_of(bench, name),
        planned_gb=planned(bench, "rollout", activations, optimizer=False) / 1e9
        if name == "fused"
        else None,
        words=policy.describe_attention(
            rollout.latent_shape, compute_dtype(bench.config.runtime, bench.device)
        ),
    )


def train_unit(bench: Bench, name: str, activations: str) -> None:
    """One transition of the first, on-policy update, branch by branch; a unit is one branch of it."""
    by, optimizer = f"{name}, {activations}", fits(bench, activations, True)
    if not fits(bench, activations, optimizer):
        print(
            f"train {by}: left out, plan says {planned(bench, 'update', activations, False) / 1e9:.1f} GB without Adam",
            flush=True,
        )
        return
    policy = generators.build(
        bench.config, bench.device, activations=activations, **IMPLEMENTATIONS[name]
    )
    rollout, cfg = sampled(bench, policy), dataclasses.replace(bench.config.update, clip_range=OPEN)
    kept = with_optimizer(policy, cfg) if optimizer else None  # for the memory that it takes
    pair = Pair(0, rollout.num_steps // 2, 1.0)
    spent = median(
        lambda: backpropagate(policy, rollout, [pair], cfg, None, scale=1.0, on_policy=True),
        bench.device,
        bench.options.repeats,
    )
    spent.seconds /= bench.branches
    whole, part = bench.flop("none")
    add(
        bench,
        "train",
        by,
        spent,
        whole_s=spent.seconds * whole / part,
        flop=whole,
        peer="eager, full",
        g0=g0_of(bench, name),
        planned_gb=planned(bench, "update", activations, optimizer) / 1e9
        if name == "fused"
        else None,
        words=WITHOUT_ADAM if kept is None else WITH_ADAM,
    )


def decode_one(bench: Bench, dtype: str, tiling: bool, exact: list[Tensor]) -> None:
    """One way to decode the same latent. exact: takes the fp32 un-tiled frames, which come first."""
    policy = generators.build(
        bench.config, bench.device, fused=False, vae_dtype=dtype, vae_tiling=tiling
    )
    size = bench.config.rollout
    shape = policy.latent_shape(size.height, size.width, size.num_frames)
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(bench.device)
    spent = median(lambda: decode(policy, latents), bench.device, bench.options.repeats)
    frames = decode(policy, latents)
    if (dtype, tiling) == ("fp32", False):
        exact.append(frames)
    add(
        bench,
        "decode",
        f"{'tiled' if tiling else 'un-tiled'} {dtype}",
        spent,
        whole_s=spent.seconds,
        flop=bench.counts.decode.flop,
        peer=f"tiled {dtype}",
        **(likeness(frames, exact[0]) if exact else {}),
    )


# -------- iteration


def scaled_update(bench: Bench) -> UpdateConfig:
    """The recipe's update for the few videos of the scaled iteration: --units train units over all
    of them, and as large a share of on-policy ones as the recipe has.

    ValueError: numbers that do not divide.
    """
    cfg, videos, units = bench.config.update, bench.options.videos, bench.options.units
    kept, most = cfg.num_best + cfg.num_worst, memory.trained_steps(bench.config)
    if videos * cfg.gradient_accumulation % kept:
        raise ValueError(
            f"--videos: expected a multiple of {kept // math.gcd(kept, cfg.gradient_accumulation)}, got {videos}"
        )
    steps, rest = divmod(units, videos * bench.branches)
    if rest or not 1 <= steps <= most:
        raise ValueError(
            f"--units: expected a multiple of {videos * bench.branches} up to {videos * bench.branches * most}, got {units}"
        )
    fraction = (steps + 0.5) / (bench.config.rollout.num_inference_steps - 1)
    return dataclasses.replace(
        cfg,
        timestep_fraction=min(1.0, fraction),
        gradient_accumulation=videos * cfg.gradient_accumulation // kept,
        clip_range=OPEN,
    )


def scales(bench: Bench, shared: bool) -> dict[str, tuple[int, int]]:
    """Forwards of a rollout's one branch, videos decoded, transitions trained and optimizer steps:
    in the recipe's iteration and here.
    """
    cfg, roll, videos = bench.config.update, bench.config.rollout, bench.options.videos
    G, N, kept = roll.num_generations, roll.num_inference_steps, cfg.num_best + cfg.num_worst
    few = scaled_update(bench)
    here = videos * int(few.timestep_fraction * (N - 1))
    return {
        "rollout": (N * G - (G - 1) * shared, N * videos - (videos - 1) * shared),
        "decode": (G, videos),
        "update": (kept * memory.trained_steps(bench.config), here),
        "optimizer": (
            math.ceil(kept / cfg.gradient_accumulation),
            math.ceil(videos / few.gradient_accumulation),
        ),
    }


def add_iteration(
    bench: Bench,
    by: str,
    phases: dict[str, Spent],
    shared: bool,
    activations: str = "",
    g0: str = "",
    words: str = "",
) -> None:
    """The figures of an iteration and, of ours and of the whole peer, of its phases. The
    optimizer's time is scaled apart from the rest.

    activations: ours, of which `plan` has an estimate.
    """
    times = {name: whole / here for name, (whole, here) in scales(bench, shared).items()}
    whole, part = bench.flop("none")
    seconds = {name: spent.seconds * times[name] for name, spent in phases.items()}
    seconds["rollout"] *= whole / part
    seconds["update"] = (
        (
            seconds["update"]
            - phases["optimizer"].seconds * times["update"]
            + seconds.pop("optimizer")
        )
        * whole
        / part
    )
    once = dataclasses.replace(
        bench.config, update=dataclasses.replace(bench.config.update, branchwise=False)
    )
    flop = {name: work.flop for name, work in memory.work(once, bench.whole, "none", 1).items()}
    plans = {
        name: planned(bench, name, activations) / 1e9
        for name in seconds
        if activations and bench.ours == "fused"
    }
    for phase in seconds if by in ("ours", "peer") else ():
        add(
            bench,
            f"iteration: {phase}",
            by,
            phases[phase],
            whole_s=seconds[phase],
            flop=flop[phase],
            peer="peer",
            g0=g0,
            planned_gb=plans.get(phase),
        )
    total = Spent(
        sum(phases[name].seconds for name in seconds), max(spent.peak for spent in phases.values())
    )
    shown = ", ".join(f"{name} {s:.3g} s" for name, s in seconds.items())
    videos_per_s = bench.config.rollout.num_generations / sum(seconds.values())
    add(
        bench,
        "iteration",
        by,
        total,
        whole_s=sum(seconds.values()),
        flop=sum(flop.values()),
        peer="peer",
        g0=g0,
        planned_gb=max(plans.values(), default=None),
        words="; ".join(filter(None, [f"{videos_per_s:.3g} videos/s a GPU", shown, words])),
    )


@contextmanager
def timed_steps(
    optimizer: torch.optim.Optimizer, spent: Spent, device: torch.device
) -> Iterator[None]:
    """Add the seconds that the optimizer's own steps take."""
    begun = [0.0]

    def before(*_: Any) -> None:
        synchronize(device)
        begun[0] = time.perf_counter()

    def after(*_: Any) -> None:
        synchronize(device)
        spent.seconds += time.perf_counter() - begun[0]

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
    policy = generators.build(
        bench.config, device, activations=activations, **IMPLEMENTATIONS[bench.ours]
    )
    optimizer, warm = with_optimizer(policy, cfg), sampled(bench, policy)
    backpropagate(policy, warm, [Pair(0, 0, 1.0)], cfg, None, scale=1.0, on_policy=True)
    optimizer.zero_grad(set_to_none=True)
    decode(policy, warm.latents[:, -1])

    phases = {name: Spent() for name in ("rollout", "decode", "update", "optimizer")}
    rollout, roll = start(bench, policy, bench.options.videos), bench.config.rollout
    samples = sample_groups(policy, rollout, share_first_step=roll.share_first_step)
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
    words = f"activations {activations}; ratio exactly 1 on {sum(ratio == 1.0 for ratio in first)} of {len(first)}"
    add_iteration(bench, "ours", phases, share, activations, g0_of(bench, bench.ours), words)


def their_iteration(bench: Bench, by: str, handicaps: frozenset[str]) -> None:
    """An iteration of the DanceGRPO-style loop; a phase that feels none of what differs from an
    earlier one is taken from there.
    """
    keys = {phase: (phase, handicaps & frozenset(names)) for phase, names in peer.TOUCHES.items()}
    missing = [phase for phase, key in keys.items() if key not in bench.known]
    if missing:
        for phase, found in measure_theirs(bench, handicaps, missing).items():
            bench.known[keys[phase]] = found
    phases = {name: spent for key in keys.values() for name, spent in bench.known[key].items()}
    shared = "no_shared_step" not in handicaps and bench.config.rollout.same_noise
    add_iteration(bench, by, phases, shared, words="" if missing else "all of it measured before")


def measure_theirs(
    bench: Bench, handicaps: frozenset[str], missing: Sequence[str]
) -> dict[str, dict[str, Spent]]:
    """Some phases of that loop, each after a warm-up."""
    cfg, device, advantages = scaled_update(bench), bench.device, chosen_videos(bench)
    settings: dict[str, Any] = {"attention": "_native_flash"} if "fa2" in handicaps else {}
    policy = generators.build(
        bench.config,
        device,
        fused="eager" not in handicaps,
        masked="mask" in handicaps,
        vae_tiling="tiling" in handicaps,
        activations="full" if "checkpointing" in handicaps else best_activations(bench, True),
        **settings,
    )
    warm, found = sampled(bench, policy), {phase: {phase: Spent()} for phase in missing}
    if "rollout" in missing:
        with torch.no_grad():
            peer.velocities(policy, warm, warm.latents[:, 0], 0, 0, handicaps)
        rollout = start(bench, policy, bench.options.videos)
        with (
            spending(found["rollout"]["rollout"], device),
            gathered(policy.transformer, bench.config.parallel.keep_gathered),
        ):
            peer.sample(policy, rollout, handicaps)
        bench.theirs = bench.theirs or rollout
    if bench.theirs is None:
        raise RuntimeError("expected the peer's rollout to have been sampled before")
    if "decode" in missing:
        decode(policy, warm.latents[:, -1])
        with spending(found["decode"]["decode"], device), tempfile.TemporaryDirectory() as folder:
            for latents in bench.theirs.latents[:, -1]:
                frames = decode(policy, latents[None])
                if "mp4" in handicaps:
                    peer.mp4_round_trip(frames[0], policy.fps, Path(folder) / "video.mp4")
    if "update" in missing:
        optimizer, spent = with_optimizer(policy, cfg), Spent()
        peer.transition_loss(policy, warm, 0, 0, 1.0, cfg, handicaps).backward()
        optimizer.zero_grad(set_to_none=True)
        with spending(found["update"]["update"], device), timed_steps(optimizer, spent, device):
            peer.train(policy, optimizer, bench.theirs, [*advantages], advantages, cfg, handicaps)
        found["update"]["optimizer"] = spent
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


# -------- main


def run(bench: Bench) -> None:
    """The parts that were asked for, in their order."""
    parts, names = bench.options.parts, bench.options.backends
    for name in names if {"g0", "forward"} & set(parts) else ():
        attempt(bench, f"{name}: g0 and forward", lambda name=name: look_at(bench, name))  # type: ignore[misc]
    units = dict.fromkeys(
        [("eager", "full"), *((bench.ours, activations) for activations in memory.ACTIVATIONS)]
    )
    for name, activations in units if "train" in parts else ():
        attempt(
            bench,
            f"train {name}, {activations}",
            lambda name=name, a=activations: train_unit(bench, name, a),
        )  # type: ignore[misc]
    exact: list[Tensor] = []
    for dtype, tiling in (
        [(dtype, tiling) for dtype in ("fp32", "bf16") for tiling in (False, True)]
        if "decode" in parts
        else ()
    ):
        what = f"decode {dtype}{', tiled' if tiling else ''}"
        attempt(
            bench, what, lambda dtype=dtype, tiling=tiling: decode_one(bench, dtype, tiling, exact)
        )  # type: ignore[misc]
    if "iteration" not in parts:
        return
    if not fits(bench, "full", True):
        print(
            f"iteration: left out, plan says {planned(bench, 'update', 'full') / 1e9:.1f} GB: fewer --layers",
            flush=True,
        )
        return
    attempt(bench, "iteration, ours", lambda: our_iteration(bench))
    for by, handicaps in variants(bench).items():
        attempt(bench, f"iteration, {by}", lambda by=by, h=handicaps: their_iteration(bench, by, h))  # type: ignore[misc]


def prepare(options: argparse.Namespace, overrides: Sequence[str], folder: Path) -> Bench:
    """The recipe over the model's configuration, and what `plan` counts of it. ValueError: numbers
    that cannot be had.
    """
    device = torch.device(options.device)
    published = (generators.TINY if options.scale == "tiny" else generators.MODELS)[options.model]
    layers = generators.num_layers(published) if options.layers is None else options.layers
    measured = generators.with_layers(published, layers)
    config = generators.recipe(options.model, measured, folder / "model", device, overrides)
    for key, value in NEEDED.items():
        section, _, name = key.partition(".")
        if (got := getattr(getattr(config, section), name)) != value:
            raise ValueError(f"--{key}: expected {value}, as the recipes have it, got {got}")
    generators.embed(config, measured)
    counts = whole = memory.count(config)
    if measured != published:
        whole = memory.count(
            generators.recipe(options.model, published, folder / "whole", device, overrides)
        )
    roll, all_layers = config.rollout, generators.num_layers(published)
    size = f"{roll.height}x{roll.width}x{roll.num_frames}, {roll.num_inference_steps} steps, {layers} of {all_layers} layers"
    path = (options.csv or DATA) / csv_name(device).replace("_ops", "_throughput")
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    write(path, before, [])  # which says now if it cannot
    about = provenance(device) | {"diffusers": importlib.metadata.version("diffusers")}
    size = f"tiny {size}" if options.scale else size
    bench = Bench(
        options, config, device, size, counts, whole, matmul_rate(device), about, path, before
    )
    if "iteration" in options.parts:
        scaled_update(bench)
        variants(bench)
    return bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. 1 if a measurement failed or the trainer's own forward is red; 2 for
    options that cannot be.
    """
    options, overrides = _parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            collectives.start(RuntimeConfig(device=options.device))
            bench = prepare(options, overrides, Path(folder))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        else:
            words = [f"{name} {value}" for name, value in bench.about.items()]
            words += [f"matmul {bench.rate / 1e12:.4g} TFLOP/s", f"ours: {bench.ours}"]
            print("  ".join([options.model, bench.size, *words]), flush=True)
            run(bench)
        finally:
            collectives.stop()
    print(f"\n{table(bench.figures)}\n{bench.path}")
    return 1 if bench.trouble or g0_of(bench, bench.ours) == "red" else 0


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    handicaps = "handicaps:\n" + "\n".join(
        f"  {name:<16}{words}" for name, words in peer.HANDICAPS.items()
    )
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=handicaps, formatter_class=raw, allow_abbrev=False
    )
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--model", choices=list(generators.MODELS), required=True, help="the name of a recipe"
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        required=True,
        help="must be given: a model's own are not loaded",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    names = list(IMPLEMENTATIONS) if cuda else ["eager", "fused"]
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=list(IMPLEMENTATIONS),
        default=names,
        help="of g0 and forward",
    )
    whole = [name for name in peer.HANDICAPS if name != "fa2"]
    parser.add_argument(
        "--handicaps", nargs="*", default=whole, help="of the whole peer (default: all but fa2)"
    )
    parser.add_argument(
        "--scale", choices=("tiny",), help="a few thousand parameters and small videos, for a CPU"
    )
    parser.add_argument("--layers", type=int, help="blocks of the network (default: all)")
    for name in ("height", "width", "num-frames", "num-inference-steps"):
        parser.add_argument(f"--{name}", type=int, help="default: the recipe's")
    parser.add_argument("--videos", type=int, default=2, help="of the scaled iteration")
    parser.add_argument(
        "--units",
        type=int,
        default=4,
        help="train units (one branch of one step) of the scaled iteration",
    )
    parser.add_argument(
        "--activations",
        choices=["best", *memory.ACTIVATIONS],
        default="best",
        help="best: least recomputed that fits",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        help="seconds after which no further measurement is begun",
    )
    parser.add_argument(
        "--csv", type=Path, help="folder of the CSV file (default: benchmarks/data)"
    )
    options, overrides = parser.parse_known_args(arguments)
    sizes = dict(generators.TINY_SIZE) if options.scale == "tiny" else {}
    for name in ("height", "width", "num_frames", "num_inference_steps"):
        if getattr(options, name) is not None:
            sizes[f"rollout.{name}"] = getattr(options, name)
    options.recipe_size = not sizes and not any(word.startswith("--rollout.") for word in overrides)
    return options, [
        word for name, value in sizes.items() for word in (f"--{name}", str(value))
    ] + overrides


if __name__ == "__main__":
    sys.exit(main())
