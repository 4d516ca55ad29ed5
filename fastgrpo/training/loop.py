"""A run: check, build the parts, loop over iterations, and leave a folder that another start can
go on from, whatever ends it.
"""

from __future__ import annotations

import logging
import sys
import traceback
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from tqdm import tqdm

from fastgrpo.config import RuntimeConfig, TrainConfig
from fastgrpo.distributed import collectives, sharding
from fastgrpo.errors import INPUT_ERRORS, UserError, fail, one_line, require
from fastgrpo.files import FULL, atomic_folder
from fastgrpo.rewards.queue import ScoringQueue
from fastgrpo.training import checkpoint, preflight, run_folder
from fastgrpo.training.checkpoint_names import iteration_of
from fastgrpo.training.pacing_note import log_pacing
from fastgrpo.training.signals import StopRequest, stop_on_signals
from fastgrpo.training.step import RolloutInterrupted, Trainer
from fastgrpo.training.tracking import MetricsLog, Row, console_line, validation_line
from fastgrpo.training.validation import evaluate
from fastgrpo.training.weights import using_weights

logger = logging.getLogger("fastgrpo")


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        done: The last iteration whose update is made; 0 is the untrained model.
        row: Its metrics, until they are recorded: its evaluation is still to be made.
        state: `Trainer.state_dict` after it.
        saved: Iteration of the newest checkpoint.
        save_failed: Whether the last attempt at a checkpoint failed.
    """

    done: int
    row: Row | None
    state: dict[str, Any]
    saved: int | None = None
    save_failed: bool = False

    @classmethod
    def at(cls, found: Path | None) -> Progress:
        """The progress that a checkpoint holds, or that of a new run.

        Raises:
            UserError: Its state.json is not one of ours.
        """
        if found is None:
            return cls(done=0, row={"iteration": 0}, state={})
        state, done = checkpoint.read_state(found), iteration_of(found)
        saved = state.pop("iteration", done)  # earlier versions did not write it
        key = f"{found / 'state.json'}: iteration"
        require(saved == done, key, f"{done}, as its folder is called", saved)
        row = state.pop("row", None)
        ok = row is None or (isinstance(row, dict) and row.get("iteration") == done)
        require(ok, f"{found / 'state.json'}: row", f"metrics of iteration {done}", row)
        return cls(done, row, state, saved=done)


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
            work starts; code 1 after an error in the loop (`end_after`).
    """
    own_group = not collectives.started()
    policy, reward = config.policy, config.reward
    with ExitStack() as stack:
        try:
            train_prompts, validation_prompts = preflight.check_config(config)
            device = collectives.start(config.runtime)
            dtype = compute_dtype(config.runtime, device)
            backend = preflight.check_job(config, config_yaml, device)
            if lock := run_folder.claim(config.run_folder, config.resume):
                stack.enter_context(lock)
            found, used = run_folder.find_checkpoint(config)
            progress = Progress.at(found)
            # A row that is still to be recorded is not there yet.
            recorded = progress.done - (progress.row is not None)
            last_row = recorded if used else None
            # Before anything is loaded: a tracker that cannot start is known early.
            if log := run_folder.open_log(config, config_yaml, last_row):
                stack.enter_context(log)
            policy.embed([*train_prompts, *validation_prompts], device)
            sharding.load(policy, config.parallel, device, dtype)
            reward.load(device)
        except INPUT_ERRORS as error:
            fail(error)
        judge = ScoringQueue(reward, config.scoring.max_pending)
        stack.callback(judge.close)
        trainer = Trainer(config, policy, judge, train_prompts, device, dtype)
        try:
            if found is not None:
                _restore(trainer, found, progress)
            run_folder.write_record(config, config_yaml, last_row)
        except INPUT_ERRORS as error:
            fail(error)
        progress.state = trainer.state_dict()
        logger.info(f"kernels: {backend} serves the SDE step and the loss")
        cfg = config.rollout
        shape = policy.latent_shape(cfg.height, cfg.width, cfg.num_frames)
        if attention := policy.describe_attention(shape, dtype, cfg.micro_batch_size):
            logger.info(f"attention: {attention}")
        stop = stack.enter_context(stop_on_signals())
        code = loop(trainer, log, stop, validation_prompts, progress)
    # Not after an error: the other ranks may be in a collective, and leaving would wait for them.
    if own_group:
        collectives.stop()
    return code


