"""A run that was stopped or killed, and resumed, ends in the same state as one that never was:
weights, optimizer, metrics, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fastgrpo.training.checkpoint
import fastgrpo.training.loop
import fastgrpo.training.signals
from fastgrpo.shapes.captions import train_captions

Train = Callable[..., Any]

# Everything at once that has a state: averaged weights, several optimizer steps, a schedule, a
# window that moves, running competence.
MANY_STATES = (
    "--update.ema_decay 0.5 --update.optimizer_steps 2 --update.lr_scheduler cosine "
    "--update.warmup_iterations 1 --rollout.sde_window sliding --rollout.window_size 2 "
    "--rollout.window_interval 1 --update.kl_coef 0.1"
)
SETTINGS = {"plain": "--iterations 4", "many states": MANY_STATES}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, train: Train) -> dict[str, Any]:
    """Runs of four iterations that nothing disturbed, by their settings, with a checkpoint at every
    iteration.
    """
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {
        name: train(
            folder / name.replace(" ", "_"),
            "--iterations 4 --checkpoint.interval 1 --checkpoint.keep 9",
            overrides,
        )
        for name, overrides in SETTINGS.items()
    }


@pytest.mark.parametrize("settings", SETTINGS)
def test_stopped_by_a_signal_and_resumed_twice(
    tmp_path: Path,
    train: Train,
    interrupt: Any,
    uninterrupted: dict[str, Any],
    assert_same_end: Any,
    settings: str,
) -> None:
    """A signal in iteration 2 ends the run after it; the resumed one ends after iteration 3; the
    third start finishes. On a CPU runtime.deterministic is true by itself: the run that nothing
    disturbed is without it.
    """
    arguments = ["--iterations 4 --checkpoint.interval 50", SETTINGS[settings]]
    arguments += ["--runtime.deterministic true"]
    for stopped_in in (2, 3):
        with interrupt(stopped_in):
            run = train(tmp_path / "run", *arguments, "--resume auto")
        assert run.code == 0
        assert run.rows[-1]["iteration"] == stopped_in, (
            "the iteration's work is finished, and no other begun"
        )
        assert (
            run.folder / "checkpoints" / "latest"
        ).resolve().name == f"iteration_{stopped_in:06d}"
        assert not (run.folder / "transformer").exists()
        assert "SIGTERM: finishing this iteration" in run.out
        assert "--resume auto" in run.out
        assert yaml.safe_load((run.folder / "config.yaml").read_text())["resume"] == "never", (
            "how it was asked for is no part of the run"
        )
    run = train(tmp_path / "run", *arguments, "--resume auto")
    assert "resume: going on after iteration 3" in run.out
    assert "changed since" not in run.out
    assert_same_end(run.folder, uninterrupted[settings].folder)


def test_a_rollout_that_takes_long_is_left_and_done_again(
    tmp_path: Path,
    train: Train,
    interrupt: Any,
    uninterrupted: dict[str, Any],
    assert_same_end: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal in iteration 1, and again in 3 and 4, each with a rollout too long to be finished:
    the checkpoint is of the one before.
    """
    arguments = ["--iterations 4 --checkpoint.interval 2", SETTINGS["many states"]]
    monkeypatch.setattr(fastgrpo.training.signals, "PATIENCE", 0.0)
    for stopped_in in (1, 3, 4):
        with interrupt(stopped_in):
            run = train(tmp_path / "run", *arguments, "--resume auto")
        assert run.code == 0
        assert run.rows[-1]["iteration"] == stopped_in - 1
        assert (
            run.folder / "checkpoints" / "latest"
        ).resolve().name == f"iteration_{stopped_in - 1:06d}"
        assert f"stopped by a signal after iteration {stopped_in - 1}, with a checkpoint" in run.out
    run = train(tmp_path / "run", *arguments, "--resume auto")
    assert "resume: going on after iteration 3" in run.out
    assert_same_end(run.folder, uninterrupted["many states"].folder)


