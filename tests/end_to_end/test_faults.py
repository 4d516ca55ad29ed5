"""What goes wrong, and what the run makes of it: damaged checkpoints, numbers that are not finite,
configurations that cannot be.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo.shapes.policy import ShapesPolicy
from fastgrpo.training.checkpoint_names import list_checkpoints

Train = Callable[..., Any]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, train: Train) -> Path:
    return train(
        tmp_path_factory.mktemp("faults") / "whole",
        "--iterations 4 --checkpoint.interval 1",
    ).folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, train: Train, interrupt: Any) -> Path:
    """A run of four iterations that was stopped after the third, with three checkpoints."""
    folder = tmp_path_factory.mktemp("faults") / "stopped"
    with interrupt(3):
        train(folder, "--iterations 4 --checkpoint.interval 1")
    return folder


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path, position: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[position if position >= 0 else len(content) // 2] ^= 0x10
    file.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "truncated": ("__0_0.distcp", truncate),
    "flipped": ("__0_0.distcp", flip),
    "missing": (".metadata", Path.unlink),
    "manifest": ("manifest.json", lambda file: file.write_text("{}")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    tmp_path: Path,
    train: Train,
    stopped: Path,
    uninterrupted: Path,
    assert_same_end: Any,
    damage: str,
) -> None:
    name, spoil = DAMAGES[damage]
    shutil.copytree(stopped, tmp_path / "run", symlinks=True)
    spoil(tmp_path / "run" / "checkpoints" / "iteration_000003" / name)
    run = train(tmp_path / "run", "--iterations 4 --checkpoint.interval 1 --resume auto")
    assert run.code == 0
    (refused,) = [line for line in run.out.splitlines() if "refused" in line]
    assert "iteration_000003" in refused
    assert name in refused
    assert "resume: going on after iteration 2" in run.out
    assert (run.folder / "checkpoints" / "iteration_000003.refused").is_dir(), (
        "kept, for whoever wants to know why"
    )
    assert_same_end(run.folder, uninterrupted)


def contents(folder: Path) -> list[str]:
    return sorted(
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    )


def test_all_checkpoints_damaged(tmp_path: Path, train: Train, stopped: Path) -> None:
    """Exit code 2 and clear words, twice over; nothing is deleted, nothing is trained."""
    shutil.copytree(stopped, tmp_path / "run", symlinks=True)
    for whole in list_checkpoints(tmp_path / "run" / "checkpoints"):
        flip(whole / "__0_0.distcp")
    before = contents(tmp_path / "run")
    for _ in range(2):
        run = train(tmp_path / "run", "--iterations 4 --resume auto")
        assert run.code == 2
        (line,) = run.err.splitlines()
        assert line.startswith("error: ")
        assert "every checkpoint" in line
        assert str(tmp_path / "run" / "checkpoints") in line
        assert contents(tmp_path / "run") == before


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch, each_step: Any) -> Any:
    """poison(f): velocities pass through f(velocity, iteration, number of the call in it); torch
    knows whether with gradient or without.
    """
    patches = []

    def begin(change: Callable[[Tensor, int, int], Tensor]) -> None:
        now = {"iteration": 0, "call": 0}
        own = ShapesPolicy.velocity

        def velocity(self: ShapesPolicy, *args: Any, **kwargs: Any) -> Tensor:
            now["call"] += 1
            return change(own(self, *args, **kwargs), now["iteration"], now["call"])

        monkeypatch.setattr(ShapesPolicy, "velocity", velocity)
        patches.append(each_step(lambda iteration: now.update(iteration=iteration, call=0)))
        patches[-1].__enter__()

    yield begin
    for patch in patches:
        patch.__exit__(None, None, None)


def spoiled_gradient(velocity: Tensor) -> Tensor:
    velocity.register_hook(lambda gradient: gradient * torch.nan)
    return velocity


SPOILS: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN in the loss": lambda velocity: velocity * torch.nan,
    "Inf in the loss": lambda velocity: velocity + torch.inf,
    "NaN in the gradient alone": spoiled_gradient,
}


@pytest.mark.parametrize("kind", SPOILS)
def test_an_update_that_is_not_finite_is_skipped(
    tmp_path: Path, train: Train, poison: Any, tensors: Any, kind: str
) -> None:
    """In iteration 2 of 3: weights, moments and averages stay, the step is counted, the run goes
    on.
    """
    poison(
        lambda velocity, iteration, call: (
            SPOILS[kind](velocity) if torch.is_grad_enabled() and iteration == 2 else velocity
        )
    )
    run = train(
        tmp_path / "run",
        "--checkpoint.interval 1 --checkpoint.keep 9 --update.ema_decay 0.5",
    )
    assert run.code == 0
    assert [row["num_skipped_updates"] for row in run.trained_rows] == [0, 1, 0]
    assert run.trained_rows[1]["grad_norm"] is None
    assert run.trained_rows[1]["reward"] is not None
    first, second, third = (
        tensors(run.folder / "checkpoints" / f"iteration_{i:06d}") for i in (1, 2, 3)
    )
    for name, value in first.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, second[name]), name
    moved = [
        name
        for name, value in second.items()
        if isinstance(value, Tensor) and not torch.equal(value, third[name])
    ]
    assert len(moved) > 100
    assert all(torch.isfinite(value).all() for value in third.values() if isinstance(value, Tensor))


def test_one_update_of_several_is_skipped(tmp_path: Path, train: Train, poison: Any) -> None:
    """Two optimizer steps an iteration, the first of iteration 1 spoiled: the second is made."""
    spoiled = set()

    def change(velocity: Tensor, iteration: int, call: int) -> Tensor:
        if torch.is_grad_enabled() and iteration == 1 and not spoiled:
            spoiled.add(call)
            return velocity * torch.nan
        return velocity

    poison(change)
    run = train(tmp_path / "run", "--iterations 2 --update.optimizer_steps 2")
    assert [row["num_skipped_updates"] for row in run.trained_rows] == [1, 0]
    assert [row["ratio_drift"] for row in run.trained_rows] == [None, 0.0], (
        "a drift that is not a number is not 0"
    )


def test_too_many_in_a_row_stop_the_run_with_a_checkpoint(
    tmp_path: Path, train: Train, poison: Any, tensors: Any
) -> None:
    poison(
        lambda velocity, iteration, call: (
            velocity * torch.nan if torch.is_grad_enabled() and iteration >= 2 else velocity
        )
    )
    run = train(
        tmp_path / "run",
        "--iterations 9 --update.max_skipped_updates 3 --checkpoint.interval 3",
    )
    assert run.code == 1
    assert [row["iteration"] for row in run.rows] == [0, 1, 2, 3, 4]
    (said,) = [
        line
        for line in run.out.splitlines()
        if line.startswith("stopped after iteration 4: 3 updates in a row")
    ]
    assert "update.max_skipped_updates" in said
    assert "--resume auto" in said
    assert (run.folder / "checkpoints" / "latest").resolve().name == "iteration_000004"
    before, last = (tensors(run.folder / "checkpoints" / f"iteration_{i:06d}") for i in (3, 4))
    assert all(
        torch.equal(value, last[name]) and torch.isfinite(value).all()
        for name, value in before.items()
        if isinstance(value, Tensor)
    )
    assert not (run.folder / "transformer").exists()


def test_a_run_in_which_nothing_can_be_scored_stops(tmp_path: Path, train: Train) -> None:
    """Captions start with "a": the judge sees none of them. Every iteration counts as an update
    that could not be made.
    """
    run = train(
        tmp_path / "run",
        "--reward.class_path tiny_parts.CaptionJudge",
        "--reward.blind",
        "a ",
        "--iterations 9 --update.max_skipped_updates 2 --scoring.max_invalid_share 1",
    )
    assert run.code == 1
    assert [row["iteration"] for row in run.rows] == [0, 1, 2]
    assert "no video had a score" in run.out
    assert (run.folder / "checkpoints" / "latest").resolve().name == "iteration_000002"


def test_a_run_stops_where_more_than_the_set_share_has_no_score(
    tmp_path: Path, train: Train
) -> None:
    """Half the videos of every group have no score, which the default allows and 0.4 does not."""
    arguments = [
        "--reward.class_path tiny_parts.HalfJudge --reward.error gone --iterations 3",
    ]
    whole = train(tmp_path / "allowed", *arguments)
    assert whole.code == 0
    assert [row["num_invalid_videos"] for row in whole.trained_rows] == [4, 4, 4]
    assert [row.get("eval/num_invalid_videos") for row in whole.rows] == [
        1,
        None,
        None,
        1,
    ]  # of three
    assert "1 videos without a score" in whole.out
    run = train(tmp_path / "run", *arguments, "--scoring.max_invalid_share 0.4")
    assert run.code == 1
    assert [row["iteration"] for row in run.rows] == [0, 1]
    assert (
        "50% of its videos got no score, and scoring.max_invalid_share is 40%; the judge: gone"
        in run.out
    )
    on = train(tmp_path / "run", *arguments, "--scoring.max_invalid_share 0.5 --resume auto")
    assert on.code == 0
    for row, expected in zip(on.trained_rows, whole.trained_rows, strict=True):
        assert row["reward"] == expected["reward"]


def test_what_a_judge_counts_and_says_of_itself_is_kept(tmp_path: Path, train: Train) -> None:
    arguments = [
        "--reward.class_path tiny_parts.HalfJudge --reward.error gone --iterations 1",
    ]
    run = train(tmp_path / "run", *arguments)
    assert [row["judge/asked"] for row in run.trained_rows] == [
        3 + 2 * 4
    ]  # the evaluation, and the iteration
    assert run.trained_rows[0]["time/backpressure"] >= 0
    assert json.loads((run.folder / "judge.json").read_text()) == {"error": "gone"}
    changed = train(
        tmp_path / "run",
        *arguments,
        "--reward.error lost --iterations 2 --resume auto",
    )
    assert (
        "resume: the judge has changed since the last start: error: 'gone' -> 'lost'" in changed.out
    )


def test_a_run_that_stopped_for_them_goes_on_when_they_are_gone(
    tmp_path: Path, train: Train, poison: Any
) -> None:
    sick = {"now": True}
    poison(
        lambda velocity, iteration, call: (
            velocity * torch.nan if torch.is_grad_enabled() and sick["now"] else velocity
        )
    )
    arguments = ["--iterations 3 --update.max_skipped_updates 2"]
    assert train(tmp_path / "run", *arguments).code == 1
    sick["now"] = False
    run = train(tmp_path / "run", *arguments, "--resume auto")
    assert run.code == 0
    assert [row["num_skipped_updates"] for row in run.trained_rows] == [1, 1, 0]


def test_only_those_in_a_row_count(tmp_path: Path, train: Train, poison: Any) -> None:
    poison(
        lambda velocity, iteration, call: (
            velocity * torch.nan if torch.is_grad_enabled() and iteration % 2 else velocity
        )
    )
    run = train(tmp_path / "run", "--iterations 5 --update.max_skipped_updates 2")
    assert run.code == 0
    assert [row["num_skipped_updates"] for row in run.trained_rows] == [1, 0, 1, 0, 1]


def test_latents_that_are_not_finite_make_invalid_videos(
    tmp_path: Path, train: Train, poison: Any
) -> None:
    """A group is a micro-batch of 4, sampled in 5 calls. 3 of the first group (skipped), one of the
    second (trained), all (no update).
    """
    videos = {2: (1, [0, 1, 3]), 3: (2, [2]), 4: (None, [0, 1, 2, 3])}

    def change(velocity: Tensor, iteration: int, call: int) -> Tensor:
        group, broken = videos.get(iteration, (0, []))
        if not torch.is_grad_enabled() and call in ((1, 6) if group is None else (5 * group - 4,)):
            velocity[broken] = torch.nan
        return velocity

    poison(change)
    run = train(tmp_path / "run", "--iterations 5 --scoring.max_invalid_share 1")
    assert run.code == 0
    assert [row["num_invalid_videos"] for row in run.trained_rows] == [0, 3, 1, 8, 0]
    assert [row["num_skipped_groups"] for row in run.trained_rows] == [0, 1, 0, 2, 0]
    assert [row["num_skipped_updates"] for row in run.trained_rows] == [0] * 5
    assert [row["ratio_drift"] for row in run.trained_rows] == [0.0, 0.0, 0.0, None, 0.0]
    assert run.trained_rows[3]["reward"] is None
    assert run.trained_rows[3]["grad_norm"] is None
    assert all(
        run.trained_rows[4][f"competence/{s}"] is not None
        for s in ("visual_quality", "text_alignment")
    )


FILES = {
    "empty.txt": "",
    "strange.txt": "a red square moving right\n" * 40 + "a mauve square moving right\n",
    "twice.yaml": "rollout:\n  eta: 0.5\nseed: 1\nrollout:\n  eta: 0.6\n",
}
# One or two of each layer that refuses; test_config.py, test_recipe_parser.py, test_prompts.py and
# test_preflight.py have the others. What the line names, by the arguments.
WITHOUT_WEIGHTS = {
    "--prompts.train empty.txt": ["prompts.train", "empty.txt", "at least one prompt"],
    "--prompts.train nowhere.txt": ["prompts.train", "nowhere.txt"],
    "--prompts.train .": ["prompts.train"],
    "--prompts.train strange.txt": ["prompts.train", "mauve", "strange.txt"],
    "--prompts.validation strange.txt": ["prompts.validation", "mauve"],
    "--config twice.yaml": ["rollout", "twice"],
    "--config nowhere.yaml": ["config", "nowhere.yaml"],
    "--rollout.num_generation 4": ["--rollout.num_generation"],
    "--rollout.height 17": ["rollout.height", "17"],
    "--update.num_best 4": ["rollout.num_generations", "num_best", "5"],
    "--pacing.gate literal": ["pacing.thresholds", "expected 3", "literal"],
    "--tracking.trackers [tensorbord]": ["tracking.trackers", "tensorbord", "tensorboard"],
    "--update.optimizer apex_fused_adam": ["update.optimizer", "apex"],
    "--policy.class_path fastgrpo.shapes.judge.ShapesJudge": ["policy", "ShapesJudge", "Policy"],
    "--reward fastgrpo.shapes.judge.ShapesJudge --reward.noise -1": ["noise", "-1"],
}
WITH_WEIGHTS = {
    "--policy.checkpoint nowhere": ["policy.checkpoint", "nowhere"],
    "--policy.checkpoint .": ["policy.checkpoint", "config.json"],
}
if not torch.cuda.is_available():
    WITHOUT_WEIGHTS["--runtime.device cuda"] = ["runtime.device", "cuda", "GPU"]


@pytest.fixture
def fault_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_one_clear_line(outcome: Any, words: list[str]) -> None:
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
    assert len(line) < 600


@pytest.mark.parametrize("fault", WITHOUT_WEIGHTS)
def test_wrong_configuration_is_one_line_before_any_work(
    fault_folder: Path, train: Train, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def load(self: ShapesPolicy, device: torch.device) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(ShapesPolicy, "load", load)
    run = train(fault_folder / "runs" / "run", fault)
    assert_one_clear_line(run, WITHOUT_WEIGHTS[fault])
    assert not (fault_folder / "runs").exists(), "nor is a folder made"


@pytest.mark.parametrize("fault", WITH_WEIGHTS)
def test_wrong_checkpoint_is_one_line_and_leaves_the_name_free(
    fault_folder: Path, train: Train, fault: str
) -> None:
    run = train(fault_folder / "runs" / "run", fault)
    assert_one_clear_line(run, WITH_WEIGHTS[fault])
    assert train(fault_folder / "runs" / "run", "--iterations 0").code == 0


def test_the_rank_that_speaks(
    fault_folder: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank finds the error; one says it."""
    monkeypatch.setenv("RANK", "1")
    silent = train(fault_folder / "runs" / "run", "--prompts.train empty.txt")
    assert (silent.code, silent.out, silent.err) == (2, "", "")
