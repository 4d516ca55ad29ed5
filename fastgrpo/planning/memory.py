"""What a recipe needs of a GPU's memory and arithmetic, phase by phase: estimated from the counts
of `meta_model` before anything is allocated.

Bytes are of one rank, and of tensors. What CUDA, NCCL, cuDNN and the allocator take besides is
`RESERVES`. GB and TFLOP are 1e9 and 1e12.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from fastgrpo.config import ParallelConfig, TrainConfig
from fastgrpo.errors import UserError, require
from fastgrpo.planning import meta_model
from fastgrpo.planning.meta_model import META, Cost, Network, NotPlannableError

ACTIVATIONS: tuple[Literal["none", "keep_attention", "full"], ...] = (
    "none",
    "keep_attention",
    "full",
)
ELSEWHERE = "a judge on another GPU (of TransformersEngine: device) or served"
RESERVES = {
    "CUDA's context, modules": 0.7e9,  # some 0.5 GB for torch's own kernels, and Triton's
    "libraries' workspaces": 0.8e9,  # 32 MB a stream for cuBLAS on an H100; cuDNN's convolutions
    "NCCL": 1.0e9,  # buffers of each communicator's channels: world, shards, replicas
    "allocator's gaps": 1.5e9,  # blocks too small for what comes; the judge's stream has its own
}
"""Bytes besides tensors, which `plan` and the trainer hold against a GPU's memory. Estimates."""
RESERVE = sum(RESERVES.values())
MATMUL_RATE = 798e12
"""FLOP/s, bf16 dense: matrix products of 8192, measured on one H100."""
TF32_RATE = MATMUL_RATE / 2
"""FLOP/s of a VAE in fp32, whose convolutions run in TF32 (cuDNN's default in torch)."""
FP32_RATE = 60e12
"""FLOP/s of matrix products in fp32, which torch leaves without tensor cores; 67e12 are published
for an H100.
"""
ATTENTION_RATES = 600e12, 515e12
"""FLOP/s of attention on an H100, forward and backward, as published for torch's cuDNN attention at
head dimension 128.
"""
COPY_RATE = 3.0e12
"""Bytes/s that a copy reads and writes, measured on one H100."""

Phases = dict[str, dict[str, float]]
"""Bytes by phase (rollout, decode, update, step) and by what they are."""


@dataclass(frozen=True)
class Counts:
    """A recipe's network and sizes in numbers.

    Attributes:
        network: The trained network.
        velocity: velocity(activations, gathered): the cost of one branch for one micro-batch, see
            `meta_model.velocity_cost`; computed when it is first asked for.
        decode: The cost of the decode of one video.
        decode_rate: FLOP/s of the decode.
        frames: Bytes of one decoded video.
        latent: Bytes of one latent.
        conditioning: Bytes of one prompt's conditioning.
        vae: Bytes of what decodes.
        judge: Bytes of a judge on this GPU.
        judge_work: Bytes that it takes besides while it scores, on its own threads.
    """

    network: Network
    velocity: Callable[[str | None, bool], Cost]
    decode: Cost
    decode_rate: float
    frames: int
    latent: int
    conditioning: int
    vae: int
    judge: float
    judge_work: float


class Work(NamedTuple):
    """What one rank computes in one iteration.

    Attributes:
        flop: FLOP.
        bound: Seconds if all ran at the rate of matrix products: nothing can be faster.
        expected: Seconds with attention at its own rates, other FLOP at that of matrix products,
            and the decode's pointwise operations at that of a copy: what good kernels come near
            to.
    """

    flop: float
    bound: float
    expected: float

    @classmethod
    def of(
        cls, linear: float, forward: float, backward: float, rate: float, moved: float = 0.0
    ) -> Work:
        """Of so many FLOP in matrix products, in attention forward and in attention backward.

        Args:
            linear, forward, backward: FLOP.
            rate: FLOP/s of matrix products. Attention is slower in the same measure as in bf16.
            moved: Bytes of pointwise operations.
        """
        flop, share = linear + forward + backward, rate / MATMUL_RATE
        attention = forward / ATTENTION_RATES[0] + backward / ATTENTION_RATES[1]
        expected = linear / rate + attention / share + moved / COPY_RATE
        return cls(flop, flop / rate, expected)