def test_resumed_states_are_not_trivially_equal(
    uninterrupted: dict[str, Any], tensors: Callable[[Path], dict[str, Any]]
) -> None:
    """What the comparisons compare: every kind of state is in a checkpoint, and differs from one
    iteration to the next.
    """
    before, after = (
        tensors(uninterrupted["many states"].folder / "checkpoints" / f"iteration_{i:06d}")
        for i in (3, 4)
    )
    for part in ("model/", "ema/", "optimizer/state/"):
        names = [name for name in before if name.startswith(part)]
        changed = [
            isinstance(before[name], torch.Tensor) and not torch.equal(before[name], after[name])
            for name in names
        ]
        assert sum(changed) > 0.9 * len(names) > 0
    states = [
        json.loads(
            (
                uninterrupted["many states"].folder
                / "checkpoints"
                / f"iteration_{i:06d}"
                / "state.json"
            ).read_text()
        )
        for i in (3, 4)
    ]
    assert [state["prompts_drawn"] for state in states] == [6, 8]
    assert states[0]["pacer"] != states[1]["pacer"]


def test_resuming_a_finished_run_changes_nothing(
    tmp_path: Path, train: Train, uninterrupted: dict[str, Any], assert_same_end: Any
) -> None:
    shutil.copytree(uninterrupted["plain"].folder, tmp_path / "plain", symlinks=True)
    again = train(tmp_path / "plain", "--iterations 4 --resume auto")
    assert again.code == 0
    assert "done: " in again.out
    assert_same_end(again.folder, uninterrupted["plain"].folder)


def test_an_average_switched_on_at_a_resume_starts_at_the_weights_of_then(
    tmp_path: Path, train: Train, tensors: Any
) -> None:
    train(tmp_path / "run", "--iterations 2")
    run = train(tmp_path / "run", "--iterations 3 --resume auto --update.ema_decay 0.9")
    assert run.code == 0
    assert "update.ema_decay: 0.0 -> 0.9" in run.out
    old, new = (tensors(run.folder / "checkpoints" / f"iteration_00000{i}") for i in (2, 3))
    assert not any(name.startswith("ema/") for name in old)
    names = [name.removeprefix("model/") for name in new if name.startswith("model/")]
    assert names
    for name in names:
        average = 0.9 * old[f"model/{name}"] + 0.1 * new[f"model/{name}"]
        torch.testing.assert_close(new[f"ema/{name}"], average, rtol=1e-5, atol=1e-7)


def test_more_iterations_than_first_asked_for(
    tmp_path: Path,
    train: Train,
    uninterrupted: dict[str, Any],
    rows_without_times: Any,
    tensors: Any,
) -> None:
    """Under a constant learning rate a run of 2 iterations that is given 4 ends as one of 4, with
    one evaluation more, after the second.
    """
    train(tmp_path / "run", "--iterations 2")
    run = train(tmp_path / "run", "--iterations 4 --resume auto")
    assert "changed since the last start: iterations: 2 -> 4" in run.out
    assert run.out.count("changed since the last start") == 1
    expected = uninterrupted["plain"]
    rows, expected_rows = (
        [json.loads(row) for row in rows_without_times(folder)]
        for folder in (run.folder, expected.folder)
    )
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    extra = {key: value for key, value in rows[2].items() if key not in expected_rows[2]}
    assert len(extra) == 4
    assert all(key.startswith("eval/") for key in extra)
    assert [row | (extra if row["iteration"] == 2 else {}) for row in expected_rows] == rows
    one, other = (
        tensors(folder / "checkpoints" / "latest") for folder in (run.folder, expected.folder)
    )
    assert all(
        torch.equal(one[name], other[name]) for name in one if isinstance(one[name], torch.Tensor)
    )


def test_a_changed_setting_takes_effect_and_is_said(
    tmp_path: Path, train: Train, tensors: Any
) -> None:
    """The configuration's hyperparameters rule, not those in the checkpoint's optimizer state."""
    train(tmp_path / "run", "--iterations 1")
    changes = ["--update.learning_rate 1e-3 --update.weight_decay 0.25 --update.betas [0.5,0.75]"]
    run = train(tmp_path / "run", "--iterations 2 --resume auto", *changes)
    assert run.code == 0
    assert "changed since the last start: update.learning_rate: 0.0002 -> 0.001" in run.out
    assert run.rows[-1]["learning_rate"] == 1e-3
    state = tensors(run.folder / "checkpoints" / "latest")
    groups = {
        name.rpartition("/")[2]: value for name, value in state.items() if "param_groups" in name
    }
    assert (groups["lr"], groups["weight_decay"], tuple(groups["betas"])) == (
        1e-3,
        0.25,
        (0.5, 0.75),
    )


def test_resume_auto_in_a_new_folder_is_a_new_run(tmp_path: Path, train: Train) -> None:
    run = train(tmp_path / "run", "--iterations 1 --resume auto")
    assert run.code == 0
    assert [row["iteration"] for row in run.rows] == [0, 1]
    assert "resume:" not in run.out


