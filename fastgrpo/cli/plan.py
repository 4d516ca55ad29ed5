"""Say what a recipe needs of the GPUs, and which settings fit, without a GPU or weights.

Takes the options of `train`, and --gpu-memory GB (80), --world-size N (8), --gpus-per-node N (8).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastgrpo.config import TrainConfig
from fastgrpo.errors import fail
from fastgrpo.planning import memory
from fastgrpo.training.config_file import parse_config


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan. Exit code 0, also where nothing fits; 2 with one message for whatever cannot
    be used.
    """
    own = argparse.ArgumentParser(
        prog="python -m fastgrpo plan", add_help=False, allow_abbrev=False
    )
    own.add_argument("--gpu-memory", "--gpu_memory", type=float, default=80.0)
    own.add_argument("--world-size", "--world_size", type=int, default=8)
    own.add_argument("--gpus-per-node", "--gpus_per_node", type=int, default=8)
    options, rest = own.parse_known_args(argv)
    config, _, _ = parse_config(rest, prog="python -m fastgrpo plan", description=__doc__)
    try:
        for key in ("gpu_memory", "world_size", "gpus_per_node"):
            if not getattr(options, key) > 0:
                raise ValueError(
                    f"--{key.replace('_', '-')}: expected a number above 0, got {getattr(options, key)}"
                )
        print(
            "\n".join(
                plan(config, options.gpu_memory * 1e9, options.world_size, options.gpus_per_node)
            )
        )
    except (ValueError, FileNotFoundError) as error:
        fail(error)
    return 0


def plan(config: TrainConfig, gpu_memory: float, world_size: int, gpus_per_node: int) -> list[str]:
    """The lines of the plan. gpu_memory: bytes. ValueError, FileNotFoundError: as `memory.count`
    and `memory.resolve`.
    """
    counts, cfg = memory.count(config), memory.resolve(config.parallel, world_size)
    room = gpu_memory - memory.RESERVE
    return [
        *network_lines(config, counts, world_size),
        "",
        *activation_lines(counts, cfg.shard == "full"),
        "",
        *memory_lines(config, counts, world_size),
        "",
        *work_lines(config, counts, world_size),
        "",
        *settings_lines(config, counts, room, world_size, gpus_per_node),
        "",
        *assumptions(config),
    ]


def network_lines(config: TrainConfig, counts: memory.Counts, world_size: int) -> list[str]:
    """Parameters, and one forward."""
    network, roll, forward = counts.network, config.rollout, counts.velocity(None, True)
    size = roll.micro_batch_size
    return [
        f"{config.name} on {world_size} GPU(s): {roll.num_frames} frames of {roll.height} x {roll.width}, "
        f"{roll.num_prompts} prompts x {roll.num_generations} videos",
        f"parameters        {network.parameters / 1e6:,.1f} M, trained {network.trained / 1e6:,.1f} M, {network.num_blocks} blocks",
        f"one forward       {tera(forward.linear / size)} TFLOP linear + {tera(forward.attention / size)} attention a video and branch",
        f"VAE decode        {tera(counts.decode.flop)} TFLOP and {giga(counts.decode.kept + counts.decode.work)} GB a video",
    ]


def activation_lines(counts: memory.Counts, sharded: bool) -> list[str]:
    """What backward keeps and computes, by policy."""
    lines = [
        "one branch, forward and backward of a micro-batch",
        f"  {'activations':<16}{'kept GB':>9}{'+ work GB':>11}{'TFLOP':>11}",
    ]
    for name in memory.ACTIVATIONS:
        cost = counts.velocity(name, sharded)
        lines.append(f"  {name:<16}{giga(cost.kept):>9}{giga(cost.work):>11}{tera(cost.flop):>11}")
    return lines


def memory_lines(config: TrainConfig, counts: memory.Counts, world_size: int) -> list[str]:
    """GB a GPU by phase, under the recipe's own settings."""
    cfg = memory.resolve(config.parallel, world_size)
    phases = memory.memory(config, counts, cfg, world_size)
    names = dict.fromkeys(name for parts in phases.values() for name in parts)
    rows = [
        f"  {name:<28}" + "".join(f"{giga(parts.get(name, 0.0)):>9}" for parts in phases.values())
        for name in names
    ]
    total = f"  {'peak':<28}" + "".join(
        f"{giga(sum(parts.values())):>9}" for parts in phases.values()
    )
    lines = [
        f"GB on each GPU as configured ({memory.describe(cfg)})",
        f"  {'':<28}" + "".join(f"{p:>9}" for p in phases),
        *rows,
        total,
    ]
    if cfg.cpu_offload:
        lines.append(
            f"  and {giga(memory.host_bytes(config, counts, cfg, world_size))} GB of the host's memory for each GPU"
        )
    return lines