def count(config: TrainConfig) -> Counts:
    """Run the recipe's networks on the meta device, as on a GPU with Triton.

    Raises:
        NotPlannableError: The policy cannot be planned.
        ValueError, FileNotFoundError: Its model cannot be had, or cannot make this size.
    """
    roll, policy = config.rollout, config.policy
    shape = policy.latent_shape(roll.height, roll.width, roll.num_frames)
    twin, conditioning = meta_model.load_meta(policy)
    latents = torch.empty(roll.micro_batch_size, *shape, device=META)
    dtype = torch.float32 if config.runtime.compute_dtype == "fp32" else torch.bfloat16

    @functools.cache
    def velocity(activations: str | None, gathered: bool) -> Cost:
        return meta_model.velocity_cost(
            twin, conditioning, latents, dtype, activations=activations, gathered=gathered
        )

    vae, reward = vars(twin).get("vae"), config.reward
    weights = [] if vae is None else [*vae.parameters()]
    in_bf16 = bool(weights) and all(weight.dtype == torch.bfloat16 for weight in weights)
    videos = torch.empty(
        roll.micro_batch_size, roll.num_frames, 3, roll.height, roll.width, device=META
    )
    return Counts(
        network=meta_model.network_of(twin.transformer),
        velocity=velocity,
        decode=meta_model.decode_cost(twin, shape),
        decode_rate=MATMUL_RATE if in_bf16 else TF32_RATE,
        frames=videos[0].nbytes,
        latent=4 * math.prod(shape),
        conditioning=sum(tensor.nbytes for tensor in conditioning.values()),
        vae=sum(weight.nbytes for weight in weights),
        judge=reward.memory_bytes,
        judge_work=reward.concurrency * reward.working_bytes(videos, policy.fps),
    )


def resolve(cfg: ParallelConfig, world_size: int) -> ParallelConfig:
    """The settings with `shard: auto` as it comes out on GPUs.

    Raises:
        ValueError: Settings that do not go together, as `sharding.shards` says.
    """
    divides = world_size % cfg.replicas == 0
    expected = f"a divisor of the world size {world_size}"
    require(divides, "parallel.replicas", expected, cfg.replicas)
    if cfg.shard != "auto":
        return cfg
    return dataclasses.replace(cfg, shard="full" if world_size > 1 else "none")