def test_killed_before_the_first_checkpoint(
    tmp_path: Path,
    train: Train,
    each_step: Any,
    uninterrupted: dict[str, Any],
    assert_same_end: Any,
) -> None:
    """Rows are there, and no checkpoint: the run starts over, says so, and keeps a copy of them."""
    with each_step(fail_in(3)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastgrpo.training.loop, "rescue", lambda *_: ("killed", True))
        assert train(tmp_path / "run", "--iterations 4").code == 1
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert rows.count("\n") == 3
    assert train(tmp_path / "run", "--iterations 4").code == 2, "the folder is used"
    run = train(tmp_path / "run", "--iterations 4 --resume auto")
    assert "no checkpoint" in run.out
    assert (run.folder / "metrics.until_000002.jsonl").read_text() == rows
    assert_same_end(run.folder, uninterrupted["plain"].folder)


@pytest.mark.parametrize(
    "tail",
    ['{"iteration": 4, "rew', '{"iteration": 4}\n{"iteration": 5, "reward": 0.1}\n', "\x00" * 20],
)
def test_rows_after_the_checkpoint_and_half_a_line(
    tmp_path: Path,
    train: Train,
    interrupt: Any,
    uninterrupted: dict[str, Any],
    assert_same_end: Any,
    tail: str,
) -> None:
    with interrupt(2):
        train(tmp_path / "run", "--iterations 4")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(tail)
    run = train(tmp_path / "run", "--iterations 4 --resume auto")
    assert_same_end(run.folder, uninterrupted["plain"].folder)


@pytest.mark.parametrize("lost", ["config.yaml", "metrics.jsonl", "checkpoints/latest"])
def test_a_file_beside_the_checkpoints_was_lost(
    tmp_path: Path,
    train: Train,
    interrupt: Any,
    uninterrupted: dict[str, Any],
    tensors: Any,
    lost: str,
) -> None:
    with interrupt(2):
        train(tmp_path / "run", "--iterations 4")
    (tmp_path / "run" / lost).unlink()
    run = train(tmp_path / "run", "--iterations 4 --resume auto")
    assert run.code == 0
    one, other = (
        tensors(folder / "checkpoints" / "latest")
        for folder in (run.folder, uninterrupted["plain"].folder)
    )
    assert all(
        torch.equal(one[name], other[name]) for name in one if isinstance(one[name], torch.Tensor)
    )


class Killed(BaseException):
    """Stands in for SIGKILL at an exact place, where `rescue` is kept from saving."""


def fail_in(number: int) -> Callable[[int], None]:
    def call(iteration: int) -> None:
        if iteration == number:
            raise Killed

    return call


def kill_until_done(
    background: Any, argv: list[str], folder: Path, rounds: int, draw: random.Random, longest: float
) -> int:
    """Start, kill at a random moment, resume, kill, ...; after so many rounds let it finish.
    Returns how many kills hit a live process.
    """
    hits = 0
    for _ in range(rounds):
        process = background([*argv, "--resume auto"])
        process.join(timeout=draw.uniform(0.05, longest))
        if process.exitcode is None:
            hits += 1
        process.kill()
        process.join()
        if (folder / "transformer" / "config.json").exists():
            break
    process = background([*argv, "--resume auto"])
    process.join(timeout=400)
    assert process.exitcode == 0
    return hits


