"""How fast the real generators are sampled and trained, at their true size with random weights,
next to a DanceGRPO-style loop.

    python benchmarks/iteration.py --model wan2.1_t2v_1.3b --random-weights
    python benchmarks/iteration.py --model wan2.1_t2v_14b --random-weights --layers 20 \
        --parts g0 forward train decode
    python benchmarks/iteration.py --model hunyuanvideo --random-weights --scale tiny  # CPU

The code that is measured is the trainer's own: the policies, sample_videos, decode, update. In
this order:

    g0         the training forward against the rollout's, bit for bit, and the ratio of every
               trained step, which must be exactly 1; where it is not, the mismatch (rms, in units
               of the step's noise s). What is not right here gets no goal
    forward    one branch, no gradient
    train      one train unit, that is one branch of one step, forward and backward, by what
               backward keeps
    decode     the VAE, un-tiled and tiled, and how far from the fp32 un-tiled one
    iteration  a scaled one of --videos videos and --units train units, extrapolated to the recipe's
               by the formula that it prints; and the same of the DanceGRPO-style loop
               (common/dancegrpo.py), whole, then with each handicap alone taken away (or added,
               fa2)

Each row has a peer, named in it, and the ratio of the peer's seconds to its own. MFU is the work
that has to be done (nothing computed twice) over the seconds, over the rate of bf16 matrix
products of 8192 measured in the same process (on a CPU fp32, of 1024). GB are the allocator's
peak, beside what `plan` says of that phase; a CPU does not measure it. With --layers a network
of so many blocks is measured, and "whole s" is scaled up by the FLOP of all of them. Figures are
medians of --repeats after a warm-up; an iteration is one run, warmed up, without a judge and
with nothing overlapped. Options that are not named below are the recipe's own (--parallel.shard
full). Rows go to benchmarks/data/<GPU or cpu>_iteration.csv. Exit code: 1 where a measurement
failed or the trainer's own forward is red in g0, 2 for options that cannot be. Not yet run on a
GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where the packages are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from benchmarks.common import dancegrpo, random_models, rows, scaled_iteration
from benchmarks.common.rows import number
from benchmarks.common.scaled_iteration import IMPLEMENTATIONS, OPEN
from benchmarks.common.session import (
    COLUMNS,
    WITH_ADAM,
    WITHOUT_ADAM,
    Bench,
    add,
    best_activations,
    check_bits,
    fits,
    g0_of,
    planned,
    run_guarded,
    sampled,
    similarity,
    start,
    with_optimizer,
)
from benchmarks.common.timing import matmul_rate, median
from fastgrpo.config import RuntimeConfig
from fastgrpo.distributed import collectives
from fastgrpo.planning import memory
from fastgrpo.training.decode import decode
from fastgrpo.training.loop import compute_dtype
from fastgrpo.training.trajectory import branch_velocity
from fastgrpo.training.update import TrainedTransition, backpropagate, trained_rows

PARTS = ("g0", "forward", "train", "decode", "iteration")
NEEDED = {
    "rollout.micro_batch_size": 1,
    "rollout.sde_window": "all",
    "rollout.sde": "dance",
    "update.cfg_grad": "both",
    "update.kl_coef": 0.0,
}
"""What the recipes have, and every figure and the DanceGRPO-style loop take for granted."""


def benchmark_model(bench: Bench, name: str) -> None:
    """G0 and one forward of an implementation. fa2 is only a peer: no G0."""
    activations = best_activations(bench, fits(bench, "full", True))
    policy = random_models.build(
        bench.config, bench.device, activations=activations, **IMPLEMENTATIONS[name]
    )
    if "g0" in bench.options.parts and name != "fa2":
        rollout = start(bench, policy, 1)
        bits = bench.bits[name] = check_bits(policy, rollout, bench.config.update)
        bench.rollout = bench.rollout or rollout
        notes = [
            f"{bits.steps} steps, velocities {'' if bits.equal else 'not '}bit-equal",
            f"|ratio - 1| {number(bits.drift, 9)}",
            f"mismatch {number(bits.mismatch, 6)} s",
            f"activations {activations}",
        ]
        figures: dict[str, Any] = {
            "drift": bits.drift,
            "mismatch": bits.mismatch,
            "g0": g0_of(bench, name),
        }
        add(bench, "g0", name, note=", ".join(notes), **figures)
    if "forward" not in bench.options.parts:
        return
    rollout = sampled(bench, policy)
    at = rollout.latents[:1, 0], rollout.index([0], [0])
    call = torch.no_grad()(lambda: branch_velocity(policy, rollout, *at, conditional=True))
    usage, (whole, part) = median(call, bench.device, bench.options.repeats), bench.flop(None)
    add(
        bench,
        "forward",
        name,
        usage,
        whole_s=usage.seconds * whole / part,
        flop=whole,
        peer="eager",
        g0="" if name == "fa2" else g0_of(bench, name),
        planned_gb=planned(bench, "rollout", activations, optimizer=False) / 1e9
        if name == "fused"
        else None,
        note=policy.describe_attention(
            rollout.latent_shape, compute_dtype(bench.config.runtime, bench.device), 1
        ),
    )


def train_unit(bench: Bench, name: str, activations: str) -> None:
    """One transition of the first, on-policy update, by branches; a unit is one branch of it."""
    label, optimizer = f"{name}, {activations}", fits(bench, activations, True)
    if not fits(bench, activations, optimizer):
        needed = planned(bench, "update", activations, False) / 1e9
        print(f"train {label}: left out, plan says {needed:.1f} GB without Adam", flush=True)
        return
    policy = random_models.build(
        bench.config, bench.device, activations=activations, **IMPLEMENTATIONS[name]
    )
    rollout, cfg = sampled(bench, policy), dataclasses.replace(bench.config.update, clip_range=OPEN)
    kept = with_optimizer(policy, cfg) if optimizer else None  # for the memory that it takes
    (rows,) = trained_rows(rollout, [TrainedTransition(0, rollout.num_steps // 2, 1.0)])
    usage = median(
        lambda: backpropagate(policy, rollout, rows, cfg, None, scale=1.0, on_policy=True),
        bench.device,
        bench.options.repeats,
    )
    usage.seconds /= bench.branches
    whole, part = bench.flop("none")
    add(
        bench,
        "train",
        label,
        usage,
        whole_s=usage.seconds * whole / part,
        flop=whole,
        peer="eager, full",
        g0=g0_of(bench, name),
        planned_gb=planned(bench, "update", activations, optimizer) / 1e9
        if name == "fused"
        else None,
        note=WITHOUT_ADAM if kept is None else WITH_ADAM,
    )


def decode_one(bench: Bench, dtype: str, tiling: bool, exact: list[Tensor]) -> None:
    """One way to decode the same latent. The fp32 un-tiled frames come first and go to `exact`."""
    policy = random_models.build(
        bench.config, bench.device, fused=False, vae_dtype=dtype, vae_tiling=tiling
    )
    size = bench.config.rollout
    shape = policy.latent_shape(size.height, size.width, size.num_frames)
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(bench.device)
    usage = median(lambda: decode(policy, latents), bench.device, bench.options.repeats)
    frames = decode(policy, latents)
    if (dtype, tiling) == ("fp32", False):
        exact.append(frames)
    add(
        bench,
        "decode",
        f"{'tiled' if tiling else 'un-tiled'} {dtype}",
        usage,
        whole_s=usage.seconds,
        flop=bench.counts.decode.flop,
        peer=f"tiled {dtype}",
        **(similarity(frames, exact[0]) if exact else {}),
    )


def run(bench: Bench) -> None:
    """The parts that were asked for, in their order."""
    parts, names = bench.options.parts, bench.options.implementations
    if {"g0", "forward"} & set(parts):
        for name in names:
            run_guarded(bench, f"{name}: g0 and forward", benchmark_model, name)
    if "train" in parts:
        ours = [(bench.ours, activations) for activations in memory.ACTIVATIONS]
        for name, activations in dict.fromkeys([("eager", "full"), *ours]):
            run_guarded(bench, f"train {name}, {activations}", train_unit, name, activations)
    if "decode" in parts:
        exact: list[Tensor] = []
        for dtype in ("fp32", "bf16"):
            for tiling in (False, True):
                label = f"decode {dtype}{', tiled' if tiling else ''}"
                run_guarded(bench, label, decode_one, dtype, tiling, exact)
    if "iteration" not in parts:
        return
    if not fits(bench, "full", True):
        needed = planned(bench, "update", "full") / 1e9
        print(f"iteration: left out, plan says {needed:.1f} GB: fewer --layers", flush=True)
        return
    run_guarded(bench, "iteration, ours", scaled_iteration.our_iteration)
    for name, handicaps in scaled_iteration.variants(bench).items():
        run_guarded(bench, f"iteration, {name}", scaled_iteration.peer_iteration, name, handicaps)


def prepare(options: argparse.Namespace, overrides: Sequence[str], folder: Path) -> Bench:
    """The recipe over the model's configuration, and what `plan` counts of it. ValueError: numbers
    that cannot be had.
    """
    device = torch.device(options.device)
    published = (random_models.TINY if options.scale == "tiny" else random_models.MODELS)[
        options.model
    ]
    layers = random_models.num_layers(published) if options.layers is None else options.layers
    measured = random_models.with_layers(published, layers)
    config = random_models.recipe(options.model, measured, folder / "model", device, overrides)
    for key, value in NEEDED.items():
        section, _, name = key.partition(".")
        if (got := getattr(getattr(config, section), name)) != value:
            raise ValueError(f"--{key}: expected {value}, as the recipes have it, got {got}")
    random_models.embed(config, measured)
    counts = whole = memory.count(config)
    if measured != published:
        whole = memory.count(
            random_models.recipe(options.model, published, folder / "whole", device, overrides)
        )
    roll, all_layers = config.rollout, random_models.num_layers(published)
    size = f"{roll.height}x{roll.width}x{roll.num_frames}, {roll.num_inference_steps} steps, "
    size += f"{layers} of {all_layers} layers"
    bench = Bench(
        options=options,
        config=config,
        device=device,
        size=f"tiny {size}" if options.scale else size,
        counts=counts,
        whole=whole,
        rate=matmul_rate(device),
        about=rows.provenance(device) | {"diffusers": importlib.metadata.version("diffusers")},
        path=rows.csv_path(options.csv, device, "iteration"),
    )
    if "iteration" in options.parts:  # refused now, not after an hour
        scaled_iteration.scaled_update(bench)
        scaled_iteration.variants(bench)
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
            about = [f"{name} {value}" for name, value in bench.about.items()]
            about += [f"matmul {bench.rate / 1e12:.4g} TFLOP/s", f"ours: {bench.ours}"]
            print("  ".join([options.model, bench.size, *about]), flush=True)
            run(bench)
        finally:
            collectives.stop()
    print(f"\n{rows.table(bench.rows, COLUMNS)}\n{bench.path}")
    return 1 if bench.trouble or g0_of(bench, bench.ours) == "red" else 0


def _parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    handicaps = "handicaps:\n" + "\n".join(
        f"  {name:<16}{note}" for name, note in dancegrpo.HANDICAPS.items()
    )
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=handicaps, formatter_class=raw, allow_abbrev=False
    )
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--model", choices=list(random_models.MODELS), required=True, help="the name of a recipe"
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
        "--implementations",
        nargs="+",
        choices=list(IMPLEMENTATIONS),
        default=names,
        help="of g0 and forward",
    )
    whole = [name for name in dancegrpo.HANDICAPS if name != "fa2"]
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
    sizes = dict(random_models.TINY_SIZE) if options.scale == "tiny" else {}
    for name in ("height", "width", "num_frames", "num_inference_steps"):
        if getattr(options, name) is not None:
            sizes[f"rollout.{name}"] = getattr(options, name)
    options.recipe_size = not sizes and not any(word.startswith("--rollout.") for word in overrides)
    return options, [
        word for name, value in sizes.items() for word in (f"--{name}", str(value))
    ] + overrides


if __name__ == "__main__":
    sys.exit(main())
