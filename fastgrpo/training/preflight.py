"""All checks before work starts: first those that need no other rank, then those of the job."""

from __future__ import annotations

import torch
from fastgrpo_kernels.dispatch import select_backend

from fastgrpo.algorithm.self_paced import check_pacing
from fastgrpo.config import TrainConfig
from fastgrpo.distributed import collectives, sharding
from fastgrpo.interfaces import Policy, RewardModel
from fastgrpo.planning.memory import check_fits
from fastgrpo.training.optimizer import import_fused_adam
from fastgrpo.training.prompts import read_prompts
from fastgrpo.training.tracking import check_trackers


def check_config(config: TrainConfig) -> tuple[list[str], list[str]]:
    """Check everything that can be known without weights and without the other ranks.

    Returns:
        The training prompts and the validation prompts.

    Raises:
        ValueError, FileNotFoundError: Names the key, what was expected and what it got.
    """
    cfg, ranks = config.rollout, collectives.world_size()
    check_pacing(config.pacing, len(config.reward.stages))
    check_attention(config.policy, config.reward)
    try:
        config.policy.latent_shape(cfg.height, cfg.width, cfg.num_frames)
    except ValueError as error:
        if str(error).startswith("policy."):  # the model is at fault, not the size
            raise
        raise ValueError(f"rollout.height, width, num_frames: {error}") from error
    if cfg.num_prompts % ranks:
        raise ValueError(
            f"rollout.num_prompts: expected a multiple of the {ranks} processes, which share them, "
            f"got {cfg.num_prompts}"
        )
    if config.update.optimizer == "apex_fused_adam":
        import_fused_adam()
    check_trackers(config.tracking.trackers)
    train_prompts = checked_prompts(config.policy, config.prompts.train, "prompts.train")
    validation = config.prompts.validation
    if validation is None:
        return train_prompts, train_prompts[: config.evaluation.num_videos]
    return train_prompts, checked_prompts(config.policy, validation, "prompts.validation")


def check_job(config: TrainConfig, config_yaml: str, device: torch.device) -> str:
    """Check what depends on the machine and on the other ranks. All ranks call this.

    Returns:
        The backend of fastgrpo_kernels that serves the SDE step and the loss.

    Raises:
        ValueError: The configuration does not suit this machine, or the ranks do not agree; then it
            names those that differ.
    """
    collectives.require_agreement("the configuration", config_yaml)
    check_sharding(config, device)
    if device.type == "cuda":
        check_fits(config, torch.cuda.mem_get_info(device)[1], collectives.world_size())
    # Refuses a backend that the user forced and that cannot serve this device.
    backend = select_backend("sde_step", torch.empty(0, device=device))
    collectives.require_agreement("the backend of the kernels", backend)
    return backend


def check_attention(policy: Policy, reward: RewardModel) -> None:
    """Check that the policy's attention does not reach into a judge of the same process.

    diffusers' `_native_...` backends, and `fa3` and `fa4` through them, switch torch's kernels by
    `sdpa_kernel`, which holds for all threads. Which kernel serves the judge's thread, or whether
    one does (FlashAttention takes no mask), would depend on the moment.

    Raises:
        ValueError: It does.
    """
    attention = policy.attention
    if attention not in ("fa3", "fa4") and not attention.startswith("_native_"):
        return
    # A judge on another GPU takes none of the trainer's memory, but its engine runs here too.
    if reward.memory_bytes or hasattr(getattr(reward, "engine", None), "attention"):
        raise ValueError(
            "policy.attention: expected native, or a backend outside torch, beside a judge in this "
            f"process, got {attention}, which switches torch's kernels for the judge's thread too; "
            "or serve the judge (fastgrpo.rewards.vlm.served.ServerEngine)"
        )


def check_sharding(config: TrainConfig, device: torch.device) -> None:
    """ValueError if the parameters cannot be sharded as configured."""
    if sharding.shards(config.parallel, device) and config.update.optimizer == "apex_fused_adam":
        raise ValueError(
            "update.optimizer: apex_fused_adam cannot step sharded parameters; use adamw, or set "
            "parallel.shard to none"
        )


def checked_prompts(policy: Policy, path: str, key: str) -> list[str]:
    """Read the prompts of a file or data set, and check that the policy can take each.

    Raises:
        ValueError, FileNotFoundError: Names `key` and `path`.
    """
    prompts = read_prompts(path, key)
    try:
        policy.check_prompts(prompts)
    except ValueError as error:
        raise ValueError(f"{key}: {error} ({path})") from error
    return prompts
