"""Sample videos outside of training: a run's configuration without its judge, the weights of a
checkpoint, and the scheduler of a model's own diffusers pipeline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from fastgrpo_kernels import gaussian_noise, guided_velocity
from torch import Tensor

from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.config import RolloutConfig, RuntimeConfig, TrainConfig
from fastgrpo.distributed import collectives, sharding
from fastgrpo.errors import UserError, require
from fastgrpo.files import atomic_write_text
from fastgrpo.interfaces import Policy, RewardModel
from fastgrpo.policies.text_cache import fingerprint
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training import checkpoint, run_folder
from fastgrpo.training.checkpoint_names import list_checkpoints
from fastgrpo.training.decode import decode
from fastgrpo.training.loop import compute_dtype
from fastgrpo.training.recipe_parser import parse_config
from fastgrpo.training.rollout import start_rollout
from fastgrpo.training.trajectory import branch_velocities
from fastgrpo.training.trust import (
    RECORD,
    check_links,
    check_trusted,
    is_made_here,
    read_mapping,
)
from fastgrpo.training.used_folder import require_run
from fastgrpo.training.validation import ValidationSet

logger = logging.getLogger("fastgrpo")

BASE = "base"
"""In place of a checkpoint: the weights that training starts from."""
WEIGHTS = ("model", "checkpoint", "base")
"""Arguments of a policy or a judge that name a hub id or a folder of weights."""


class Unscored(RewardModel):
    """In place of a judge: no stages, so no scores."""

    stages = ()

    def load(self, device: torch.device) -> None:
        """There is nothing to load."""

    def score(self, videos: Tensor, prompts: Sequence[str], fps: float) -> tuple[Tensor, Tensor]:
        """No score [B, 0] for any video."""
        count = len(prompts)
        return torch.empty(count, 0, dtype=torch.float64), torch.ones(count, dtype=torch.bool)


def open_run(run: str, name: str, trust: bool = False) -> tuple[TrainConfig, Path]:
    """The configuration of a run, without its judge, and the folder of one of its checkpoints; as
    `read_run` and `find_checkpoint`.
    """
    return read_run(run, trust), find_checkpoint(name, Path(run))


def find_checkpoint(name: str, folder: Path) -> Path:
    """The folder of the checkpoint of this name in a run folder, or of this path, verified; of the
    newest for `latest`.
    """
    saved = list_checkpoints(folder / "checkpoints")
    places = list(dict.fromkeys([folder / "checkpoints" / name, Path(name)]))
    # Not by the link of that name, which need not be there.
    for place in saved[:1] if name == "latest" else places:
        if place.is_dir():
            checkpoint.verify(place.resolve())
            return place.resolve()
    there = f"; there are {', '.join(path.name for path in saved)}" if saved else ""
    raise FileNotFoundError(
        f"checkpoint: expected a checkpoint, found none at {' or '.join(map(str, places))}{there}"
    )


def read_run(run: str, trust: bool = False, built: Collection[str] = ("policy",)) -> TrainConfig:
    """The configuration of a run, with an Unscored in place of its judge, which need not be
    installed.

    Args:
        run: The run folder.
        trust: Build whatever class the configuration names, and follow links that lead out of the
            folder, whoever made it.
        built: The sections whose classes and files the command will use.

    Raises:
        FileNotFoundError, UserError: There is no config.yaml, or it is no YAML of keys and values;
            or the folder is not to be used without `trust`.
        SystemExit: The configuration does not parse.
    """
    folder = Path(run)
    if not trust:
        check_links(folder, *RECORD)
        if not is_made_here(folder):  # else checkpoints may lie on another disk: they are only read
            check_links(folder, "checkpoints")
    values = read_config(folder)
    if not trust:
        check_trusted(folder, values, built)
    judge = {"class_path": f"{__name__}.{Unscored.__name__}"}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as without_judge:
        yaml.safe_dump(values | {"reward": judge}, without_judge)
        without_judge.flush()
        return parse_config(["--config", without_judge.name])[0]


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml of a run folder.

    Raises:
        FileNotFoundError, UserError: There is none, or it is no YAML of keys and values.
    """
    require_run(folder)
    return read_mapping(folder / "config.yaml")


