"""Two ranks against one: the same rewards bit for bit, the same gradients up to rounding, and no
hang when the ranks differ.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.shapes.captions import train_captions
from fastgrpo.training import checkpoint

ONE_UPDATE = [
    "--rollout.num_generations 6",
    "--update.num_best 2",
    "--checkpoint.interval 1",
    "--checkpoint.keep 9",
]
FROM_VIDEOS = (
    "reward",
    "rewards/",
    "weights/",
    "hoyer/",
    "competence/",
    "frac_reward",
    "num_skipped_groups",
    "num_invalid",
    "eval/",
)
"""Metrics that follow only from the videos, so the first rollout's are the same on any ranks."""


def finish(job: subprocess.Popen[str], seconds: float = 120) -> str:
    try:
        out, _ = job.communicate(timeout=seconds)
    finally:
        job.kill()
    return out


@pytest.fixture(scope="module")
def train_on_two(forked: Any, tiny: Any) -> Callable[..., str]:
    """train_on_two(folder, *overrides): a tiny run on two forked ranks; what both printed."""

    def train(folder: Path, *overrides: str) -> str:
        job = forked(["train", *tiny(folder, *overrides)], folder.parent, 2)
        out: str = job.finish()
        assert job.returncode == 0, out
        return out

    return train


def from_videos(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key.startswith(FROM_VIDEOS)}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank_run(tmp_path_factory: pytest.TempPathFactory, train: Callable[..., Any]) -> Path:
    """Three iterations of two prompts, three videos of each trained, in one optimizer step."""
    folder = tmp_path_factory.mktemp("ranks") / "one"
    run = train(folder, *ONE_UPDATE)
    assert run.code == 0
    return run.folder


@pytest.fixture(scope="module")
def two_ranks_run(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]], forked: Any
) -> Path:
    """The same by two ranks.

    Six videos of a prompt in micro-batches of four: each rank has other neighbours and padding.
    """
    folder = tmp_path_factory.mktemp("ranks") / "two"
    argv = tiny(folder, *ONE_UPDATE)
    job = forked(["train", *argv], folder.parent, 2)
    out = job.finish()
    assert job.returncode == 0, out
    assert out.count("iteration     1 ") == 1, "one rank speaks"
    return folder


def test_rollouts_and_rewards_of_the_first_iteration_are_bit_equal(
    one_rank_run: Path, two_ranks_run: Path
) -> None:
    (start_one, first_one, *_), (start_two, first_two, *_) = rows(one_rank_run), rows(two_ranks_run)
    assert from_videos(start_one) == from_videos(start_two), (
        "three validation captions, which two ranks cannot share evenly"
    )
    assert len(from_videos(start_one)) == 4, "three stages, and how many videos have no score"
    assert from_videos(first_one) == from_videos(first_two)
    assert len(from_videos(first_one)) > 15
    assert first_one["ratio_drift"] == first_two["ratio_drift"] == 0.0
    assert {key for key in first_one if key.startswith("ratio_drift/")} == {
        key for key in first_two if key.startswith("ratio_drift/")
    }


def test_gradients_at_equal_weights_are_equal(
    one_rank_run: Path, two_ranks_run: Path, tensors: Callable[[Path], dict[str, Any]]
) -> None:
    """After the first update: Adam's first moment is 0.1 of the (clipped) gradient, element by
    element.
    """
    first_one, first_two = rows(one_rank_run)[1], rows(two_ranks_run)[1]
    assert first_two["grad_norm"] == pytest.approx(first_one["grad_norm"], rel=1e-5)
    assert first_two["loss"] == pytest.approx(first_one["loss"], rel=1e-4, abs=1e-7)
    one, two = (
        tensors(folder / "checkpoints" / "iteration_000001")
        for folder in (one_rank_run, two_ranks_run)
    )
    moments = [name for name in one if name.endswith("/exp_avg")]
    assert len(moments) > 50
    largest = max(float(one[name].abs().max()) for name in moments)
    for name in moments:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6 * largest)
    moved = torch.cat(
        [(one[name] - two[name]).abs().flatten() for name in one if name.startswith("model/")]
    )
    assert moved.quantile(0.99) < 1e-7, (
        "Adam turns the sign of the tiniest gradients into whole steps; of all others, none"
    )


def test_a_rank_more_or_less_after_a_resume(
    tmp_path: Path, one_rank_run: Path, two_ranks_run: Path, train: Any, train_on_two: Any
) -> None:
    """A checkpoint of two ranks resumes on one, and the other way round; the next rollout is bit
    for bit what the writer made next.
    """

    def cut(source: Path, name: str) -> Path:
        shutil.copytree(source, tmp_path / name, symlinks=True)
        for later in (2, 3):
            shutil.rmtree(tmp_path / name / "checkpoints" / f"iteration_{later:06d}")
        return tmp_path / name

    resume, folder = [*ONE_UPDATE, "--resume auto"], cut(one_rank_run, "one")
    on_one = train(cut(two_ranks_run, "two"), *resume)
    assert "going on after iteration 1" in on_one.out
    out = train_on_two(folder, *resume)
    assert out.count("going on after iteration 1") == 1
    for resumed, source in ((on_one.folder, two_ranks_run), (folder, one_rank_run)):
        assert [row["iteration"] for row in rows(resumed)] == [0, 1, 2, 3]
        assert from_videos(rows(resumed)[2]) == from_videos(rows(source)[2])
        assert rows(resumed)[2]["grad_norm"] == pytest.approx(
            rows(source)[2]["grad_norm"], rel=1e-5
        )