def memory(config: TrainConfig, counts: Counts, cfg: ParallelConfig, world_size: int) -> Phases:
    """Bytes on one GPU.

    Args:
        config: The recipe; its parallel settings are not read.
        counts: Of this recipe.
        cfg: The parallel settings, with `shard` resolved.
        world_size: Number of GPUs.
    """
    network, update, roll = counts.network, config.update, config.rollout
    sharded = cfg.shard == "full"
    element = 4 if config.runtime.compute_dtype == "fp32" else 2
    prompts, size = math.ceil(roll.num_prompts / world_size), roll.micro_batch_size
    videos, steps = prompts * roll.num_generations, roll.num_inference_steps
    # The evaluation samples as many videos at a time as fill micro-batches.
    most_videos = max(videos, math.lcm(size, config.evaluation.num_generations))

    # What stays: the master weights and all that has their shape lie in equal parts on the ranks.
    part = world_size // cfg.replicas if sharded else 1
    weights, trained = (
        0 if cfg.cpu_offload else 4 * n / part for n in (network.parameters, network.trained)
    )
    has_lora = network.trained < network.parameters
    copies = bool(update.ema_decay) + (bool(update.kl_coef) and not has_lora)
    state = {
        "fp32 weights": weights,
        "Adam": 2 * trained,
        "copies (EMA, KL reference)": copies * trained,
        "VAE": counts.vae,
        "judge": counts.judge,
        "trajectories": most_videos * ((steps + 1) * counts.latent + 4 * steps)
        + (prompts + 1) * counts.conditioning,
    }
    # A block, the next one on its way, and the buffer it arrives in. What is in no block stays from
    # the beginning of the forward pass to its end.
    passing = element * (network.root + min(3 * network.block, network.parameters)) * sharded
    arriving = min(2 * network.block, network.parameters)
    everything = element * network.parameters if sharded and cfg.keep_gathered else 0
    # Not reduced yet, gradients are whole; the last backward frees them block by block while it
    # fills the shards.
    whole = sharded and cfg.reduce_every == "step"
    forward, train = counts.velocity(None, sharded), counts.velocity(cfg.activations, sharded)
    branches = 2 if roll.guidance_scale != 1 else 1
    graphs = 1 if update.branchwise else branches
    pending = size * max(config.scoring.max_pending, config.reward.concurrency)
    # The judge scores while the next videos are sampled and decoded.
    judging = {
        "frames that wait for the judge": min(pending, videos) * counts.frames,
        "judge at work": counts.judge_work,
    }
    # Videos are decoded one by one, then stacked, then copied once more (training/decode.py).
    decoding = max(
        counts.decode.kept + counts.decode.work + (size - 1) * counts.frames,
        2 * size * counts.frames,
    )
    # The state before and after a step and the first one, and the velocities of a step and of the
    # shared first one.
    states = size * ((2 * branches + 3) * counts.latent + counts.conditioning)
    phases = {
        "rollout": {
            "gathered weights": max(passing, everything + element * arriving * bool(everything)),
            "forward": forward.kept + forward.work + states,
            **judging,
        },
        "decode": {
            "gathered weights": everything,
            "decode": decoding,
            **judging,
        },
        "update": {
            "gradients": 4 * network.trained if whole else trained,
            "gathered weights": passing,
            # In bf16, and in fp32 on their way to the ranks.
            "gradients of a block": (element + 4)
            * (network.trained / network.parameters)
            * network.block
            * sharded,
            "activations": graphs * train.kept + train.work + states,
        },
        "step": {
            "gradients": trained,
            "gradients' reduction": 4 * network.trained * (not sharded and world_size > 1),
        },
    }
    return {phase: state | parts for phase, parts in phases.items()}


def peak(phases: Phases) -> tuple[str, float]:
    """The phase that needs most, and its bytes."""
    sums = {name: sum(parts.values()) for name, parts in phases.items()}
    return max(sums.items(), key=lambda item: item[1])


def work(config: TrainConfig, counts: Counts, activations: str, world_size: int) -> dict[str, Work]:
    """What one rank computes in one iteration, by phase."""
    roll, update, size = config.rollout, config.update, config.rollout.micro_batch_size
    rate = FP32_RATE if config.runtime.compute_dtype == "fp32" else MATMUL_RATE
    prompts = math.ceil(roll.num_prompts / world_size)
    videos, kept = prompts * roll.num_generations, prompts * (update.num_best + update.num_worst)
    branches = 2 if roll.guidance_scale != 1 else 1
    forward, train = counts.velocity(None, True), counts.velocity(activations, True)

    # Videos that start from the same noise share the first step's forward pass.
    shared = 0
    if roll.share_first_step and roll.same_noise:
        shared = prompts * (math.ceil(roll.num_generations / size) - 1) * size
    forwards = branches * (videos * roll.num_inference_steps - shared) / size

    passes = kept * trained_steps(config) / size
    trained = branches if update.cfg_grad == "both" else 1
    # Forward passes without a backward pass, per pass of the update.
    again: float = branches - trained + (branches if update.kl_coef else 0)
    if update.branchwise and branches == 2 and trained == 2:
        # Only the first optimizer step, and none with a KL, knows its gradient before any forward.
        again += 1.0 if update.kl_coef else 1 - 1 / update.optimizer_steps
    backward = 2.5 * forward.attention if activations is not None else 0.0
    return {
        "rollout": Work.of(forwards * forward.linear, forwards * forward.attention, 0.0, rate),
        "decode": Work.of(
            videos * counts.decode.linear,
            videos * counts.decode.attention,
            0.0,
            counts.decode_rate,
            videos * counts.decode.moved,
        ),
        "update": Work.of(
            passes * (trained * train.linear + again * forward.linear),
            passes * (trained * (train.attention - backward) + again * forward.attention),
            passes * trained * backward,
            rate,
        ),
    }