def compute_dtype(cfg: RuntimeConfig, device: torch.device) -> torch.dtype:
    """dtype of the forward pass: `auto` is bf16 on a GPU and fp32 on the CPU."""
    bf16 = cfg.compute_dtype == "bf16" or (cfg.compute_dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def _restore(trainer: Trainer, found: Path, progress: Progress) -> None:
    """Load a checkpoint into a trainer.

    Raises:
        UserError: It belongs to another network or judge.
    """
    tensors = trainer.tensors()
    checkpoint.load(found, tensors)
    try:
        trainer.load_state_dict(progress.state)
    except (KeyError, TypeError, AttributeError) as error:
        expected = "the counters and the pacer of this run"
        raise UserError(f"{found / 'state.json'}: expected {expected}, got {error!r}") from error
    trainer.load_tensors(tensors)
    if progress.done:
        trainer.set_learning_rate(progress.done)  # it may be saved again before the next step
    logger.info(f"resume: going on after iteration {progress.done}")


def loop(
    trainer: Trainer,
    log: MetricsLog | None,
    stop: StopRequest,
    validation_prompts: list[str],
    progress: Progress,
) -> int:
    """Iterate, evaluate and checkpoint until all is done, a signal asks to stop, updates fail too
    often, or too many videos have no score.

    Args:
        trainer: New, or restored.
        log: On rank 0.
        stop: Asked after each iteration, and during a rollout, an evaluation's too.
        validation_prompts: Evaluated at the first and the last state, and in between.
        progress: Where `trainer` is.

    Returns:
        The exit code of `run`.

    Raises:
        SystemExit: Code 1, after an error of any kind.
    """
    try:
        failed = _iterate(trainer, log, stop, validation_prompts, progress)
        return conclude(trainer, progress, failed)
    except BaseException as error:  # also what is no Exception: nothing may cost an iteration
        end_after(error, trainer, log, progress)


def _iterate(
    trainer: Trainer,
    log: MetricsLog | None,
    stop: StopRequest,
    validation_prompts: list[str],
    progress: Progress,
) -> bool:
    """`loop`, to its planned end. Returns whether the run failed."""
    config = trainer.config
    every, interval = config.evaluation.interval, config.checkpoint.interval
    # None: tqdm shows a bar only on a terminal.
    hidden = None if collectives.rank() == 0 else True
    stopping = failed = False
    with tqdm(total=config.iterations, initial=progress.done, unit="it", disable=hidden) as bar:
        while True:
            done = progress.done
            finished = done >= config.iterations
            try:
                if progress.row is not None:
                    row = progress.row
                    if done == 0 or finished or (every and done % every == 0):
                        must_abort = stop.must_abort_rollout
                        row = row | evaluate(trainer, validation_prompts, done, must_abort)
                    record(log, row, trainer)
                    progress.row = None
                    bar.update(done - bar.n)
                    # After what rank 0 does alone: here the others hear of its failure.
                    stopping = collectives.any_rank(stop.requested)
                    failed = (
                        trainer.skipped_in_a_row >= config.update.max_skipped_updates
                        or trainer.invalid_share > config.scoring.max_invalid_share
                    )
                    if finished or stopping or failed or (done and done % interval == 0):
                        save(trainer, log, progress)
                if finished or stopping or failed:
                    return failed
                row = trainer.step(done + 1, stop.must_abort_rollout)
            except RolloutInterrupted:
                # Nothing of that rollout has happened yet. A resume makes the same one.
                if progress.saved != done:
                    save(trainer, log, progress)
                return False
            progress.done, progress.row, progress.state = done + 1, row, trainer.state_dict()


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
        log_pacing(trainer.config, row)
    if any(key.startswith("eval/") for key in row):
        logger.info(validation_line(row, stages))


def save(trainer: Trainer, log: MetricsLog | None, progress: Progress) -> None:
    """Write the rows to the disk, and the checkpoint of the last finished iteration; this also
    where the rows cannot be written.
    """
    config, done = trainer.config, progress.done
    folder, keep = config.run_folder, config.checkpoint.keep
    row = {} if progress.row is None else {"row": progress.row}
    state = {"iteration": done, **progress.state, **row}
    unwritten = None
    if log is not None:
        try:
            log.sync()
        except OSError as error:
            unwritten = error
    progress.save_failed = True
    checkpoint.save(folder / "checkpoints", done, trainer.tensors(), state, keep)
    if log is not None:
        run_folder.note_saved(folder, done)
    progress.saved, progress.save_failed = done, False
    if unwritten is not None:
        raise unwritten


def end_after(
    error: BaseException, trainer: Trainer, log: MetricsLog | None, progress: Progress
) -> NoReturn:
    """End a run that an error has ended: save the last finished iteration, show the error, and say
    how to go on.

    Raises:
        SystemExit: Code 1.
    """
    is_own = not isinstance(error, collectives.PeerFailed | collectives.FailedElsewhere)
    is_full = isinstance(error, OSError) and error.errno in FULL
    lost, together = rescue(error, trainer, log, progress)
    if is_own and not is_full:
        with suppress(OSError):  # a terminal that is gone
            traceback.print_exception(error)
    if together:
        with suppress(RuntimeError):
            collectives.gather(None)  # all tracebacks come before the line
    done, folder, saved = progress.done, trainer.config.run_folder, progress.saved
    reason = one_line(error) if is_full or not is_own else ""
    reason = reason or f"{type(error).__name__}: {one_line(error)}"
    newest = folder / "checkpoints" / f"iteration_{saved or 0:06d}"
    state = f"the checkpoint is {newest}"
    if lost:
        last = "There is none" if saved is None else f"The newest is {newest}"
        state = f"no checkpoint of it: {lost}. {last}"
    line = (
        f"stopped after iteration {done}: {reason}; {state}. Go on with: "
        f"{run_folder.resume_command(folder)}"
    )
    if collectives.rank() == 0:
        logger.error(line)
    elif not together:
        with suppress(OSError):
            print(f"rank {collectives.rank()}: {line}", file=sys.stderr)
    if is_own:
        _tell_launcher(line, error)
    raise SystemExit(1) from error


def _tell_launcher(line: str, error: BaseException) -> None:
    """For torchrun's summary, the last that it prints: the traceback, then the line."""
    try:
        raise RuntimeError(line) from error
    except RuntimeError as said:
        with suppress(Exception):  # such as a full disk
            get_error_handler().record_exception(said)


def rescue(
    error: BaseException, trainer: Trainer, log: MetricsLog | None, progress: Progress
) -> tuple[str, bool]:
    """Save the last finished iteration after an error, if it is whole and the other ranks answer.

    A rank that fails alone tells the others at the next `gather` that they come to; there is one
    after each micro-batch of videos and after all that rank 0 does alone.

    Returns:
        Why it could not be saved ("" if it is), and whether the ranks are together.
    """
    done, reason = progress.done, ""
    if trainer.is_updating and collectives.world_size() > 1:
        return f"the ranks were in the update of iteration {done + 1}", False
    try:
        collectives.report_failure(error)
        ranks = collectives.gather((done, trainer.weights_moved, progress.save_failed))
        at, moved, save_failed = zip(*ranks, strict=True)
        if any(moved):
            reason = f"the update of iteration {done + 1} was half made"
        elif len({*at}) > 1:
            reason = f"the ranks are after iterations {', '.join(map(str, at))}"
        elif any(save_failed):
            reason = "it could not be written"
        elif done == 0 and progress.row is not None:
            reason = "nothing was trained yet"
        elif progress.saved != done:
            save(trainer, log, progress)
    except BaseException as second:
        return f"{type(second).__name__}: {one_line(second)}", False
    return reason, True


def conclude(trainer: Trainer, progress: Progress, failed: bool) -> int:
    """Export the policy if all is done, and log what lies where or how to go on."""
    config, folder, done = trainer.config, trainer.config.run_folder, progress.done
    command = run_folder.resume_command(folder)
    if failed:
        logger.warning(
            f"stopped after iteration {done}: {reason_to_stop(trainer)}. The state is in "
            f"{folder}/checkpoints. After a change go on with: {command}"
        )
        return 1
    if done < config.iterations or progress.row is not None:
        logger.warning(
            f"stopped by a signal after iteration {done}, with a checkpoint. Go on with: {command}"
        )
        return 0
    with using_weights(trainer.policy, trainer.evaluation_weights):
        weights = sharding.full_state_dict(trainer.policy.transformer)
        with collectives.failing_together("the export"):
            if collectives.rank() == 0:
                with atomic_folder(folder / "transformer") as partial:
                    trainer.policy.save_pretrained(partial, weights)
    logger.info(
        f"done: {folder}/ holds metrics.jsonl, samples/ (mp4), checkpoints/, "
        f"transformer/ (for diffusers' {trainer.policy.loaded_by})"
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
