"""When the update takes the gradient for known, on one rank and sharded, and the untiled decode."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import CPU, PROMPTS, Recorder, moved, same_bits, small_rollout
from watched_update import Watched, backward_of

from fastgrpo.config import UpdateConfig
from fastgrpo.policies.pretrained import LoRA
from fastgrpo.policies.wan import WanPolicy
from fastgrpo.training.trajectory import Rollout
from fastgrpo.training.update import (
    TrainedTransition,
    backpropagate,
    known_gradients,
    micro_batch,
    trained_rows,
    update,
)

AT = [(0, 0, 1.5), (1, 2, -0.5), (3, 1, -7.0), (2, 3, 0.25), (0, 4, 1.5)]


TRANSITIONS = [TrainedTransition(*at) for at in AT]


ADVANTAGES = {0: 1.5, 1: -0.5, 2: -1.0, 3: 0.25}


@pytest.fixture(scope="module")
def make_wan(
    wan_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., WanPolicy]:
    """make_wan(lora): a loaded WanPolicy whose prompts are embedded, one for each `lora`."""
    cache = str(tmp_path_factory.mktemp("cache"))

    @functools.cache
    def loaded(lora: LoRA | None = None) -> WanPolicy:
        policy = WanPolicy(
            str(wan_folder), max_sequence_length=16, text_cache=cache, text_dtype="fp32", lora=lora
        )
        policy.embed(PROMPTS, CPU)
        policy.load(CPU)
        return policy

    return loaded


def sampled(policy: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Rollout:
    """Two prompts with two videos each, under guidance."""
    wan = {"height": 32, "width": 48, "num_frames": 9} if isinstance(policy, WanPolicy) else {}
    base = {"num_generations": 2, "micro_batch_size": 1, "guidance_scale": 3.0}
    return small_rollout(policy, dtype=dtype, **(wan | base | settings))


def test_only_until_a_weight_has_moved_is_the_gradient_taken_for_known(
    tiny_policy: Any, one_rank: Any
) -> None:
    policy, seen = tiny_policy(), {}
    rollout = sampled(policy)
    cfg = UpdateConfig(num_best=1, num_worst=1, clip_range=0.02, max_grad_norm=1e9)
    for branchwise in (True, False):
        trained = copy.deepcopy(policy)
        watched, optimizer = Watched(trained, rollout), Recorder(trained, 0.02)
        stats = update(
            watched,
            optimizer,
            rollout,
            [0, 1, 2, 3],
            ADVANTAGES,
            dataclasses.replace(cfg, branchwise=branchwise),  # type: ignore[arg-type]
        )
        seen[branchwise] = stats, optimizer.seen, watched.calls
    first = 2 * 3  # videos, and int(0.6 * 5) steps of each
    assert seen[True][2] == ["cond+", "uncond+"] * first + ["uncond", "cond+", "uncond+"] * first
    assert seen[False][2] == ["cond+", "uncond+"] * 2 * first
    for stats, _, _ in seen.values():
        assert stats.num_first == first
        assert stats.ratios[:first] == [1.0] * first
        assert 1.0 not in stats.ratios[first:]
    for one, other in zip(
        seen[True][1], seen[False][1], strict=True
    ):  # and on the whole the two train alike
        for p, q in zip(one, other, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-5 * q.abs().max().item())


@pytest.mark.parametrize("fault", ["state", "log-probability"])
def test_a_step_left_out_leaves_the_next_one_on_policy(
    tiny_policy: Any, one_rank: Any, fault: str
) -> None:
    """What is not finite shows in the loss, though not in the gradient that is known from the
    noise.
    """
    policy = tiny_policy()
    rollout = sampled(policy)
    (rollout.latents if fault == "state" else rollout.log_probs)[0] = math.nan
    watched: Any = Watched(policy, rollout)
    optimizer = Recorder(policy, 0.02)
    cfg = UpdateConfig(num_best=1, num_worst=1, max_grad_norm=1e9)
    stats = update(watched, optimizer, rollout, [0, 1, 2, 3], ADVANTAGES, cfg)
    assert stats.skipped == [True, False]
    assert watched.calls == ["cond+", "uncond+"] * 12
    assert stats.ratios[6:] == [1.0] * 6
    assert len(optimizer.seen) == 1
    assert all(torch.isfinite(g).all() for g in optimizer.seen[0])


def test_a_ratio_that_is_not_1_shows(tiny_policy: Any) -> None:
    """Then the gradient is that of ratio 1 all the same, and the statistics have the ratio that the
    forward gave.
    """
    base = tiny_policy()
    rollout, policy = sampled(base), moved(base, 0.02)
    (rows,) = trained_rows(rollout, TRANSITIONS[:1])
    batch = micro_batch(rollout, rows)
    watched = Watched(policy, rollout)
    _, (ratio, *_) = backpropagate(
        watched, rollout, rows, UpdateConfig(), None, scale=1 / 7.0, on_policy=True
    )  # type: ignore[arg-type]
    joint = backward_of(
        policy, rollout, TRANSITIONS[:1], UpdateConfig(branchwise=False), on_policy=True
    )
    assert ratio.tolist() == joint.stats.ratios != [1.0]
    expected = known_gradients(rollout, batch, UpdateConfig(), 1 / 7.0, torch.float32)
    own = [watched.gradients["cond"], watched.gradients["uncond"]]
    assert same_bits(own, expected)  # type: ignore[arg-type]


SHARDED = """
import json, torch
from conftest import TinyPolicy
from tiny_training import SMALL
from torch.distributed.tensor import DTensor
from fastgrpo.config import ParallelConfig, RolloutConfig, RuntimeConfig, UpdateConfig
from fastgrpo.distributed import collectives
from fastgrpo.distributed.sharding import prepare
from fastgrpo.training.rollout import sample_videos, start_rollout
from fastgrpo.training.update import TrainedTransition, UpdateStatistics, accumulate_gradients

