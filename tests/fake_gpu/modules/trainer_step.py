"""A whole `Trainer.step` on the GPU that is not there: the recipe's generator at its true width,
few layers, steps and videos.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

# Named by the recipes: imported once, before the forks.
import torch
import torch.distributed as dist
from fake_cuda import CUDA
from fake_gpu import FakeGPU
from faults import FAULTS
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.common import random_models
from fastgrpo.config import TrainConfig
from fastgrpo.distributed import sharding
from fastgrpo.interfaces import RewardModel
from fastgrpo.planning import memory, meta_model
from fastgrpo.policies.model_files import build_part
from fastgrpo.policies.pretrained import DTYPES
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training import rollout, step, update
from fastgrpo.training.loop import compute_dtype
from fastgrpo.training.step import Trainer

SMALL = {
    "rollout.num_inference_steps": 3,
    "rollout.num_generations": 2,
    "update.num_best": 1,
    "update.num_worst": 1,
    "update.timestep_fraction": 1.0,
    # Two optimizer steps: the second is off-policy.
    "update.optimizer_steps": 2,
    "evaluation.num_generations": 1,
    "parallel.replicas": 1,  # the recipes' two nodes are not here
    # The judge holds one video while the next is sampled and decoded.
    "scoring.max_pending": 1,
}


FP64_IN = frozenset({"uniform", "box_muller", "gaussian_kl"})
"""Functions whose fp64 is meant: the first noise, once per video, and the KL's sum of squares. With
a KL the backward pass has some too, where nobody can tell whose it is.
"""

STREAMS = ("blocks", "transformer_blocks", "single_transformer_blocks")
"""The lists of blocks that the latents' tokens go through."""


class SlowJudge(RewardModel):
    """Holds a video until the next one is decoded, or until all are: the most that can wait.

    Its first video is the better one. It is given what the decode makes: fp32 frames on the GPU.
    """

    stages = ("I", "II", "III")

    def __init__(self) -> None:
        self.videos: list[tuple[Any, ...]] = []
        self.may_answer = threading.Semaphore(0)

    def load(self, device: torch.device) -> None:
        """There is nothing to load."""

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        self.videos.append((*videos.shape, str(videos.dtype), videos.device.type))
        self.may_answer.acquire()
        scores = torch.full((len(prompts), 3), 0.9 / len(self.videos), dtype=torch.float64)
        return scores, torch.ones(len(prompts), dtype=torch.bool)


def run(
    model: str = "wan2.1_t2v_1.3b",
    layers: int = 2,
    world_size: int = 1,
    decode: bool = False,
    faults: Sequence[str] = (),
    options: dict[str, Any] = {},  # noqa: B006
) -> dict[str, Any]:
    """Build the trainer, run one step.

    Args:
        model: A key of `random_models.MODELS`.
        layers: Blocks in all.
        world_size: Ranks of a process group in which this one is rank 0 and the others are not
            there.
        decode: Run the VAE; otherwise the frames come out of nothing.
        faults: Keys of `FAULTS`, planted before the step.
        options: Of `train`, in place of the recipe's.

    Returns:
        JSON: `waits` by phase and place, `peaks` and `plan` by phase in bytes, `metrics` of the
        step, `videos` that reached the judge.
    """
    published = random_models.with_layers(random_models.MODELS[model], layers)
    given = SMALL | {"rollout.num_prompts": world_size} | options
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        config = random_models.recipe(model, published, place, CUDA, words)
        random_models.embed(config, published)
        join(world_size)  # after the texts, which each rank would only embed its share of
        policy: Any = config.policy
        if not decode:
            size = config.rollout.num_frames, 3, config.rollout.height, config.rollout.width
            policy.decode = lambda latents: latents.new_empty(len(latents), *size)
        dtype = compute_dtype(config.runtime, CUDA)
        products = {"rollout": dtype, "update": dtype, "decode": DTYPES[policy.vae_dtype]}
        fp64_in = FP64_IN | ({"autograd"} if config.update.kl_coef else set())
        with FakeGPU(products, fp64_in=fp64_in) as gpu:
            judge = SlowJudge()
            with gpu.during("build"):
                trainer = build(config, judge, dtype)
            with ExitStack() as planted:
                # The faults inside what counts: what they do counts for their phase.
                for name in faults:
                    planted.enter_context(FAULTS[name](trainer))
                planted.enter_context(phases(gpu, judge))
                metrics = trainer.step(1)
        planned = plan(config, world_size, decode)
    return {
        "waits": {phase: dict(places) for phase, places in gpu.waits.items()},
        "peaks": dict(gpu.peaks),
        "plan": planned,
        "metrics": {key: value for key, value in metrics.items() if _is_finite(value)},
        "videos": judge.videos,
        # A block as it is gathered, in bf16.
        "block": 2 * max(map(_num_parameters, sharding.blocks_of(config.policy.transformer))),
        "cpu_seconds": time.process_time(),
    }