def trained_steps(config: TrainConfig) -> int:
    """Number of transitions that each chosen video trains."""
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
    replicas = dict.fromkeys((config.parallel.replicas, nodes, 1))
    full = ParallelConfig(shard="full", compile=config.parallel.compile)
    layouts = [dataclasses.replace(full, shard="none")]
    if world_size > 1:
        layouts[:0] = [
            dataclasses.replace(full, replicas=r, keep_gathered=keep, reduce_every=every)
            for keep in (True, False)
            for every in dict.fromkeys((config.parallel.reduce_every, "backward"))
            for r in replicas
            if world_size % r == 0
        ]
    return [
        dataclasses.replace(cfg, activations=activations)
        for group in (layouts, [dataclasses.replace(full, cpu_offload=True)])
        for activations in ACTIVATIONS
        for cfg in group
    ]


def settings(cfg: ParallelConfig) -> dict[str, str]:
    """The settings that decide what fits, as on the command line."""
    names = ("activations", "shard", "replicas", "keep_gathered", "reduce_every", "cpu_offload")
    return {name: str(getattr(cfg, name)).lower() for name in names}


def describe(cfg: ParallelConfig) -> str:
    """The settings as options of the command line."""
    return " ".join(f"--parallel.{name} {value}" for name, value in settings(cfg).items())


def smaller(config: TrainConfig, counts: Counts, phase: str, world_size: int) -> list[str]:
    """What besides `parallel` lowers the bytes of a phase, and changes nothing that is trained but
    the bits of a decode or of a batch.
    """
    policy, roll, size = config.policy, config.rollout, config.rollout.micro_batch_size
    videos = math.ceil(roll.num_prompts / world_size) * roll.num_generations
    least = config.reward.concurrency
    decodes, waits = phase == "decode", phase in ("rollout", "decode")
    fewer = size * least < min(size * config.scoring.max_pending, videos)
    return [
        words
        for applies, words in (
            (decodes and getattr(policy, "vae_tiling", None) is False, "policy.vae_tiling true"),
            (decodes and getattr(policy, "vae_dtype", None) == "fp32", "policy.vae_dtype bf16"),
            (phase != "step" and size > 1, "rollout.micro_batch_size 1"),
            (waits and fewer, f"scoring.max_pending {least}"),
            (counts.judge and not config.reward.component_names, ELSEWHERE),
        )
        if applies
    ]


def nothing_fits(config: TrainConfig) -> str:
    """What is left where no settings of `parallel` fit."""
    has_choice = getattr(config.policy, "lora", config.policy) is None
    return f"more GPUs, {'a LoRA (policy.lora), ' * has_choice}or a smaller video"


def check_fits(config: TrainConfig, gpu_memory_bytes: float, world_size: int) -> None:
    """Refuse, before anything is allocated, a recipe that does not fit into a GPU. A policy that
    cannot be planned is not checked.

    Raises:
        UserError: Names the phase, what it needs, and the settings to change.
    """
    try:
        counts = count(config)
    except NotPlannableError:
        return

    def needs(cfg: ParallelConfig) -> tuple[str, float]:
        return peak(memory(config, counts, cfg, world_size))

    phase, needed = needs(resolve(config.parallel, world_size))
    room = gpu_memory_bytes - RESERVE
    if needed <= room:
        return
    fitting = (describe(cfg) for cfg in candidates(config, world_size) if needs(cfg)[1] <= room)
    advice = next(fitting, f"{nothing_fits(config)}: no settings of `parallel` are enough")
    changes = [*smaller(config, counts, phase, world_size), advice]
    raise UserError(
        f"parallel: expected a recipe that fits into the {gpu_memory_bytes / 1e9:.1f} GB of a GPU, "
        f"but the {phase} of this one needs about {needed / 1e9:.1f} GB, and {RESERVE / 1e9:.1f} "
        f"GB for CUDA and NCCL, on each of {world_size} GPU(s). What to change: "
        f"{', or '.join(changes)} (`python -m fastgrpo plan` shows all of it)"
    )
