"""What a recipe needs of a GPU's memory and arithmetic, phase by phase: estimated from `dry_run`'s
counts, before anything is allocated.

Bytes are of one rank, and of tensors: what CUDA, NCCL, cuDNN and the allocator take besides is
`RESERVE`. GB and TFLOP are 1e9 and 1e12.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from fastgrpo.config import ParallelConfig, TrainConfig
from fastgrpo.planning import meta_model
from fastgrpo.planning.meta_model import META, Cost, Network

ACTIVATIONS: tuple[Literal["none", "keep_attention", "full"], ...] = (
    "none",
    "keep_attention",
    "full",
)
SMALLER_DECODE = "policy.vae_tiling true or policy.vae_dtype bf16"
RESERVE = 4e9
"""Bytes for the CUDA context, the libraries' workspaces, NCCL's buffers and the allocator's gaps."""
MATMUL_RATE = 798e12
"""FLOP/s, bf16 dense: matrix products of 8192 measured on one H100."""
ATTENTION_RATES = 600e12, 515e12
"""FLOP/s of attention on an H100, forward and backward, as published for torch's cuDNN attention at
head dimension 128.
"""


@dataclass(frozen=True)
class Counts:
    """A recipe's network and sizes in numbers; costs are of one micro-batch (a decode: of one
    video) and run when first asked for.

    velocity(activations, gathered): one branch, see `meta_model.velocity_cost`. latent: bytes of
    one latent. fixed: bytes of what besides the network stays on the device: the VAE, and the
    judge where it says its `memory_bytes`.
    """

    network: Network
    velocity: Callable[[str | None, bool], Cost]
    decode: Cost
    latent: int
    conditioning: int
    fixed: int


@dataclass(frozen=True)
class Work:
    """FLOP of one rank in one iteration: products and convolutions, attention forward, attention
    backward.
    """

    linear: float
    attention_forward: float
    attention_backward: float

    @property
    def flop(self) -> float:
        return self.linear + self.attention_forward + self.attention_backward

    @property
    def bound(self) -> float:
        """Seconds, all at the rate of matrix products: nothing can be faster."""
        return self.flop / MATMUL_RATE

    @property
    def expected(self) -> float:
        """Seconds with attention at its own rates, and nothing else but products: what good kernels
        come near to.
        """
        return (
            self.linear / MATMUL_RATE
            + self.attention_forward / ATTENTION_RATES[0]
            + self.attention_backward / ATTENTION_RATES[1]
        )


def count(config: TrainConfig) -> Counts:
    """Run the recipe's networks on the meta device, as on a GPU with Triton.

    Raises:
        ValueError, FileNotFoundError: the policy cannot be planned, or not had, or cannot make
            this size.
    """
    cfg, policy = config.rollout, config.policy
    shape = policy.latent_shape(cfg.height, cfg.width, cfg.num_frames)
    twin, conditioning = meta_model.load_meta(policy)
    latents = torch.empty(cfg.micro_batch_size, *shape, device=META)
    dtype = torch.float32 if config.runtime.compute_dtype == "fp32" else torch.bfloat16

    @functools.cache
    def velocity(activations: str | None, gathered: bool) -> Cost:
        return meta_model.velocity_cost(
            twin, conditioning, latents, dtype, activations=activations, gathered=gathered
        )

    vae = getattr(twin, "vae", None)
    vae_bytes = 0 if vae is None else sum(p.numel() * p.element_size() for p in vae.parameters())
    return Counts(
        network=meta_model.network_of(twin.transformer),
        velocity=velocity,
        decode=meta_model.decode_cost(twin, shape),
        latent=4 * math.prod(shape),
        conditioning=sum(t.numel() * t.element_size() for t in conditioning.values()),
        fixed=vae_bytes + int(getattr(config.reward, "memory_bytes", 0)),
    )


def resolve(cfg: ParallelConfig, world_size: int) -> ParallelConfig:
    """`shard: auto` as it comes out on GPUs. ValueError: settings that do not go together, as
    `sharding.shards` says them.
    """
    shard: Literal["full", "none"] = (
        "full" if cfg.shard == "full" or (cfg.shard == "auto" and world_size > 1) else "none"
    )
    if world_size % cfg.replicas:
        raise ValueError(
            f"parallel.replicas: expected a divisor of the world size {world_size}, got {cfg.replicas}"
        )
    return dataclasses.replace(
        cfg, shard=shard
    )  # which refuses replicas or cpu_offload without sharding


