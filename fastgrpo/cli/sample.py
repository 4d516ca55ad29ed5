"""Generate the same captions from the same noise with the base and the trained weights of a run,
side by side.

Works for any checkpoint in one process, and under torchrun (`torchrun ... -m fastgrpo sample`),
each process its share of the captions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
import yaml
from fastgrpo_kernels import gaussian_noise, guided_velocity
from torch import Tensor

from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.config import RolloutConfig, TrainConfig
from fastgrpo.distributed import collectives, sharding
from fastgrpo.errors import fail
from fastgrpo.evaluation.report.contact_sheet import contact_sheet
from fastgrpo.interfaces import Policy, RewardModel
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training import checkpoint
from fastgrpo.training.config_file import parse_config
from fastgrpo.training.decode import decode
from fastgrpo.training.loop import compute_dtype
from fastgrpo.training.preflight import checked_prompts
from fastgrpo.training.rollout import start_rollout
from fastgrpo.training.sample_files import read_samples, save_samples
from fastgrpo.training.trajectory import branch_velocities
from fastgrpo.training.validation import ValidationSet, sample_validation

logger = logging.getLogger("fastgrpo")


def main(argv: list[str] | None = None) -> int:
    """The command line; exit code 2 with one message for a run, a checkpoint or captions that
    cannot be used.
    """
    parser = jsonargparse.ArgumentParser(prog="python -m fastgrpo sample", description=__doc__)
    parser.add_function_arguments(sample, as_group=False, as_positional=True)
    arguments = parser.parse_args(argv)
    try:
        folder = sample(**arguments.as_dict())
    except (ValueError, FileNotFoundError) as error:
        fail(error)
    logger.info(f"videos, stills, scores and comparison.png: {folder}")
    return 0


def sample(
    run: str,
    checkpoint_name: str = "latest",
    prompts: str | None = None,
    num_videos: int | None = None,
    num_inference_steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    sde: Literal["dance", "flow", "linear", "cps", "ode"] = "ode",
    scheduler: Literal["training", "pipeline"] = "training",
    scores: bool = True,
    seed: int | None = None,
    output: str | None = None,
) -> Path:
    """Sample with base and trained weights; returns the folder with `base/`, `trained/` and
    `comparison.png`.

    Args:
        run: a run folder. checkpoint_name: name of a checkpoint in it, such as iteration_000050;
            its average of the weights is sampled where it has one. prompts: text file, one
            caption a line; the run's validation captions if not given. num_videos: the first so
            many captions; all if not given. num_inference_steps: steps of the sampler; the run's
            if not given. height: pixels; the run's if not given. width: pixels; the run's if not
            given. num_frames: frames; the run's if not given. sde: sampler on the training
            schedule. scheduler: training: the schedule of training. pipeline: the scheduler that
            the model's own diffusers pipeline has; one process. scores: let the run's judge
            score the videos; where it cannot be had, they are sampled all the same, and a note
            says so. seed: of the noise; the run's if not given. output: folder for the videos,
            which take the place of an earlier call's; <run>/samples/<checkpoint>_<sampler> if
            not given.

    Raises:
        ValueError, FileNotFoundError: no such run or checkpoint, or a damaged one, or captions
            or sizes that the policy cannot take.
    """
    if num_videos is not None and num_videos < 1:
        raise ValueError(f"num_videos: expected at least 1, got {num_videos}")
    config, path = open_run(run, checkpoint_name, scores)
    shown = checked_prompts(
        config.policy, prompts or config.prompts.validation or config.prompts.train, "prompts"
    )[:num_videos]
    size = {
        "num_inference_steps": num_inference_steps,
        "height": height,
        "width": width,
        "num_frames": num_frames,
    }
    given: dict[str, Any] = {key: value for key, value in size.items() if value is not None}
    rollout = dataclasses.replace(
        config.rollout, sde=sde, sde_window="all", num_generations=1, **given
    )
    config.policy.latent_shape(rollout.height, rollout.width, rollout.num_frames)
    own_scheduler = pipeline_scheduler(config.policy, sde) if scheduler == "pipeline" else None
    own_group = not collectives.started()
    device = collectives.start(config.runtime)
    load(config, shown, device)
    policy, judge = config.policy, ScoringQueue(load_judge(config.reward, device))
    out = (
        Path(output)
        if output
        else Path(run) / "samples" / f"{path.name}_{'pipeline' if own_scheduler else sde}"
    )
    options: dict[str, Any] = {
        "seed": config.seed if seed is None else seed,
        "device": device,
        "compute_dtype": compute_dtype(config.runtime, device),
    }
    try:
        for name in ("base", "trained"):
            if name == "trained":
                checkpoint.load_weights(
                    path, policy.transformer, ema="ema" in checkpoint.parts(path)
                )
            if own_scheduler is None:
                validation = sample_validation(
                    policy, judge, shown, rollout, num_videos=len(shown), **options
                )
            else:
                validation = sample_with_scheduler(
                    policy, judge, shown, rollout, own_scheduler, **options
                )
            if collectives.rank() == 0:
                save(validation, out / name, policy, judge.reward)
    finally:
        judge.close()
    if collectives.rank() == 0:
        contact_sheet({"before": out / "base", "after": out / "trained"}, out / "comparison.png")
    # not after an error: the other ranks may wait in a collective, and leaving would wait for them
    if own_group:
        collectives.stop()
    return out


class Unscored:
    """No judge (interfaces.RewardModel): videos without stages, so without scores."""

    stages: tuple[str, ...] = ()

    def load(self, device: torch.device) -> None:
        """Nothing to load."""

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        """No score [B, 0] for any video."""
        return torch.empty(len(prompts), 0, dtype=torch.float64), torch.ones(
            len(prompts), dtype=torch.bool
        )


def open_run(run: str, checkpoint_name: str, with_judge: bool) -> tuple[TrainConfig, Path]:
    """The configuration of a run, and the folder of one of its checkpoints, verified.

    with_judge: without, or where the judge's class cannot be imported, `reward` is an Unscored.

    Raises:
        FileNotFoundError, ValueError: no such run or checkpoint, or a damaged one. SystemExit: a
            configuration that does not parse.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"run: expected a run folder with config.yaml, found none at {folder}"
        )
    path = (folder / "checkpoints" / checkpoint_name).resolve()
    checkpoint.verify(path)
    config = read_without_judge(folder / "config.yaml")
    said = io.StringIO()
    try:
        if with_judge:
            with contextlib.redirect_stderr(said):
                config, _, _ = parse_config(["--config", str(folder / "config.yaml")])
    except SystemExit:  # nothing but the judge is in question here
        logger.info(f"note: no scores, the run's judge cannot be had: {said.getvalue().strip()}")
    return config, path


