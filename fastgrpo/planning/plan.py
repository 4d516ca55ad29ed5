"""The plan of a recipe as text: network, memory by phase, arithmetic, and the settings that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tabulate import tabulate

from fastgrpo.config import ParallelConfig, TrainConfig
from fastgrpo.planning import memory
from fastgrpo.planning.memory import Counts


@dataclass(frozen=True)
class Cluster:
    """The GPUs to plan for.

    Attributes:
        gpu_memory: Bytes of one GPU.
        world_size: Number of GPUs.
        gpus_per_node: GPUs of one node.
    """

    gpu_memory: float
    world_size: int
    gpus_per_node: int


def plan(config: TrainConfig, cluster: Cluster) -> str:
    """The whole plan.

    Raises:
        ValueError, FileNotFoundError: As `memory.count` and `memory.resolve`.
    """
    counts = memory.count(config)
    cfg = memory.resolve(config.parallel, cluster.world_size)
    return "\n\n".join(
        [
            _network_lines(config, counts, cluster.world_size),
            _activation_table(counts, cfg.shard == "full"),
            memory_table(config, counts, cfg, cluster.world_size),
            _work_table(config, counts, cluster.world_size),
            settings_table(config, counts, cluster),
            _assumptions(config, counts),
        ]
    )


def _network_lines(config: TrainConfig, counts: Counts, world_size: int) -> str:
    """The recipe's size, and what one forward pass and one decode cost."""
    network, roll, forward = counts.network, config.rollout, counts.velocity(None, True)
    size, decode = roll.micro_batch_size, counts.decode
    return (
        f"{config.name} on {world_size} GPU(s): "
        f"{roll.num_frames} frames of {roll.height} x {roll.width}, "
        f"{roll.num_prompts} prompts x {roll.num_generations} videos\n"
        f"parameters        {network.parameters / 1e6:,.1f} M, "
        f"trained {network.trained / 1e6:,.1f} M, {network.num_blocks} blocks\n"
        f"one forward       {_tera(forward.linear / size)} TFLOP linear + "
        f"{_tera(forward.attention / size)} attention per video and branch\n"
        f"VAE decode        {_tera(decode.flop)} TFLOP and "
        f"{_giga(decode.kept + decode.work)} GB per video, {_vae(config)}"
    )


def _vae(config: TrainConfig) -> str:
    """How the VAE decodes, as far as the policy says."""
    policy: Any = config.policy
    parts = ["one at a time"]
    if hasattr(policy, "vae_dtype"):
        parts += [f"in {policy.vae_dtype}", "in tiles" if policy.vae_tiling else "untiled"]
    return ", ".join(parts)


def _activation_table(counts: Counts, sharded: bool) -> str:
    """What the backward pass keeps and computes under each setting of `parallel.activations`."""
    costs = {name: counts.velocity(name, sharded) for name in memory.ACTIVATIONS}
    rows = [(name, _giga(c.kept), _giga(c.work), _tera(c.flop)) for name, c in costs.items()]
    title = "one branch, forward and backward pass of a micro-batch"
    return table(title, ("activations", "kept GB", "+ work GB", "TFLOP"), rows)


def memory_table(config: TrainConfig, counts: Counts, cfg: ParallelConfig, world_size: int) -> str:
    """GB per GPU by phase, under the recipe's own settings."""
    phases = memory.memory(config, counts, cfg, world_size)
    names = dict.fromkeys(name for parts in phases.values() for name in parts)
    rows = [(name, *(_giga(parts.get(name, 0)) for parts in phases.values())) for name in names]
    sums = [sum(parts.values()) for parts in phases.values()]
    rows.append(("peak of the tensors", *map(_giga, sums)))
    rows.append(("with the reserve", *(_giga(total + memory.RESERVE) for total in sums)))
    title = f"GB on each GPU as configured ({memory.describe(cfg)})"
    text = table(title, ("", *phases), rows)
    if cfg.cpu_offload:
        on_gpu = memory.memory(config, counts, replace(cfg, cpu_offload=False), world_size)
        host = _giga(sum(on_gpu["step"].values()) - sum(phases["step"].values()))
        text += f"\n  and {host} GB of the host's memory for each GPU"
    return text


def _work_table(config: TrainConfig, counts: Counts, world_size: int) -> str:
    """TFLOP and seconds of an iteration, under the recipe's own settings."""
    phases = memory.work(config, counts, config.parallel.activations, world_size)
    phases["all"] = memory.Work(*map(sum, zip(*phases.values(), strict=True)))
    rows = [
        (name, _tera(work.flop), f"{work.bound:,.1f}", f"{work.expected:,.1f}")
        for name, work in phases.items()
    ]
    head = ("", "TFLOP", "bound s", "expected s")
    return table("one iteration, each GPU", head, rows)