def test_ranks_with_nothing_to_train_keep_step(
    tmp_path: Path, train: Any, train_on_two: Any
) -> None:
    """Rank 1's group gives no signal in iterations 2 (no scores) and 3 (equal ones), no group does
    in 4, all do in 1 and 5.

    The ranks' weights are equal at every rollout, those of iteration 4 stay, and one rank with
    the same prompts comes to the same.
    """
    by_kind = {
        "seen": [str(c) for c in train_captions() if str(c).startswith(("a red", "a green"))],
        "blind": [str(c) for c in train_captions() if "blue" in str(c)],
        "flat": [str(c) for c in train_captions() if "yellow" in str(c)],
    }
    slots = ["seen", "seen", "seen", "blind", "seen", "flat", "flat", "blind", "seen", "seen"]
    captions = [by_kind[kind][i] for i, kind in enumerate(slots) if i < len(by_kind[kind])]
    assert len(captions) == len(slots)
    (tmp_path / "train.txt").write_text("\n".join(captions))
    arguments = [
        f"--prompts.train {tmp_path}/train.txt",
        f"--prompts.validation {tmp_path}/train.txt",
        "--prompts.shuffle false",
        "--iterations 5",
        "--checkpoint.interval 1",
        "--checkpoint.keep 9",
        "--reward.class_path tiny_parts.CaptionJudge",
        "--reward.blind blue",
        "--reward.flat yellow",
    ]
    witness = ["--policy.class_path tiny_parts.WitnessPolicy", f"--policy.folder {tmp_path}"]
    train_on_two(tmp_path / "two", *arguments, *witness)
    two = rows(tmp_path / "two")[1:]
    assert [row["num_skipped_groups"] for row in two] == [0, 1, 1, 2, 0]
    assert [row["num_invalid_videos"] for row in two] == [0, 4, 0, 4, 0]
    assert [row["frac_reward_zero_std"] for row in two] == [0.0, 0.0, 0.5, 0.5, 0.0]
    assert [row["ratio_drift"] for row in two] == [0.0, 0.0, 0.0, None, 0.0]
    assert [row["grad_norm"] is None for row in two] == [False, False, False, True, False]
    hashes = [(tmp_path / f"rank_{rank}.txt").read_text().split() for rank in (0, 1)]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 9, (
        "two evaluations, of two prompts a rank one after the other, and five rollouts"
    )
    assert len(set(hashes[0])) == 5, "untrained twice, moved four times"
    assert hashes[0][5] == hashes[0][6], (
        "iteration 4 trains nothing, so that 5 has the weights of 4"
    )

    one = train(tmp_path / "one", *arguments).trained_rows
    for number in (0, 1):
        assert one[number]["grad_norm"] == pytest.approx(two[number]["grad_norm"], rel=1e-3), (
            "one rank's share of nothing counts as such"
        )
    for ours, theirs in zip(one, two, strict=True):
        assert ours["num_skipped_groups"] == theirs["num_skipped_groups"]


def test_a_rank_whose_judge_fails_ends_the_job_with_a_checkpoint(
    tmp_path: Path, tiny: Any, torchrun: Any
) -> None:
    begun = time.monotonic()
    broken = ["--iterations 500", "--reward.class_path tiny_parts.BrokenJudge"]
    job = torchrun(tiny(tmp_path / "run", *broken), 2, tmp_path)
    out = finish(job)
    assert time.monotonic() - begun < 55
    assert job.returncode != 0
    assert "Traceback" in out
    assert "RuntimeError: this judge broke on purpose" in out
    assert "tiny_parts.py" in out
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 3
    # Both ranks answered, so that the last finished iteration is kept.
    saved = tmp_path / "run" / "checkpoints" / "iteration_000002"
    checkpoint.verify(saved)
    (line,) = [line for line in out.splitlines() if line.startswith("stopped after iteration 2: ")]
    assert (
        f"rank 1 failed: RuntimeError: this judge broke on purpose; the checkpoint is {saved}"
        in line
    )
    assert line.endswith("--resume auto")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_is_named(
    tmp_path: Path, tiny: Any, forked: Any, stopped: int
) -> None:
    argv = ["--iterations 500 --checkpoint.interval 1 --runtime.timeout_minutes 0.15"]
    job = forked(["train", *tiny(tmp_path / "run", *argv)], tmp_path, 2)
    job.wait_for("iteration     2 ")
    os.kill(job.processes[stopped].pid, signal.SIGSTOP)
    out = job.finish(120)
    assert job.processes[1 - stopped].exitcode > 0
    assert f"no answer from rank {stopped}, which" in out
    assert "no checkpoint of it: RanksLost" in out
    assert "--resume auto" in out


def test_prompts_that_ranks_cannot_share(
    tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    run = train(tmp_path / "run")
    assert run.code == 2
    assert run.err.splitlines() == [
        "error: rollout.num_prompts: expected a multiple of the 3 processes, which share them, "
        "got 2"
    ]
    assert not run.folder.exists()