def read_without_judge(path: Path) -> TrainConfig:
    """The configuration of a recipe or a run, whose judge, an Unscored in its place, need be
    neither installed nor loaded.

    Raises:
        ValueError: no YAML of keys and values. SystemExit: a configuration that does not parse.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config: cannot read {path} as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"config: expected keys and their values in {path}, got {str(values)[:60]}"
        )
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as without_judge:
        yaml.safe_dump(
            values | {"reward": {"class_path": f"{__name__}.{Unscored.__name__}"}}, without_judge
        )
        without_judge.flush()
        config, _, _ = parse_config(["--config", without_judge.name])
    return config


def load_judge(reward: RewardModel, device: torch.device) -> RewardModel:
    """The judge, loaded; an Unscored, and a note, where that fails on any rank."""
    problem = None
    try:
        reward.load(device)
    except Exception as error:  # whatever a judge's own loading raises, of a file or of a server
        problem = f"{type(error).__name__}: {error}"
    problems = [text for text in collectives.gather(problem) if text is not None]
    if not problems:
        return reward
    logger.info(f"note: no scores, the run's judge cannot be loaded: {problems[0]}")
    return Unscored()


def load(config: TrainConfig, prompts: Sequence[str], device: torch.device) -> None:
    """Bring the policy's base weights onto `device`, sharded over these processes as
    `parallel.shard` of the run says.
    """
    config.policy.embed(prompts, device)
    config.policy.load(device)
    placed = dataclasses.replace(
        config.parallel, replicas=1, cpu_offload=False, activations="none", compile=False
    )
    sharding.prepare(
        config.policy.transformer, placed, device, compute_dtype(config.runtime, device)
    )


def pipeline_scheduler(policy: Any, sde: str) -> Callable[[int, torch.device], Any]:
    """f(steps, device): the scheduler of the policy's diffusers pipeline, set to so many steps as
    the pipeline sets it.

    ValueError: a policy without such a pipeline, several processes, or an `sde`, which this
    scheduler has no use for.
    """
    import diffusers

    from fastgrpo.policies.model_files import fetch

    if not hasattr(policy, "model"):
        raise ValueError(
            f"scheduler: pipeline needs a model in diffusers' format, which {type(policy).__name__} does not name"
        )
    if sde != "ode" or collectives.world_size() > 1:
        raise ValueError("scheduler: pipeline samples in one process, and with sde ode")
    folder = fetch(policy.model, policy.revision, ("model_index.json", "scheduler/*"))
    index = diffusers.DiffusionPipeline.load_config(folder)
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(
        folder, subfolder="scheduler"
    )

    def set_to(steps: int, device: torch.device) -> Any:
        if index["_class_name"] == "HunyuanVideoPipeline":
            scheduler.set_timesteps(sigmas=[1.0 - i / steps for i in range(steps)], device=device)
        else:
            scheduler.set_timesteps(steps, device=device)
        return scheduler

    return set_to


@torch.no_grad()
def sample_with_scheduler(
    policy: Policy,
    judge: ScoringQueue,
    prompts: list[str],
    cfg: RolloutConfig,
    scheduler: Callable[[int, torch.device], Any],
    *,
    seed: int,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> ValidationSet:
    """As `sample_validation`, from the same noise, with a scheduler of diffusers
    (`pipeline_scheduler`); one video at a time.
    """
    options: dict[str, Any] = {
        "seed": derive_seed(seed, "validation"),
        "iteration": 0,
        "device": device,
        "compute_dtype": compute_dtype,
    }
    videos, video = [], torch.tensor([0])
    for number, prompt in enumerate(prompts):
        # One by one: a rollout has room for all the states of its videos, 0.3 GB each at 50 steps
        # of 53 frames of 480 x 832.
        rollout = start_rollout(policy, [prompt], cfg, first_slot=number, **options)
        steps = scheduler(
            cfg.num_inference_steps, device
        )  # anew for every video: it keeps what its last steps predicted
        rollout.timesteps = steps.timesteps.double().cpu()
        latents = gaussian_noise(rollout.first_seeds, 0, rollout.latent_shape, device)
        for step, timestep in enumerate(steps.timesteps):
            velocities = branch_velocities(policy, rollout, latents, video, torch.tensor([step]))
            latents = steps.step(
                guided_velocity(*velocities, cfg.guidance_scale),
                timestep,
                latents,
                return_dict=False,
            )[0]
        frames = decode(policy, latents)
        judge.submit(frames, [prompt], policy.fps)
        videos.append((frames[0].nan_to_num() * 255).round().to(torch.uint8).cpu())
    return ValidationSet(prompts, *judge.collect(1), torch.stack(videos))


def save(validation: ValidationSet, folder: Path, policy: Policy, reward: RewardModel) -> None:
    """Write videos, stills and, of a judge, scores to `folder`, in place of those of an earlier
    call, and print the mean of each stage.
    """
    if (folder / "samples.json").is_file():
        for sample in read_samples(folder)["samples"]:
            for key in ("video", "still"):
                (folder / sample[key]).unlink(missing_ok=True)
    scores, stages = (validation.scores_shown, reward.stages) if reward.stages else (None, None)
    save_samples(folder, validation.videos, validation.prompts_shown, policy.fps, scores, stages)
    if stages is not None:
        means = validation.stage_means(len(stages))
        print(
            f"{folder.name:<8}"
            + "  ".join(f"{stage} {m:.3f}" for stage, m in zip(stages, means, strict=True))
        )