def settings_table(config: TrainConfig, counts: Counts, cluster: Cluster) -> str:
    """Which settings fit, best first, and the first that does."""
    room, world_size = cluster.gpu_memory - memory.RESERVE, cluster.world_size
    rows, best = [], None
    for cfg in memory.candidates(config, world_size, cluster.gpus_per_node):
        phase, needed = memory.peak(memory.memory(config, counts, cfg, world_size))
        work = memory.work(config, counts, cfg.activations, world_size)
        if needed <= room:
            best = best or cfg
        rows.append(
            (
                *memory.settings(cfg).values(),
                _giga(needed),
                phase,
                f"{sum(w.bound for w in work.values()):,.1f}",
                "fits" if needed <= 0.9 * room else "fits, closely" if needed <= room else "-",
            )
        )
    head = [*memory.settings(config.parallel), "peak GB", "in", "bound s", ""]
    lines = [table(f"settings, against {_giga(room)} GB", head, rows), ""]
    own = memory.resolve(config.parallel, world_size)
    phase, needed = memory.peak(memory.memory(config, counts, own, world_size))
    changes = memory.smaller(config, counts, phase, world_size)
    if phase == "decode" and changes and needed > room:
        lines.append(
            f"as configured, the decode needs most: {', or '.join(changes)} would lower it\n"
        )
        changes = []
    advice = f"nothing fits: {', or '.join([*changes, memory.nothing_fits(config)])}"
    lines.append(f"recommended: {memory.describe(best)}" if best else advice)
    prompts = config.rollout.num_prompts
    if prompts % world_size:
        lines.append(f"the trainer takes a number of GPUs that divides the {prompts} prompts")
    return "\n".join(lines)


def _assumptions(config: TrainConfig, counts: Counts) -> str:
    """What the numbers stand on."""
    dtype = "fp32" if config.runtime.compute_dtype == "fp32" else "bf16"
    forward, backward = (f"{rate / 1e12:.0f}" for rate in memory.ATTENTION_RATES)
    rates = (memory.MATMUL_RATE, memory.TF32_RATE, memory.FP32_RATE)
    bf16, tf32, fp32 = (f"{rate / 1e12:.0f}" for rate in rates)
    copy = _tera(memory.COPY_RATE)
    reserve = ", ".join(f"{size / 1e9:.1f} {name}" for name, size in memory.RESERVES.items())
    judge = f"{counts.judge / 1e9:.1f} GB on this GPU, {counts.judge_work / 1e9:.2f} more at work"
    if not counts.judge:
        judge = "elsewhere (its class names no memory_bytes)"
    return f"""assumed:
  reserve: {memory.RESERVE / 1e9:.0f} GB of each GPU ({reserve})
  GB are 1e9 bytes; compute in {dtype}; attention keeps no scores
  Triton's pointwise operations, unless policy.fused is false
  texts of the greatest length; no parallel.compile, which keeps less
  the text encoder is freed before training
  bytes: counted on diffusers' modules on the meta device, live tensors at the worst moment
  bound: all at {bf16} TFLOP/s, as measured on an H100 in bf16; a VAE in fp32 at {tf32} (TF32), a
    forward in fp32 at {fp32}
  expected: attention at {forward} forward, {backward} backward (torch's cuDNN attention,
    published), and the decode's {_tera(counts.decode.moved)} TB of pointwise work at {copy} TB/s
  no time for other pointwise work, communication, offloading, optimizer or a judge
  judge: {judge}"""


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of cells under a title; the first and an unnamed last column are aligned left."""
    align = ["left"] + ["right"] * (len(head) - 2) + ["right" if head[-1] else "left"]
    text = tabulate(rows, head, tablefmt="plain", colalign=align, disable_numparse=True)
    return "\n".join([title, *(f"  {line.rstrip()}" for line in text.splitlines())])


def _giga(value: float) -> str:
    """In units of 1e9."""
    return number(value / 1e9, 2)


def _tera(value: float) -> str:
    """In units of 1e12."""
    return number(value / 1e12, 1)


def number(value: float, digits: int) -> str:
    """With `digits` decimals, or with two significant digits if those would all be 0."""
    return f"{value:,.{digits}f}" if value >= 10**-digits or not value else f"{value:.1e}"