def join(world_size: int) -> None:
    """A process group of ranks that all say what this one says."""
    os.environ |= {"WORLD_SIZE": str(world_size), "RANK": "0", "LOCAL_RANK": "0"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)

    def all_gather_object(values: list[Any], value: Any, group: Any = None) -> None:
        values[:] = [value] * len(values)

    dist.all_gather_object = all_gather_object


def build(config: TrainConfig, judge: RewardModel, dtype: torch.dtype) -> Trainer:
    """The policy without weights and the trainer on it, as `loop.py` makes them."""
    policy: Any = config.policy
    kinds, dtype_of_vae = policy.part_classes, DTYPES[policy.vae_dtype]
    # As on the ranks above 0: the transformer on the meta device.
    with torch.device("meta"):
        transformer = build_part(kinds["transformer"], policy.configs["transformer"])
    with CUDA:
        vae = build_part(kinds["vae"], policy.configs["vae"]).to(dtype_of_vae)
    policy.use(transformer, vae, CUDA)
    sharding.prepare(policy.transformer, config.parallel, CUDA, dtype)
    for name in meta_model.lists_of_blocks(policy.transformer):
        for block in policy.transformer.get_submodule(name) if name in STREAMS else ():
            block.register_forward_pre_hook(lambda _, args: check_stream(args[0], dtype))
    queue = ScoringQueue(judge, config.scoring.max_pending)
    return Trainer(config, policy, queue, [random_models.PROMPT] * 8, CUDA, dtype)


def check_stream(hidden_states: Tensor, dtype: torch.dtype) -> None:
    """What passes from block to block has the dtype of the forward pass: in fp32 it would take
    twice the memory and the traffic.
    """
    if hidden_states.dtype != dtype:
        got = hidden_states.dtype
        raise FakeGPU.Fault(f"wrong dtype: expected {dtype} between the blocks, got {got}")


@contextmanager
def phases(gpu: FakeGPU, judge: SlowJudge) -> Iterator[None]:
    """Count the parts of a step apart; let the judge answer when the next video is decoded."""
    decode, collect = step.decode, step.AbortableQueue.collect

    def decode_next(*args: Any) -> Tensor:
        with gpu.during("decode"):
            frames = decode(*args)
        if judge.videos:
            judge.may_answer.release()
        return frames

    def collect_all(*args: Any) -> Any:
        judge.may_answer.release()
        return collect(*args)

    with (
        mock.patch.object(step, "decode", decode_next),
        mock.patch.object(step.AbortableQueue, "collect", collect_all),
        mock.patch.object(step, "start_rollout", gpu.phased("start", step.start_rollout)),
        mock.patch.object(rollout, "_sample", gpu.phased("rollout", rollout._sample)),
        mock.patch.object(update, "backpropagate", gpu.phased("update", update.backpropagate)),
        mock.patch.object(update, "clip_gradients", gpu.phased("step", update.clip_gradients)),
        mock.patch.object(torch.optim.AdamW, "step", gpu.phased("step", torch.optim.AdamW.step)),
    ):
        yield


def plan(config: TrainConfig, world_size: int, decode: bool) -> dict[str, float]:
    """What `plan` says that each phase takes, in bytes."""
    if not decode:
        size = config.rollout.num_frames, 3, config.rollout.height, config.rollout.width
        meta_model.decode_cost = lambda *_: meta_model.Cost(kept=4.0 * math.prod(size))
        del vars(config.policy)["decode"]
    counts = memory.count(config)
    parallel = memory.resolve(config.parallel, world_size)
    by_phase = memory.memory(config, counts, parallel, world_size)
    return {phase: sum(parts.values()) for phase, parts in by_phase.items()}


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
