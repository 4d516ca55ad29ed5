"""A run: check, build the parts, loop over iterations, and leave a folder that another start can
go on from.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from tqdm import tqdm

from fastgrpo.config import RuntimeConfig, TrainConfig
from fastgrpo.distributed import collectives, sharding
from fastgrpo.errors import fail
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training import checkpoint, preflight, run_folder
from fastgrpo.training.signals import StopRequest, stop_on_signals
from fastgrpo.training.step import RolloutInterrupted, Trainer
from fastgrpo.training.tracking import MetricsLog, console_line, validation_line
from fastgrpo.training.validation import evaluate
from fastgrpo.training.weights import using_weights

logger = logging.getLogger("fastgrpo")


def run(config: TrainConfig, config_yaml: str) -> int:
    """Train as configured, or go on with a run. All ranks call this.

    Args:
        config: The configuration.
        config_yaml: The same as YAML, for the run folder.

    Returns:
        0 if all iterations are done or a signal ended the run, 1 if updates failed too often or too
        many videos had no score; the state is checkpointed in each case.

    Raises:
        SystemExit: Code 2 after one line on stderr, for anything wrong that can be known before
            work starts.
    """
    own_group = not collectives.started()
    policy, reward = config.policy, config.reward
    try:
        train_prompts, validation_prompts = preflight.check_config(config)
        device = collectives.start(config.runtime)
        dtype = compute_dtype(config.runtime, device)
        backend = preflight.check_job(config, config_yaml, device)
        lock = run_folder.claim(config.run_folder, config.resume)
        preflight.warn_of_idle_accumulation(config)
        policy.embed([*train_prompts, *validation_prompts], device)
        sharding.load(policy, config.parallel, device, dtype)
        reward.load(device)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        fail(error)
    judge = ScoringQueue(reward, config.scoring.max_pending)
    try:
        trainer = Trainer(config, policy, judge, train_prompts, device, dtype)
        last_row = resume(trainer, config_yaml)
        logger.info(f"kernels: {backend} serves the SDE step and the loss")
        cfg = config.rollout
        shape = policy.latent_shape(cfg.height, cfg.width, cfg.num_frames)
        if attention := policy.describe_attention(shape, dtype, cfg.micro_batch_size):
            logger.info(f"attention: {attention}")
        with (
            run_folder.open_log(config, config_yaml, last_row) as log,
            stop_on_signals() as stop,
        ):
            code = loop(trainer, log, stop, validation_prompts, last_row)
    finally:
        judge.close()
        if lock is not None:
            lock.close()
    # Not after an error: the other ranks may be in a collective, and leaving would wait for them.
    if own_group:
        collectives.stop()
    return code


def compute_dtype(cfg: RuntimeConfig, device: torch.device) -> torch.dtype:
    """dtype of the forward pass: `auto` is bf16 on a GPU and fp32 on the CPU."""
    bf16 = cfg.compute_dtype == "bf16" or (cfg.compute_dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def resume(trainer: Trainer, config_yaml: str) -> int | None:
    """Load the newest whole checkpoint.

    Returns:
        Its iteration; -1 if a used folder has no checkpoint yet, None for a new run.

    Raises:
        SystemExit: Every checkpoint is damaged, or belongs to another network or judge.
    """
    config, folder = trainer.config, trainer.config.run_folder
    if config.resume == "never" or not run_folder.is_used(folder):
        return None
    run_folder.log_changes(folder, config_yaml)
    tensors = trainer.tensors()
    try:
        found = checkpoint.newest(folder / "checkpoints")
        if found is None:
            logger.warning(f"resume: no checkpoint in {folder} yet; starting over")
            return -1
        iteration, state = checkpoint.iteration_of(found), checkpoint.load(found, tensors)
        trainer.load_state_dict(state)
        trainer.load_tensors(tensors)
    except ValueError as error:
        fail(error)
    logger.info(f"resume: going on after iteration {iteration}")
    return iteration


def loop(
    trainer: Trainer,
    log: MetricsLog | None,
    stop: StopRequest,
    validation_prompts: list[str],
    last_row: int | None,
) -> int:
    """Iterate, evaluate and checkpoint until all is done, a signal asks to stop, updates fail too
    often, or too many videos have no score.

    Args:
        trainer: New, or restored by `resume`.
        log: On rank 0.
        stop: Asked after each iteration, and during a rollout.
        validation_prompts: Evaluated at the first and the last state, and in between.
        last_row: As `resume` returned it.

    Returns:
        The exit code of `run`.
    """
    config, every = trainer.config, trainer.config.evaluation.interval
    done, last_saved = max(last_row or 0, 0), last_row
    if last_row is None or last_row < 0:
        # Row 0 of the metrics: the untrained model.
        record(log, {"iteration": 0} | evaluate(trainer, validation_prompts, 0), trainer)
    # None: tqdm shows a bar only on a terminal.
    hidden = None if collectives.rank() == 0 else True
    stopping = failed = False
    with tqdm(total=config.iterations, initial=done, unit="it", disable=hidden) as progress:
        while done < config.iterations and not (stopping or failed):
            try:
                row = trainer.step(done + 1, stop.must_abort_rollout)
            except RolloutInterrupted:
                # Nothing of that iteration has happened yet. A resume makes the same one.
                if last_saved != done:
                    save(trainer, done)
                break
            done += 1
            finished = done == config.iterations
            stopping = collectives.any_rank(stop.requested)
            failed = (
                trainer.skipped_in_a_row >= config.update.max_skipped_updates
                or trainer.invalid_share > config.scoring.max_invalid_share
            )
            if finished or (every and done % every == 0):
                row |= evaluate(trainer, validation_prompts, done)
            record(log, row, trainer)
            progress.update()
            if finished or stopping or failed or done % config.checkpoint.interval == 0:
                save(trainer, done)
                last_saved = done
    return conclude(trainer, done, failed)


def record(log: MetricsLog | None, row: dict[str, Any], trainer: Trainer) -> None:
    """On rank 0: write the iteration's metrics and print one line for them, and one for an
    evaluation if there was one.
    """
    if log is None:
        return
    log.log(row)
    stages = trainer.judge.reward.stages
    if "reward" in row:
        logger.info(console_line(row, stages))
    if any(key.startswith("eval/") for key in row):
        logger.info(validation_line(row, stages))


def save(trainer: Trainer, done: int) -> None:
    """Write the checkpoint of the last finished iteration."""
    folder, keep = trainer.config.run_folder / "checkpoints", trainer.config.checkpoint.keep
    checkpoint.save(folder, done, trainer.tensors(), trainer.state_dict(), keep)


def conclude(trainer: Trainer, done: int, failed: bool) -> int:
    """Export the policy if all is done, and log what lies where or how to go on."""
    config, folder = trainer.config, trainer.config.run_folder
    command = run_folder.resume_command(folder)
    if failed:
        logger.warning(
            f"stopped after iteration {done}: {reason_to_stop(trainer)}. The state is in "
            f"{folder}/checkpoints. After a change go on with: {command}"
        )
        return 1
    if done < config.iterations:
        logger.warning(
            f"stopped by a signal after iteration {done}, with a checkpoint. Go on with: {command}"
        )
        return 0
    with using_weights(trainer.policy, trainer.evaluation_weights):
        weights = sharding.full_state_dict(trainer.policy.transformer)
        if collectives.rank() == 0:
            trainer.policy.save_pretrained(folder / "transformer", weights)
    logger.info(
        f"done: {folder}/ holds metrics.jsonl, samples/ (mp4), checkpoints/latest, "
        "transformer/ (for diffusers' from_pretrained)"
        + (" and tensorboard/" if "tensorboard" in config.tracking.trackers else "")
    )
    return 0


def reason_to_stop(trainer: Trainer) -> str:
    """Why the run cannot go on, and the last error of each part of the judge on any rank."""
    config = trainer.config
    if trainer.skipped_in_a_row >= config.update.max_skipped_updates:
        reason = (
            f"{trainer.skipped_in_a_row} updates in a row (update.max_skipped_updates) could not "
            "be made: a loss or gradient was not finite, or no video had a score"
        )
    else:
        reason = (
            f"{trainer.invalid_share:.0%} of its videos got no score, and "
            f"scoring.max_invalid_share is {config.scoring.max_invalid_share:.0%}"
        )
    ranks = collectives.gather(trainer.judge.last_errors())
    errors = [f"{where}: {error}" for of_rank in ranks for where, error in of_rank.items()]
    return "; ".join(dict.fromkeys([reason, *errors]))
