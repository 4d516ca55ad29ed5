"""A run: check everything, build the parts, loop over iterations, and leave a folder that another
run can go on from.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
import yaml
from fastgrpo_kernels.dispatch import select_backend
from tqdm import tqdm

from fastgrpo.algorithm.self_paced import check_pacing
from fastgrpo.config import TrainConfig
from fastgrpo.distributed import collectives, sharding
from fastgrpo.errors import fail
from fastgrpo.planning.memory import check_fits
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training import checkpoint, figures
from fastgrpo.training.prompts import read_prompts
from fastgrpo.training.step import Abandoned, Trainer
from fastgrpo.training.timing import Stopwatch
from fastgrpo.training.tracking import MetricsLog, check_trackers, console_line, evaluation_line
from fastgrpo.training.trajectory import using_weights
from fastgrpo.training.update import import_fused_adam
from fastgrpo.training.validation import sample_validation

logger = logging.getLogger("fastgrpo")

PATIENCE = 5.0
"""Seconds after a signal for which a rollout goes on; schedulers kill after 30 or more."""


def run(config: TrainConfig, config_yaml: str) -> int:
    """Train as configured, or go on with it. All ranks call this.

    Returns:
        0 when all iterations are done or a signal ended the run (checkpointed either way); 1
        when updates failed too often (checkpointed).

    Raises:
        SystemExit: code 2 after one line on stderr, for anything wrong that can be known before
            work starts.
    """
    own_group = not collectives.started()
    try:
        train_prompts, validation_prompts = check(config)
        device = collectives.start(config.runtime)
        collectives.require_agreement("the configuration", config_yaml)
        check_sharding(config, device)
        if device.type == "cuda":
            check_fits(config, torch.cuda.mem_get_info(device)[1], collectives.world_size())
        family = select_backend(
            "sde_step", torch.empty(0, device=device)
        )  # of fastgrpo_kernels; refused here where a forced one cannot serve
        collectives.require_agreement("the family of kernels", family)
        lock = claim_folder(config)
        warn_of_idle_accumulation(config)
        config.policy.embed([*train_prompts, *validation_prompts], device)
        config.policy.load(device)
        sharding.prepare(
            config.policy.transformer, config.parallel, device, compute_dtype(config, device)
        )
        config.reward.load(device)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        fail(error)
    judge = ScoringQueue(config.reward, config.scoring.max_pending)
    try:
        trainer = Trainer(
            config, config.policy, judge, train_prompts, device, compute_dtype(config, device)
        )
        last_row = resume(trainer, config, config_yaml)
        logger.info(f"kernels: {family} serves the SDE step and the loss")
        if hasattr(config.policy, "describe_attention"):
            cfg = config.rollout
            shape = config.policy.latent_shape(cfg.height, cfg.width, cfg.num_frames)
            logger.info(
                f"attention: {config.policy.describe_attention(shape, compute_dtype(config, device), cfg.micro_batch_size)}"
            )
        with open_log(config, config_yaml, last_row) as log, stop_signals() as stop:
            code = loop(trainer, log, stop, validation_prompts, last_row)
    finally:
        judge.close()
        if lock is not None:
            lock.close()
    # not after an error: the other ranks may wait in a collective, and leaving would wait for them
    if own_group:
        collectives.stop()
    return code


def check(config: TrainConfig) -> tuple[list[str], list[str]]:
    """Everything that can be wrong and be known without weights; the training and the validation
    captions.

    Raises:
        ValueError, FileNotFoundError: names the key, what was expected and what came.
    """
    cfg = config.rollout
    check_pacing(config.pacing, len(config.reward.stages))
    check_attention(config)
    try:
        config.policy.latent_shape(cfg.height, cfg.width, cfg.num_frames)
    except ValueError as error:
        if str(error).startswith("policy."):  # the model is at fault, not the size
            raise
        raise ValueError(f"rollout.height, width, num_frames: {error}") from error
    if cfg.num_prompts % collectives.world_size():
        raise ValueError(
            f"rollout.num_prompts: expected a multiple of the {collectives.world_size()} processes, which share them, got {cfg.num_prompts}"
        )
    if config.update.optimizer == "apex_fused_adam":
        import_fused_adam()
    check_trackers(config.tracking.trackers)
    train_prompts = captions(config, config.prompts.train, "prompts.train")
    if config.prompts.validation is None:
        return train_prompts, train_prompts[: config.evaluation.num_videos]
    return train_prompts, captions(config, config.prompts.validation, "prompts.validation")


def check_attention(config: TrainConfig) -> None:
    """ValueError for an attention of the policy that would reach into a judge which computes in
    this process at the same time.

    diffusers' `_native_...` backends, and `fa3` and `fa4` through them, switch torch's kernels
    by `sdpa_kernel`, which is for all threads: which kernel serves the judge, or whether one
    does (FlashAttention takes no mask), would depend on the moment.
    """
    attention = getattr(config.policy, "attention", "native")
    if attention not in ("fa3", "fa4") and not attention.startswith("_native_"):
        return
    if getattr(config.reward, "memory_bytes", 0) or hasattr(
        getattr(config.reward, "engine", None), "attention"
    ):
        raise ValueError(
            f"policy.attention: expected native, or a backend outside torch, beside a judge in this process, got {attention}, which "
            "switches torch's kernels for the judge's thread too; or serve the judge (fastgrpo.rewards.vlm.served.ServerEngine)"
        )


def check_sharding(config: TrainConfig, device: torch.device) -> None:
    """ValueError where the parameters cannot be sharded as configured."""
    if sharding.shards(config.parallel, device) and config.update.optimizer == "apex_fused_adam":
        raise ValueError(
            "update.optimizer: apex_fused_adam cannot step sharded parameters; use adamw, or set parallel.shard to none"
        )


def warn_of_idle_accumulation(config: TrainConfig) -> None:
    """Say so where an optimizer step waits for more videos than a rank can have: the loss is
    divided by the number waited for.
    """
    update, per_rank = config.update, config.rollout.num_prompts // collectives.world_size()
    most = per_rank * (update.num_best + update.num_worst)
    if update.gradient_accumulation > most:
        logger.info(
            f"note: update.gradient_accumulation is {update.gradient_accumulation}, but a rank trains at most {most} videos an iteration, "
            f"so gradients are scaled by {most / update.gradient_accumulation:.2g}; with {collectives.world_size()} processes give it {most}"
        )


def captions(config: TrainConfig, path: str, key: str) -> list[str]:
    """The captions of a file, each one that the policy can take; ValueError or FileNotFoundError
    name `key`.
    """
    prompts = read_prompts(path, key)
    try:
        config.policy.check_prompts(prompts)
    except ValueError as error:
        raise ValueError(f"{key}: {error} ({path})") from error
    return prompts


def claim_folder(config: TrainConfig) -> TextIO | None:
    """Make the run folder and lock it; rank 0 gets the open lock file, which a process that dies
    lets go of.

    Raises:
        FileExistsError: the folder holds an earlier run that the configuration does not ask to
            resume, or a run that is still going.
    """
    folder, lock, busy = config.run_folder, None, False
    if config.resume == "never" and is_used(folder):
        raise FileExistsError(
            f"{folder} holds a run already: add `--resume auto` to go on with it, or give this one another --name"
        )
    if collectives.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  (held open for the life of the run)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = True
    if collectives.any_rank(busy):
        raise FileExistsError(f"{folder} is in use by another process that is still running")
    return lock


def is_used(folder: Path) -> bool:
    """Whether a run has written to its folder, as rank 0 sees it."""
    return bool(
        collectives.gather(
            (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()
        )[0]
    )


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """dtype of the forward pass: as `runtime.compute_dtype` says, bf16 on a GPU and fp32 elsewhere
    for `auto`.
    """
    choice = config.runtime.compute_dtype
    bf16 = choice == "bf16" or (choice == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def resume(trainer: Trainer, config: TrainConfig, config_yaml: str) -> int | None:
    """Load the newest whole checkpoint and return its iteration; -1 where a used folder has none
    yet, None for a new run.
    """
    folder = config.run_folder
    if config.resume == "never" or not is_used(folder):
        return None
    if (folder / "config.yaml").exists():
        for line in differences(
            yaml.safe_load((folder / "config.yaml").read_text()), yaml.safe_load(config_yaml)
        ):
            logger.info(f"resume: changed since the run began: {line}")
    tensors = trainer.tensors()
    try:
        found = checkpoint.load(folder / "checkpoints", tensors)
    except ValueError as error:
        fail(error)
    if found is None:
        logger.info(f"resume: no checkpoint in {folder} yet; starting over")
        return -1
    iteration, state = found
    trainer.load_tensors(tensors)
    trainer.load_state_dict(state)
    logger.info(f"resume: going on after iteration {iteration}")
    return iteration


def loop(
    trainer: Trainer,
    log: MetricsLog | None,
    stop: StopSignals,
    validation_prompts: list[str],
    last_row: int | None,
) -> int:
    """Iterations, evaluations, checkpoints, until all are done, a signal comes, or updates fail too
    often. Returns the exit code.
    """
    config = trainer.config
    done, last_saved = max(last_row or 0, 0), last_row
    if last_row is None or last_row < 0:
        record(log, {"iteration": 0} | evaluate(trainer, validation_prompts, 0), trainer)
    progress = tqdm(
        total=config.iterations,
        initial=done,
        unit="it",
        disable=None if collectives.rank() == 0 else True,
    )
    stopping = failed = False
    with progress:
        while done < config.iterations and not (stopping or failed):
            try:
                row = trainer.step(done + 1, stop.is_overdue)
            except (
                Abandoned
            ):  # nothing of that iteration has happened yet; a resume makes the same one
                if last_saved != done:
                    save(trainer, done)
                break
            done += 1
            stopping = collectives.any_rank(stop.requested)
            failed = (
                trainer.skipped_in_a_row >= config.update.max_skipped_updates
                or trainer.invalid_share > config.scoring.max_invalid_share
            )
            every = config.evaluation.interval
            if done == config.iterations or (every and done % every == 0):
                row |= evaluate(trainer, validation_prompts, done)
            record(log, row, trainer)
            progress.update()
            if (
                done % config.checkpoint.interval == 0
                or done == config.iterations
                or stopping
                or failed
            ):
                save(trainer, done)
                last_saved = done
    return close(trainer, done, failed)


def save(trainer: Trainer, done: int) -> None:
    """Write the checkpoint of the last finished iteration."""
    config = trainer.config
    checkpoint.save(
        config.run_folder / "checkpoints",
        done,
        trainer.tensors(),
        trainer.state_dict(),
        config.checkpoint.keep,
    )


def close(trainer: Trainer, done: int, failed: bool) -> int:
    """Export the policy where all is done, and say what lies where or how to go on."""
    config, folder = trainer.config, trainer.config.run_folder
    command = resume_command(folder)
    if failed:
        logger.info(
            f"stopped after iteration {done}: {reason_to_stop(trainer)}. The state is in {folder}/checkpoints. "
            f"After a change go on with: {command}"
        )
        return 1
    if done < config.iterations:
        logger.info(
            f"stopped by a signal after iteration {done}, with a checkpoint. Go on with: {command}"
        )
        return 0
    with using_weights(trainer.policy, trainer.sampling_weights):
        weights = sharding.full_state_dict(trainer.policy.transformer)
        if collectives.rank() == 0:
            trainer.policy.save_pretrained(folder / "transformer", weights)
    logger.info(
        f"done: {folder}/ holds metrics.jsonl, samples/ (mp4), checkpoints/latest, transformer/ (for diffusers' from_pretrained)"
        + (" and tensorboard/" if "tensorboard" in config.tracking.trackers else "")
    )
    return 0


def reason_to_stop(trainer: Trainer) -> str:
    """Why the run cannot go on, in words, with the last error of each of the judge's endpoints on
    any rank.
    """
    if trainer.skipped_in_a_row >= trainer.config.update.max_skipped_updates:
        reason = (
            f"{trainer.skipped_in_a_row} updates in a row (update.max_skipped_updates) could not be made: "
            "a loss or gradient was not finite, or no video had a score"
        )
    else:
        reason = (
            f"{trainer.invalid_share:.0%} of its videos got no score, and scoring.max_invalid_share is "
            f"{trainer.config.scoring.max_invalid_share:.0%}"
        )
    errors = {
        f"{where}: {error}": None
        for of_rank in collectives.gather(trainer.judge.last_errors())
        for where, error in of_rank.items()
    }
    return "; ".join([reason, *errors])


def resume_command(folder: Path) -> str:
    """The shell command that goes on with a run from the same working directory, started the way
    this process was.

    Of a job on several nodes only the last part: how its launcher is called, no process knows.
    """
    train = (
        shlex.quote(sys.argv[0]) if Path(sys.argv[0]).name == "train.py" else "-m fastgrpo train"
    )
    launcher = shlex.quote(sys.executable)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        beside = Path(sys.executable).with_name("torchrun")
        torchrun = (
            "torchrun" if shutil.which("torchrun") == str(beside) else shlex.quote(str(beside))
        )
        launcher = f"{torchrun} --standalone --nproc-per-node {collectives.world_size()}"
    if os.environ.get("LOCAL_WORLD_SIZE", str(collectives.world_size())) != str(
        collectives.world_size()
    ):
        launcher = "(your launcher)"
    return f"{launcher} {train} --config {shlex.quote(str(folder / 'config.yaml'))} --resume auto"


def evaluate(trainer: Trainer, prompts: list[str], iteration: int) -> dict[str, Any]:
    """Score the validation captions, with the same noise every time, and save the first videos;
    `eval/...` metrics, none without captions.
    """
    if not prompts:
        return {}
    config, stages, clock = trainer.config, trainer.judge.reward.stages, Stopwatch()
    sampler = dataclasses.replace(
        config.rollout,
        sde=config.evaluation.sde,
        sde_window="all",
        num_generations=config.evaluation.num_generations,
        same_noise=False,  # an ODE makes the same video of the same noise
    )
    with (
        clock.phase("evaluation"),
        sharding.gathered(trainer.policy.transformer, config.parallel.keep_gathered),
    ):
        validation = sample_validation(
            trainer.policy,
            trainer.judge,
            prompts,
            sampler,
            seed=config.seed,
            num_videos=config.evaluation.num_videos,
            device=trainer.device,
            compute_dtype=trainer.compute_dtype,
            weights=trainer.sampling_weights,
        )
        if collectives.rank() == 0 and len(validation.videos):
            folder = config.run_folder / "samples" / f"iteration_{iteration:06d}"
            figures.save_samples(
                folder,
                validation.videos,
                validation.prompts_shown,
                trainer.policy.fps,
                validation.scores_shown,
                stages,
            )
    scores = {
        f"eval/rewards/{stage}/mean": m
        for stage, m in zip(stages, validation.stage_means(len(stages)), strict=True)
    }
    invalid = sum(not ok for valid_G in validation.valid_PG for ok in valid_G)
    return scores | {
        "eval/num_invalid_videos": invalid,
        "time/evaluation": clock.seconds["evaluation"],
    }


@contextmanager
def open_log(
    config: TrainConfig, config_yaml: str, last_row: int | None
) -> Iterator[MetricsLog | None]:
    """The metrics of the run, on rank 0; and the configuration as this start resolved it, written
    beside them.
    """
    if collectives.rank() != 0:
        yield None
        return
    tracking = config.tracking
    with MetricsLog(
        config.run_folder,
        tracking.trackers,
        config=yaml.safe_load(config_yaml),
        last_iteration=last_row,
        project=tracking.project,
    ) as log:
        keep_old_config(config.run_folder, config_yaml, last_row)
        write(config.run_folder / "config.yaml", config_yaml)
        if hasattr(config.reward, "describe"):
            describe_judge(
                config.run_folder / "judge.json", config.reward.describe(), last_row is not None
            )
        yield log


def describe_judge(path: Path, judge: dict[str, Any], resumed: bool) -> None:
    """Keep with the scores what decided them (the questions' hashes, the model, how it is asked);
    say what a resume finds changed.
    """
    if resumed and path.exists():
        for line in differences(json.loads(path.read_text()), judge):
            logger.info(f"resume: the judge has changed since the run began: {line}")
    write(path, json.dumps(judge, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """Replace a file, whole or not at all, whenever the process is killed."""
    written = path.with_name(f".{path.name}.tmp")
    written.write_text(text)
    os.replace(written, path)


def keep_old_config(folder: Path, config_yaml: str, last_row: int | None) -> None:
    """Where a resume changes the configuration, keep the one that made the iterations so far as
    config.until_NNNNNN.yaml.
    """
    path = folder / "config.yaml"
    if last_row is not None and path.exists() and path.read_text() != config_yaml:
        shutil.copyfile(path, folder / f"config.until_{max(last_row, 0):06d}.yaml")


def record(log: MetricsLog | None, row: dict[str, Any], trainer: Trainer) -> None:
    """Write an iteration's metrics and say them, a line for the training and one for an evaluation,
    on the rank that has the log.
    """
    if log is None:
        return
    log.log(row)
    if "reward" in row:
        logger.info(console_line(row, trainer.judge.reward.stages))
    if any(key.startswith("eval/") for key in row):
        logger.info(evaluation_line(row, trainer.judge.reward.stages))


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each key whose value differs between two configurations."""
    lines = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return lines


class StopSignals:
    """Whether SIGINT or SIGTERM has come. A second one changes nothing: Ctrl-C reaches a worker
    from the terminal and from torchrun.
    """

    requested = False
    came_at = 0.0

    def is_overdue(self) -> bool:
        """Whether a signal came so long ago that a rollout, of minutes where the generator is a
        real one, is left instead of finished.
        """
        return self.requested and time.monotonic() - self.came_at > PATIENCE

    def receive(self, number: int, frame: FrameType | None) -> None:
        first = not self.requested
        self.came_at = time.monotonic() if first else self.came_at
        self.requested = True
        # Python refuses to print where the signal has come in the middle of a print; the words may
        # be lost then, never the flag.
        with suppress(RuntimeError):
            logger.info(
                f"{signal.Signals(number).name}: finishing this iteration, or leaving its rollout if that takes long"
            ) if first else None


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Take SIGINT and SIGTERM as requests to stop after the iteration (or its rollout's next
    video), for a while.
    """
    stop = StopSignals()
    previous = {
        number: signal.signal(number, stop.receive) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