def memory(
    config: TrainConfig, counts: Counts, cfg: ParallelConfig, world_size: int
) -> dict[str, dict[str, float]]:
    """Bytes on one GPU, by phase (rollout, decode, update, step) and by what they are.

    cfg: the parallel settings, instead of the recipe's; `shard` must be resolved.
    """
    network, update, roll = counts.network, config.update, config.rollout
    sharded, on_gpu = cfg.shard == "full", 0 if cfg.cpu_offload else 1
    ranks = world_size // cfg.replicas if sharded else 1
    element = 4 if config.runtime.compute_dtype == "fp32" else 2
    has_lora = network.trained < network.parameters
    videos = math.ceil(roll.num_prompts / world_size) * roll.num_generations
    copies = bool(update.ema_decay) + (bool(update.kl_coef) and not has_lora)
    state = {
        "fp32 weights": on_gpu * 4 * network.parameters / ranks,
        "Adam": on_gpu * 8 * network.trained / ranks,
        "copies (EMA, KL reference)": on_gpu * 4 * copies * network.trained / ranks,
        "VAE, judge": counts.fixed,
        "trajectories": videos
        * ((roll.num_inference_steps + 1) * counts.latent + 4 * roll.num_inference_steps)
        + (math.ceil(roll.num_prompts / world_size) + 1) * counts.conditioning,
    }
    # A block, the next one on its way, and the buffer it arrives in; what is in no block stays from
    # the forward's begin to its end.
    passing = (
        element * (network.root + min(3 * network.block, network.parameters)) if sharded else 0
    )
    everything = element * network.parameters if sharded and cfg.keep_gathered else 0
    gradients = {"gradients": on_gpu * 4 * network.trained / ranks}
    forward, train, decode = (
        counts.velocity(None, sharded),
        counts.velocity(cfg.activations, sharded),
        counts.decode,
    )
    branches = 2 if roll.guidance_scale != 1 else 1
    graphs = branches if not update.branchwise else 1
    share = network.trained / network.parameters
    pending = roll.micro_batch_size * max(
        config.scoring.max_pending, int(getattr(config.reward, "concurrency", 1))
    )
    waiting = {"frames that wait for the judge": min(pending, videos) * decode.kept}
    return {
        "rollout": state
        | {
            "gathered weights": max(passing, everything),
            "forward": forward.kept + forward.work + (branches + 2) * counts.latent,
        }
        | waiting,
        "decode": state
        | {"gathered weights": everything, "decode": decode.kept + decode.work}
        | waiting,
        "update": state
        | gradients
        | {
            "gathered weights": passing,
            # bf16 gradients of a block, and fp32 on their way to the ranks
            "gradients of a block": (element + 4) * share * network.block if sharded else 0,
            "activations": graphs * train.kept + train.work,
        },
        "step": state
        | gradients
        | {"gradients' reduction": 4 * network.trained if not sharded and world_size > 1 else 0},
    }


def peak(phases: dict[str, dict[str, float]]) -> tuple[str, float]:
    """The phase that needs most, and its bytes."""
    sums = {name: sum(parts.values()) for name, parts in phases.items()}
    return max(sums.items(), key=lambda item: item[1])


def host_bytes(config: TrainConfig, counts: Counts, cfg: ParallelConfig, world_size: int) -> float:
    """Bytes in the host's memory of one rank under `cpu_offload`: weights, gradients, Adam, copies."""
    whole = ParallelConfig(shard="full", replicas=cfg.replicas)
    offloaded = memory(config, counts, dataclasses.replace(whole, cpu_offload=True), world_size)
    return (
        sum(memory(config, counts, whole, world_size)["step"].values())
        - sum(offloaded["step"].values())
        if cfg.cpu_offload
        else 0.0
    )