def sampling_settings(
    policy: Any, cfg: RolloutConfig, weights: Path | None, dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """What decides a video besides its prompt and index, as JSON.

    Args:
        policy: The section of the run's config.yaml.
        cfg: How to sample.
        weights: A checkpoint, or None for the base weights.
        dtype: Of the forward pass.
        seed: All videos' seeds follow from it.
    """
    keys = (
        "sde",
        "num_inference_steps",
        "height",
        "width",
        "num_frames",
        "shift",
        "eta",
        "guidance_scale",
        "timestep_rounding",
        "decode",
    )
    of_weights = BASE
    if weights is not None:
        manifest = (weights / "manifest.json").read_bytes()  # it has the hash of every other file
        of_weights = f"{weights.name} {hashlib.sha256(manifest).hexdigest()[:16]}"
    local = local_contents(policy) if collectives.rank() == 0 else {}  # whose settings are kept
    return {
        "weights": of_weights,
        "policy": policy,
        **({"local_files": local} if local else {}),
        "sampler": {key: getattr(cfg, key) for key in keys},
        "micro_batch_size": cfg.micro_batch_size,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
    }


def keep_settings(output: Path, made_with: Mapping[str, Any]) -> None:
    """Write sampling.json beside the videos of a folder, or check it. All ranks call this.

    Raises:
        UserError: The folder holds videos that were made otherwise, or it is not known how; raised
            on every rank.
    """
    path, problem = output / "sampling.json", ""
    if collectives.rank() == 0:
        text = json.dumps(made_with, indent=1)
        if any(output.rglob("*.mp4")):
            try:
                before = json.loads(path.read_text(encoding="utf-8-sig"))
                lines = run_folder.differences(before, json.loads(text))
                problem = f"made otherwise ({'; '.join(lines)})" if lines else ""
            except (OSError, ValueError, AttributeError, RecursionError) as error:
                problem = f"made nobody knows how ({path}: {error})"
        else:
            atomic_write_text(path, text + "\n")
    problem = collectives.gather(problem)[0]
    if problem:
        raise UserError(f"{output} holds videos that were {problem}: give another --output")


def local_contents(section: Any) -> dict[str, str]:
    """The fingerprint of each folder of weights that a section of a configuration names, over
    every byte: its path stays the same when other weights are put there, be it a few.
    """
    found: dict[str, str] = {}
    if isinstance(section, list | tuple):
        section = dict(enumerate(section))
    for key, value in section.items() if isinstance(section, Mapping) else ():
        found |= local_contents(value)
        if key in WEIGHTS and isinstance(value, str) and Path(value).expanduser().is_dir():
            with contextlib.suppress(OSError):  # of an empty folder, which loading refuses
                found[value] = fingerprint(Path(value).expanduser(), whole=True)
    return found


def load_judge(path: Path, device: torch.device) -> RewardModel:
    """The judge of a configuration, loaded. If that fails on any rank, all log a note and get an
    Unscored.
    """
    reward: RewardModel = Unscored()
    problem, errors = None, io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            reward = parse_config(["--config", str(path)])[0].reward
    except SystemExit:  # only the judge can be wrong: the rest was parsed before
        problem = errors.getvalue().strip()
    try:
        reward.load(device)
    except Exception as error:  # a judge's own loading may raise anything, of a file or a server
        problem = f"{type(error).__name__}: {error}"
    problems = [text for text in collectives.gather(problem) if text is not None]
    if not problems:
        return reward
    logger.info(f"note: no scores, the run's judge cannot be loaded: {problems[0]}")
    return Unscored()


@contextlib.contextmanager
def joined(runtime: RuntimeConfig) -> Iterator[torch.device]:
    """Join the other processes for the length of a block, unless the caller has done so."""
    own_group = not collectives.started()
    yield collectives.start(runtime)
    # Not after an error: the other ranks may be in a collective, and leaving would wait for them.
    if own_group:
        collectives.stop()


def load_base(config: TrainConfig, prompts: Sequence[str], device: torch.device) -> None:
    """Load the policy's base weights onto `device`, sharded over these processes as
    `parallel.shard` of the run says.
    """
    config.policy.embed(prompts, device)
    parallel = dataclasses.replace(
        config.parallel, replicas=1, cpu_offload=False, activations="none", compile=False
    )
    sharding.load(config.policy, parallel, device, compute_dtype(config.runtime, device))


def load_trained(path: Path, policy: Policy) -> None:
    """Load a checkpoint's weights: their average (EMA) if it has one."""
    checkpoint.load_weights(path, policy.transformer, ema="ema" in checkpoint.parts(path))


def pipeline_scheduler(policy: Policy, sde: str) -> Callable[[int, torch.device], Any]:
    """The scheduler of the policy's diffusers pipeline.

    Args:
        policy: Must name a model in diffusers' format.
        sde: Must be `ode`: the scheduler has no use for another.

    Returns:
        f(steps, device): the scheduler, set to so many steps as the pipeline sets it.
    """
    import diffusers

    from fastgrpo.policies.model_files import fetch
    from fastgrpo.policies.pretrained import DiffusersPolicy

    if not isinstance(policy, DiffusersPolicy):
        kind = type(policy).__name__
        raise UserError(
            f"scheduler: pipeline needs a model in diffusers' format, which {kind} is not"
        )
    ok = sde == "ode" and collectives.world_size() == 1
    require(ok, "scheduler: pipeline", "sde ode in one process", sde)
    folder = fetch(policy.model, policy.revision, ("model_index.json", "scheduler/*"))
    index = diffusers.DiffusionPipeline.load_config(folder)
    kind = getattr(diffusers, index["scheduler"][1])
    scheduler = kind.from_pretrained(folder, subfolder="scheduler")

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
    """As `sample_validation`, from the same noise, but with a scheduler of diffusers
    (`pipeline_scheduler`) and one video at a time.
    """
    videos = []
    for slot, prompt in enumerate(prompts):
        # One rollout per video: it has room for all states of its videos, 0.3 GB each at 50 steps
        # of 53 frames of 480 x 832.
        rollout = start_rollout(
            policy,
            [prompt],
            cfg,
            seed=derive_seed(seed, "held out"),
            iteration=0,
            first_slot=slot,
            device=device,
            compute_dtype=compute_dtype,
        )
        # Set anew for every video, since it keeps what its last steps predicted.
        steps = scheduler(cfg.num_inference_steps, device)
        rollout.timesteps = steps.timesteps.to(device, torch.float32)
        latents = gaussian_noise(rollout.first_seeds, 0, rollout.latent_shape, device)
        for step, timestep in enumerate(steps.timesteps):
            velocities = branch_velocities(policy, rollout, latents, rollout.index([0], [step]))
            velocity = guided_velocity(*velocities, cfg.guidance_scale)
            latents = steps.step(velocity, timestep, latents, return_dict=False)[0]
        frames = decode(policy, latents)
        judge.submit(frames, [prompt], policy.fps)
        videos.append((frames[0].nan_to_num() * 255).round().to(torch.uint8).cpu())
    return ValidationSet(prompts, *judge.collect(1), torch.stack(videos))
