"""Sample the same prompts from the same noise with the base and the trained weights of a run."""

from __future__ import annotations

import logging
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastgrpo.config import TrainConfig
from fastgrpo.distributed import collectives
from fastgrpo.evaluation.options import ComparisonOptions
from fastgrpo.evaluation.report.contact_sheet import contact_sheet
from fastgrpo.interfaces import Policy, RewardModel
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training.loop import compute_dtype
from fastgrpo.training.preflight import checked_prompts
from fastgrpo.training.sample_files import save_samples
from fastgrpo.training.sampling import (
    Unscored,
    find_checkpoint,
    joined,
    keep_settings,
    load_base,
    load_judge,
    load_trained,
    pipeline_scheduler,
    read_config,
    read_run,
    sample_with_scheduler,
    sampling_settings,
)
from fastgrpo.training.trust import check_links
from fastgrpo.training.validation import ValidationSet, sample_validation

logger = logging.getLogger("fastgrpo")


def compare_weights(options: ComparisonOptions) -> Path:
    """Sample with base and trained weights.

    Returns:
        The folder with `base/`, `trained/`, `comparison.png` and sampling.json, what the videos
        were made with.

    Raises:
        ValueError, FileNotFoundError: There is no such run or checkpoint, or it is damaged, or the
            policy cannot take the prompts or sizes, or the folder holds other videos.
    """
    run = Path(options.run)
    built = {"policy", "prompts", "reward"}
    built -= {"reward"} if options.no_scores else set()
    built -= {"prompts"} if options.prompts else set()
    config = read_run(options.run, options.trust, built)
    path = find_checkpoint(options.checkpoint, run)
    policy, files = config.policy, config.prompts
    source = options.prompts or files.validation or files.train
    prompts = checked_prompts(policy, source, "prompts")[: options.num_videos]
    cfg = options.rollout(config)
    pipeline = options.scheduler == "pipeline"
    scheduler = pipeline_scheduler(policy, options.sde) if pipeline else None
    output = Path(options.output or run / "samples" / _folder_name(options, config, path))
    if not options.trust and not options.output:
        check_links(run, "samples")
    seed = config.seed if options.seed is None else options.seed
    with joined(config.runtime) as device:
        dtype = compute_dtype(config.runtime, device)
        made_with = sampling_settings(read_config(run)["policy"], cfg, path, dtype, seed)
        made_with["scheduler"] = options.scheduler
        made_with["prompts"] = sha256("\n".join(prompts).encode()).hexdigest()[:16]
        output.mkdir(parents=True, exist_ok=True)
        keep_settings(output, made_with)
        load_base(config, prompts, device)
        reward: RewardModel = Unscored()
        if not options.no_scores:
            reward = load_judge(run / "config.yaml", device)
        judge = ScoringQueue(reward)
        how: dict[str, Any] = {
            "seed": seed,
            "device": device,
            "compute_dtype": dtype,
        }
        try:
            for name in ("base", "trained"):
                if name == "trained":
                    load_trained(path, policy)
                if scheduler is None:
                    how["num_videos"] = len(prompts)
                    made = sample_validation(policy, judge, prompts, cfg, **how)
                else:
                    made = sample_with_scheduler(policy, judge, prompts, cfg, scheduler, **how)
                if collectives.rank() == 0:
                    save(made, output / name, policy, reward)
        finally:
            judge.close()
        if collectives.rank() == 0:
            folders = {"before": output / "base", "after": output / "trained"}
            contact_sheet(folders, output / "comparison.png")
    return output


def _folder_name(options: ComparisonOptions, config: TrainConfig, weights: Path) -> str:
    """<checkpoint>_<sampler>, and what else was asked for and is not as the run has it, so that
    videos made otherwise never share a name.
    """
    words = [weights.name, "pipeline" if options.scheduler == "pipeline" else options.sde]
    if options.prompts:
        words.append(Path(options.prompts).stem)
    own = {**vars(config.rollout), "seed": config.seed}
    for key in ("num_videos", "num_inference_steps", "height", "width", "num_frames", "seed"):
        value = getattr(options, key)
        if value is not None and value != own.get(key):
            words.append(f"{key.removeprefix('num_')}{value}")
    return "_".join(words)


def save(made: ValidationSet, folder: Path, policy: Policy, reward: RewardModel) -> None:
    """Write videos, stills and scores to `folder`, in place of those that an earlier call made
    alike, and log the mean of each stage.
    """
    scores, stages = (made.scores_shown, reward.stages) if reward.stages else (None, None)
    save_samples(folder, made.videos, made.prompts_shown, policy.fps, scores, stages)
    if stages:
        means = zip(stages, made.stage_means(len(stages)), strict=True)
        logger.info(f"{folder.name:<8}" + "  ".join(f"{s} {mean:.3f}" for s, mean in means))