def work(config: TrainConfig, counts: Counts, activations: str, world_size: int) -> dict[str, Work]:
    """What one rank computes in one iteration, by phase."""
    roll, update, size = config.rollout, config.update, config.rollout.micro_batch_size
    prompts = math.ceil(roll.num_prompts / world_size)
    videos, kept = prompts * roll.num_generations, prompts * (update.num_best + update.num_worst)
    branches = 2 if roll.guidance_scale != 1 else 1
    forward, train = counts.velocity(None, True), counts.velocity(activations, True)
    shared = (
        prompts * (math.ceil(roll.num_generations / size) - 1) * size
        if roll.share_first_step and roll.same_noise
        else 0
    )
    forwards = branches * (videos * roll.num_inference_steps - shared) / size
    passes = kept * trained_steps(config) / size
    trained = branches if update.cfg_grad == "both" else 1
    again: float = (
        branches - trained + (branches if update.kl_coef else 0)
    )  # forwards without a backward
    if update.branchwise and branches == 2 and trained == 2:
        # Only the first optimizer step, and none with a KL, knows its gradient before any forward.
        again += 1.0 if update.kl_coef else max(0, kept - update.gradient_accumulation) / kept
    backward = 2.5 * forward.attention if activations is not None else 0.0
    return {
        "rollout": Work(forwards * forward.linear, forwards * forward.attention, 0.0),
        "decode": Work(videos * counts.decode.linear, videos * counts.decode.attention, 0.0),
        "update": Work(
            passes * (trained * train.linear + again * forward.linear),
            passes * (trained * (train.attention - backward) + again * forward.attention),
            passes * trained * backward,
        ),
    }


def trained_steps(config: TrainConfig) -> int:
    """Transitions that each chosen video trains."""
    roll = config.rollout
    if roll.sde_window == "all":
        return max(1, int(config.update.timestep_fraction * (roll.num_inference_steps - 1)))
    return 1 if roll.sde_window == "single" else roll.window_size


def candidates(
    config: TrainConfig, world_size: int, gpus_per_node: int = 8
) -> list[ParallelConfig]:
    """Settings to choose from, best first: the least that is computed twice, then the least
    communication, offloading last.
    """
    nodes = max(1, world_size // gpus_per_node)
    replicas = [
        r for r in dict.fromkeys((config.parallel.replicas, nodes, 1)) if world_size % r == 0
    ]
    compiled = config.parallel.compile
    spread = [
        ParallelConfig(shard="full", replicas=r, keep_gathered=keep, compile=compiled)
        for keep in (True, False)
        for r in replicas
    ]
    alone = ParallelConfig(shard="none", compile=compiled)
    layouts = [*spread, alone] if world_size > 1 else [alone]
    offload = ParallelConfig(shard="full", cpu_offload=True, compile=compiled)
    return [
        dataclasses.replace(cfg, activations=a)
        for group in (layouts, [offload])
        for a in ACTIVATIONS
        for cfg in group
    ]


def describe(cfg: ParallelConfig) -> str:
    """The settings as options of the command line."""
    names = ("activations", "shard", "replicas", "keep_gathered", "cpu_offload")
    return " ".join(f"--parallel.{name} {str(getattr(cfg, name)).lower()}" for name in names)


def check_fits(config: TrainConfig, gpu_memory_bytes: float, world_size: int) -> None:
    """Refuse, before anything is allocated, what cannot fit into a GPU; the tensors alone are held
    against its memory, without RESERVE.

    A policy that cannot be planned is not checked.

    Raises:
        ValueError: names the phase, what it needs, and the settings to change.
    """
    if not meta_model.can_load_meta(config.policy):
        return
    counts, cfg = count(config), resolve(config.parallel, world_size)
    phase, needed = peak(memory(config, counts, cfg, world_size))
    if needed <= gpu_memory_bytes:
        return
    fitting = (
        c
        for c in candidates(config, world_size)
        if peak(memory(config, counts, c, world_size))[1] + RESERVE <= gpu_memory_bytes
    )
    best = next(fitting, None)
    advice = (
        "more GPUs, a LoRA (policy.lora), or a smaller video: no settings of `parallel` are enough"
        if best is None
        else describe(best)
    )
    if phase == "decode":
        advice = f"{SMALLER_DECODE}, or {advice}"
    raise ValueError(
        f"parallel: expected a recipe that fits into the {gpu_memory_bytes / 1e9:.1f} GB of a GPU, but the {phase} of this one needs about "
        f"{needed / 1e9:.1f} GB on each of {world_size} GPU(s). What to change: {advice} (`python -m fastgrpo plan` shows all of it)"
    )