def work_lines(config: TrainConfig, counts: memory.Counts, world_size: int) -> list[str]:
    """TFLOP and seconds of an iteration, under the recipe's own settings."""
    phases = memory.work(config, counts, config.parallel.activations, world_size)
    lines = [
        "one iteration, each GPU",
        f"  {'':<16}{'TFLOP':>12}{'bound s':>10}{'attention at its rates s':>26}",
    ]
    for name, w in phases.items():
        lines.append(f"  {name:<16}{tera(w.flop):>12}{w.bound:>10,.1f}{w.expected:>26,.1f}")
    flop, bound, expected = (
        sum(getattr(w, key) for w in phases.values()) for key in ("flop", "bound", "expected")
    )
    return [*lines, f"  {'all':<16}{tera(flop):>12}{bound:>10,.1f}{expected:>26,.1f}"]


def settings_lines(
    config: TrainConfig, counts: memory.Counts, room: float, world_size: int, gpus_per_node: int
) -> list[str]:
    """Which settings fit, best first, and the first of them."""
    columns = f"{'activations':<16}{'shard':<7}{'replicas':>9}{'keep_gathered':>15}{'cpu_offload':>13}{'peak GB':>10}{'in':>9}{'bound s':>10}"
    lines, best = [f"settings, against {giga(room)} GB", f"  {columns}"], None
    for cfg in memory.candidates(config, world_size, gpus_per_node):
        phase, needed = memory.peak(memory.memory(config, counts, cfg, world_size))
        seconds = sum(
            w.bound for w in memory.work(config, counts, cfg.activations, world_size).values()
        )
        fits = needed <= room
        best = best or (cfg if fits else None)
        lines.append(
            f"  {cfg.activations:<16}{cfg.shard:<7}{cfg.replicas:>9}{str(cfg.keep_gathered).lower():>15}{str(cfg.cpu_offload).lower():>13}"
            f"{giga(needed):>10}{phase:>9}{seconds:>10,.1f}  {'-' if not fits else 'fits' if needed <= 0.9 * room else 'fits, closely'}"
        )
    phase, needed = memory.peak(
        memory.memory(config, counts, memory.resolve(config.parallel, world_size), world_size)
    )
    advice = (
        ["", f"as configured, the decode needs most: {memory.SMALLER_DECODE} would lower it"]
        if phase == "decode" and needed > room
        else []
    )
    if best is None:
        return [
            *lines,
            *advice,
            "",
            "nothing fits: more GPUs, a LoRA (policy.lora), or a smaller video",
        ]
    return [*lines, *advice, "", f"recommended: {memory.describe(best)}"]


def assumptions(config: TrainConfig) -> list[str]:
    """What the numbers stand on."""
    judge = getattr(config.reward, "memory_bytes", 0)
    dtype = "fp32" if config.runtime.compute_dtype == "fp32" else "bf16"
    forward, backward = (f"{rate / 1e12:.0f}" for rate in memory.ATTENTION_RATES)
    return [
        "assumed:",
        f"  {memory.RESERVE / 1e9:.0f} GB of each GPU for CUDA, the libraries' workspaces, NCCL and the allocator's gaps; GB are 1e9 bytes",
        f"  compute in {dtype}; attention that keeps no scores; Triton's pointwise operations where policy.fused is true or auto",
        "  texts of the greatest length; no parallel.compile, which keeps less; the text encoder freed before training",
        "  bytes counted on diffusers' modules on the meta device: block by block, live tensors at the worst moment",
        f"  bound: everything at {memory.MATMUL_RATE / 1e12:.0f} TFLOP/s, as measured on an H100 in bf16; an fp32 VAE is slower",
        f"  attention's own rates: {forward} forward, {backward} backward (torch's cuDNN attention, published), all else as in the bound",
        "  no time for pointwise work, communication, offloading, optimizer or a judge",
        f"  judge: {judge / 1e9:.1f} GB on this GPU"
        + ("" if judge else " (its class names no memory_bytes)"),
    ]


def giga(value: float) -> str:
    """In units of 1e9."""
    return number(value / 1e9, 2)


def tera(value: float) -> str:
    """In units of 1e12."""
    return number(value / 1e12, 1)


def number(value: float, digits: int) -> str:
    """With so many digits after the point, or with two that count where those would all be 0."""
    return f"{value:,.{digits}f}" if value >= 10**-digits or not value else f"{value:.1e}"