def test_sigkill_at_random_moments(
    tmp_path: Path,
    tiny: Callable[..., list[str]],
    background: Any,
    uninterrupted: dict[str, Any],
    assert_same_end: Any,
) -> None:
    draw = random.Random(20_240)
    argv = tiny(
        tmp_path / "run",
        "--iterations 4 --checkpoint.interval 1 --checkpoint.keep 2",
        MANY_STATES,
    )
    assert kill_until_done(background, argv, tmp_path / "run", 4, draw, longest=1.0) >= 1
    assert_same_end(tmp_path / "run", uninterrupted["many states"].folder)
    rows = [
        json.loads(line)["iteration"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_sigkill_at_random_moments_many_times(
    tmp_path: Path,
    tiny: Callable[..., list[str]],
    train: Train,
    background: Any,
    assert_same_end: Any,
) -> None:
    """Checkpoints are most of such a run's time, and are hit most often: 24 iterations, killed
    until they are done, after an eighth of their time on average.
    """
    arguments = ["--iterations 24 --checkpoint.interval 1 --checkpoint.keep 2", MANY_STATES]
    begun = time.monotonic()
    expected = train(tmp_path / "expected", *arguments)
    longest = (time.monotonic() - begun) / 4
    draw = random.Random(int.from_bytes(os.urandom(4), "little"))
    hits = kill_until_done(
        background, tiny(tmp_path / "run", *arguments), tmp_path / "run", 40, draw, longest
    )
    assert hits >= 10
    assert_same_end(tmp_path / "run", expected.folder)
    assert [row["iteration"] for row in expected.rows] == list(range(25))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigkill_of_a_whole_job(
    tmp_path: Path,
    tiny: Callable[..., list[str]],
    torchrun: Any,
    forked: Any,
    train: Train,
    assert_same_end: Any,
    ranks: int,
) -> None:
    """The same through torchrun: launcher and workers die together, as on a machine that loses
    power. Then three times all ranks, without a launcher, whose start takes longer than the run.
    """
    settings = "--iterations 12 --checkpoint.interval 1"
    argv = [*tiny(tmp_path / "run", settings), "--resume auto"]
    draw = random.Random(ranks)
    job = torchrun(argv, ranks, tmp_path)
    wait_for(job, "iteration ")
    time.sleep(draw.uniform(0.0, 2.0))
    # torchrun's workers have sessions of their own: killing the launcher's group would let them run
    # to the end.
    workers = [
        pid
        for task in Path(f"/proc/{job.pid}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    assert len(workers) == ranks
    for pid in (job.pid, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)
    job.communicate(timeout=300)
    for _ in range(3):
        job = forked(["train", *argv], tmp_path, ranks)
        job.wait_for("iteration ")
        time.sleep(draw.uniform(0.0, 2.0))
        job.kill()
    job = forked(["train", *argv], tmp_path, ranks)
    out = job.finish()
    assert job.returncode == 0, out
    rows = [
        json.loads(line)["iteration"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows == list(range(13))
    if ranks == 1:
        train(tmp_path / "expected", settings)
    else:
        job = forked(["train", *tiny(tmp_path / "expected", settings)], tmp_path, ranks)
        out = job.finish()
        assert job.returncode == 0, out
    assert_same_end(tmp_path / "run", tmp_path / "expected")


def wait_for(job: subprocess.Popen[str], text: str) -> str:
    """Read a job's output up to the first line with that text in it."""
    assert job.stdout is not None
    seen = []
    for line in job.stdout:
        seen.append(line)
        if text in line:
            return "".join(seen)
    raise AssertionError(f"the job ended without {text!r}:\n{''.join(seen)}")


def test_sigterm_and_sigint_and_the_command_that_is_printed(
    tmp_path: Path,
    tiny: Callable[..., list[str]],
    torchrun: Any,
    train: Train,
    environment: dict[str, str],
    assert_same_end: Any,
) -> None:
    """A job is stopped by SIGTERM; the command that it prints, run as printed, goes on; that is
    stopped by Ctrl-C; its command finishes.
    """
    (tmp_path / "train.txt").write_text("\n".join(map(str, train_captions())))
    arguments = ["--iterations 24 --prompts.train train.txt"]
    # Looked for in the working directory, and in need of quotes.
    relative = ["--output_dir", "runs", "--name", "my run"]
    job = torchrun([*tiny(tmp_path / "runs" / "my run", *arguments), *relative], 1, tmp_path)
    command = ""
    for number, line in ((signal.SIGTERM, "iteration     2 "), (signal.SIGINT, "iteration    ")):
        before = wait_for(job, line)
        os.killpg(job.pid, number)  # as a terminal does: every process of the job gets it
        after, _ = job.communicate(timeout=300)
        assert number.name + ": finishing this iteration" in after, before + after
        (said,) = [line for line in after.splitlines() if "Go on with: " in line]
        done = int(said.split("after iteration ")[1].split(",")[0])
        assert (
            tmp_path / "runs" / "my run" / "checkpoints" / "latest"
        ).resolve().name == f"iteration_{done:06d}"
        assert done < 24
        command = said.split("Go on with: ")[1]
        assert shlex.split(command)[-2:] == ["--resume", "auto"]
        job = subprocess.Popen(
            command,
            shell=True,
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    train(tmp_path / "expected", "--iterations 24")
    assert_same_end(tmp_path / "runs" / "my run", tmp_path / "expected")