device = collectives.start(RuntimeConfig(device="cpu"))
rank, found, prompts = collectives.rank(), {}, ["a cat", "a dog"]
size = {"num_generations": 2, "micro_batch_size": 1, "guidance_scale": 3.0}
cfg = RolloutConfig(**(SMALL | size))
orders = {"joint": (False, True), "known": (True, True), "off-policy": (True, False)}
# one rank has fewer
transitions = [TrainedTransition(*at) for at in AT][: 3 - 2 * rank]
for shard in ("none", "full"):
    policy = TinyPolicy()
    prepare(policy.transformer, ParallelConfig(shard=shard), device, torch.float32)
    at = {"seed": 3, "iteration": 1, "first_slot": 2 * rank, "device": device}
    rollout = start_rollout(policy, prompts, cfg, **at)
    for _ in sample_videos(policy, rollout):
        pass
    for name, (branchwise, on_policy) in orders.items():
        policy.transformer.zero_grad(set_to_none=True)
        policy.batch_sizes.clear()
        stats = UpdateStatistics(skipped=[] if on_policy else [False])
        update = UpdateConfig(branchwise=branchwise)
        accumulate_gradients(policy, rollout, transitions, 3, 7.0, update, None, stats)
        parameters = list(policy.transformer.parameters())
        collectives.average_gradients(parameters)
        own = [p.grad for p in parameters]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in own]
        gradients = [g.flatten().tolist() for g in whole]
        found[f"{shard} {name}"] = [gradients, stats.ratios, len(policy.batch_sizes)]
print(json.dumps(found))
collectives.stop()
"""


def test_sharded_ranks_keep_step_and_get_the_same_gradients(run_ranks: Any) -> None:
    """FSDP2 over two processes: each order of the branches against the joint backward of whole
    copies.
    """
    first, second = run_ranks(f"AT = {AT[:3]}\n{SHARDED}")
    expected = [torch.tensor(g) for g in first["none joint"][0]]
    for key, (gradients, ratios, forwards) in first.items():
        assert forwards == second[key][2] == (9 if "off-policy" in key else 6)
        assert gradients == second[key][0]
        assert ratios + second[key][1] == [1.0] * 4
        for one, other in zip(gradients, expected, strict=True):  # eps |x'| / (2 s) is about 1e-6
            torch.testing.assert_close(
                torch.tensor(one), other, rtol=0, atol=1e-5 * other.abs().max().item()
            )


def test_the_decode_is_the_untiled_fp32_one_and_tiles_blend(make_wan: Any) -> None:
    policy = make_wan()
    latents = torch.randn(2, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (
        torch.tensor(row)[:, None, None, None]
        for row in (policy.vae.config.latents_mean, policy.vae.config.latents_std)
    )
    assert not policy.vae.use_tiling
    untiled = policy.decode(latents)
    with torch.no_grad():
        exact = torch.cat([policy.vae.decode((x * std + mean)[None]).sample for x in latents])
    torch.testing.assert_close(
        untiled, (exact / 2 + 0.5).clamp(0, 1).transpose(1, 2), rtol=0, atol=1e-5
    )
    policy.vae.enable_tiling(32, 32, 24, 24)  # of 64 x 64 pixels
    assert (policy.decode(latents) - untiled).abs().max() > 1e-3
