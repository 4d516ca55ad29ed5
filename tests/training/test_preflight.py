"""The parts of a run that need no run: what is checked first, what is said, and how it is asked to
stop.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgrpo.config import (
    EvaluationConfig,
    PromptsConfig,
    RolloutConfig,
    RuntimeConfig,
    TrackingConfig,
    TrainConfig,
)
from fastgrpo.training.loop import compute_dtype, reason_to_stop, record
from fastgrpo.training.validation import evaluate
from fastgrpo.training.signals import StopSignals, stop_signals
from fastgrpo.training.run_folder import claim_folder, describe_judge, differences, is_used, keep_old_config, open_log, resume_command
from fastgrpo.training.preflight import captions, check, check_attention, warn_of_idle_accumulation

logger = logging.getLogger("fastgrpo")


@pytest.fixture
def config(tmp_path: Path, tiny_policy: Any, tiny_judge: Any) -> TrainConfig:
    """Valid throughout, with five training captions and two validation ones."""
    (tmp_path / "train.txt").write_text("a\nb\nc\nd\ne\n")
    (tmp_path / "validation.txt").write_text("x\ny\n")
    return TrainConfig(
        policy=tiny_policy(),
        reward=tiny_judge(),
        output_dir=str(tmp_path),
        name="run",
        tracking=TrackingConfig(trackers=()),
        prompts=PromptsConfig(
            train=str(tmp_path / "train.txt"), validation=str(tmp_path / "validation.txt")
        ),
        rollout=RolloutConfig(height=2, width=2, num_frames=2),
        evaluation=EvaluationConfig(num_videos=3),
    )


def test_a_valid_configuration_gives_its_captions(config: TrainConfig) -> None:
    assert check(config) == (["a", "b", "c", "d", "e"], ["x", "y"])
    without = dataclasses.replace(
        config, prompts=dataclasses.replace(config.prompts, validation=None)
    )
    assert check(without) == (["a", "b", "c", "d", "e"], ["a", "b", "c"])


@pytest.mark.parametrize(
    ("section", "values", "parts"),
    [
        ("rollout", {"height": 3}, ["rollout.height", "(2, 2, 2)", "(2, 3, 2)"]),
        ("pacing", {"thresholds": (0.5,)}, ["pacing.thresholds", "2", "1"]),
        ("tracking", {"trackers": ("nonsense",)}, ["tracking.trackers", "nonsense"]),
        ("prompts", {"train": "none.txt"}, ["prompts.train", "none.txt"]),
        ("prompts", {"validation": "none.txt"}, ["prompts.validation", "none.txt"]),
        ("update", {"optimizer": "apex_fused_adam"}, ["update.optimizer", "NVIDIA"]),
    ],
)
def test_what_can_be_known_before_weights_are_loaded_is_checked(
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    values: dict[str, Any],
    parts: list[str],
) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    wrong = dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        check(wrong)
    for part in parts:
        assert part in str(caught.value)


def test_prompts_that_ranks_cannot_share_are_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        ValueError, match=r"rollout\.num_prompts: expected a multiple of the 3 processes.*got 8"
    ):
        check(config)


def test_captions_that_the_policy_cannot_take_are_refused_by_key_and_file(
    config: TrainConfig, tmp_path: Path
) -> None:
    def fail(prompts: list[str]) -> None:
        assert prompts == ["x", "y"]
        raise ValueError("no x")

    assert captions(config, str(tmp_path / "validation.txt"), "prompts.validation") == ["x", "y"]
    config.policy.check_prompts = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match=r"prompts\.validation: no x") as caught:
        captions(config, str(tmp_path / "validation.txt"), "prompts.validation")
    assert str(tmp_path / "validation.txt") in str(caught.value)


def test_a_used_folder_is_claimed_only_to_go_on(config: TrainConfig, one_rank: Any) -> None:
    folder = config.run_folder
    assert not is_used(folder)
    first = claim_folder(config)
    assert folder.is_dir()
    with pytest.raises(FileExistsError, match="another process that is still running"):
        claim_folder(dataclasses.replace(config, resume="auto"))
    first.close()  # as a process that ends or dies does
    claim_folder(config).close()  # an empty one is nobody's
    for trace in (folder / "metrics.jsonl", folder / "checkpoints"):
        trace.mkdir() if trace.name == "checkpoints" else trace.touch()
        assert is_used(folder)
        with pytest.raises(FileExistsError, match=r"--resume auto.*--name") as caught:
            claim_folder(config)
        assert str(folder) in str(caught.value)
        claim_folder(dataclasses.replace(config, resume="auto")).close()
        trace.rmdir() if trace.name == "checkpoints" else trace.unlink()


@pytest.mark.parametrize(
    ("choice", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("fp32", "cuda", torch.float32),
        ("bf16", "cpu", torch.bfloat16),
    ],
)
def test_the_compute_dtype(
    config: TrainConfig, choice: Any, device: str, dtype: torch.dtype
) -> None:
    asked = dataclasses.replace(config, runtime=RuntimeConfig(compute_dtype=choice))
    assert compute_dtype(asked, torch.device(device)) == dtype


def test_differences_between_two_configurations() -> None:
    before = {
        "a": 1,
        "same": [1, 2],
        "section": {"x": 0.5, "y": {"z": "t"}, "gone": None},
        "turned": {"k": 1},
    }
    now = {"a": 2, "same": [1, 2], "section": {"x": 0.5, "y": {"z": "u"}, "new": 3}, "turned": 4}
    assert differences(before, now) == [
        "a: 1 -> 2",
        "section.new: None -> 3",
        "section.y.z: 't' -> 'u'",
        "turned: {'k': 1} -> 4",
    ]
    assert differences(before, before) == []


def test_without_captions_there_is_no_evaluation() -> None:
    class Untouched:
        config = judge = None

    assert evaluate(Untouched(), [], 0) == {}  # type: ignore[arg-type]


def test_the_log_holds_rows_and_the_configuration(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    class Part:
        judge = type("Queue", (), {"reward": config.reward})

    with open_log(config, "name: run\n", None) as log:
        record(log, {"iteration": 1, "reward": 0.25, "rewards/red/mean": 0.5}, Part())  # type: ignore[arg-type]
    assert json.loads((config.run_folder / "metrics.jsonl").read_text()) == {
        "iteration": 1,
        "reward": 0.25,
        "rewards/red/mean": 0.5,
    }
    assert (config.run_folder / "config.yaml").read_text() == "name: run\n"
    assert "0.250" in capsys.readouterr().out
    assert {p.name for p in config.run_folder.iterdir()} == {"metrics.jsonl", "config.yaml"}


def test_only_rank_0_has_a_log_and_speaks(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger.info("heard")
    assert capsys.readouterr().out == "heard\n"
    monkeypatch.setenv("RANK", "1")
    logger.info("unheard")
    with open_log(config, "name: run\n", None) as log:
        assert log is None
        record(log, {"iteration": 1}, None)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    assert not config.run_folder.exists()


def test_a_changed_configuration_leaves_the_old_one_behind(tmp_path: Path) -> None:
    keep_old_config(tmp_path, "a: 1\n", 3)  # none yet
    (tmp_path / "config.yaml").write_text("a: 1\n")
    keep_old_config(tmp_path, "a: 1\n", 3)  # the same
    keep_old_config(tmp_path, "a: 2\n", None)  # a new run
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    keep_old_config(tmp_path, "a: 2\n", 3)
    assert (tmp_path / "config.until_000003.yaml").read_text() == "a: 1\n"


def test_accumulation_that_never_fills_is_said(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    update = dataclasses.replace(config.update, num_best=1, num_worst=1, gradient_accumulation=8)
    rollout = dataclasses.replace(config.rollout, num_prompts=4)
    warn_of_idle_accumulation(dataclasses.replace(config, update=update, rollout=rollout))
    assert capsys.readouterr().out == ""  # 4 prompts x 2 videos fill it
    monkeypatch.setenv("WORLD_SIZE", "2")
    warn_of_idle_accumulation(dataclasses.replace(config, update=update, rollout=rollout))
    assert (
        "at most 4 videos an iteration, so gradients are scaled by 0.5; with 2 processes give it 4"
        in capsys.readouterr().out
    )


def test_several_nodes_are_started_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastgrpo/train.py"])
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert (
        resume_command(Path("a"))
        == "(your launcher) fastgrpo/train.py --config a/config.yaml --resume auto"
    )


def test_the_command_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As this process was started: by torchrun or python, with train.py or `-m fastgrpo train`; a
    folder with a blank in it too.
    """
    monkeypatch.setattr(sys, "argv", ["some/where/train.py", "--config", "x"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    words = shlex.split(resume_command(Path("my runs/a")))
    assert words == [
        sys.executable,
        "some/where/train.py",
        "--config",
        "my runs/a/config.yaml",
        "--resume",
        "auto",
    ]
    monkeypatch.setattr(sys, "argv", ["some/where/__main__.py", "train"])
    assert shlex.split(resume_command(Path("a")))[1:4] == ["-m", "fastgrpo", "train"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert re.search(
        r"torchrun'? --standalone --nproc-per-node 4 -m fastgrpo train --config a/config\.yaml",
        resume_command(Path("a")),
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_and_a_second_one_changes_nothing(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert isinstance(stop, StopSignals)
        assert stop.requested is False
        for _ in range(2):
            os.kill(os.getpid(), number)
            assert stop.requested is True
    assert signal.getsignal(number) is before
    assert capsys.readouterr().out.count(number.name) == 1
    with stop_signals() as again:
        assert again.requested is False


def test_signals_are_given_back_after_an_error() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyError), stop_signals():
        raise KeyError
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_judge_that_changes_with_a_resume_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "judge.json"
    describe_judge(path, {"engine": {"model": "a"}, "seed": 0}, resumed=False)
    assert json.loads(path.read_text()) == {"engine": {"model": "a"}, "seed": 0}
    describe_judge(path, {"engine": {"model": "b"}, "seed": 0}, resumed=True)
    assert (
        capsys.readouterr().out
        == "resume: the judge has changed since the run began: engine.model: 'a' -> 'b'\n"
    )
    assert [file.name for file in tmp_path.iterdir()] == [
        "judge.json"
    ]  # nothing half written beside it
    describe_judge(
        path, {"engine": {"model": "c"}, "seed": 0}, resumed=False
    )  # a new run has nothing to compare with
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "attention", ["fa3", "fa4", "_native_cudnn", "_native_flash", "_native_math"]
)
def test_an_attention_that_would_switch_the_judges_kernels(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    monkeypatch.setattr(config.policy, "attention", attention, raising=False)
    monkeypatch.setattr(config.reward, "memory_bytes", 0, raising=False)
    check_attention(config)  # a judge elsewhere
    monkeypatch.setattr(config.reward, "memory_bytes", 1)
    with pytest.raises(ValueError, match=f"policy.attention: expected native.*got {attention}"):
        check(config)
    monkeypatch.setattr(config.reward, "memory_bytes", 0)
    monkeypatch.setattr(
        config.reward, "engine", SimpleNamespace(attention="sdpa"), raising=False
    )  # on another GPU of this process
    with pytest.raises(ValueError, match=r"policy\.attention"):
        check_attention(config)
    monkeypatch.setattr(config.policy, "attention", "native")
    check(config)


def test_sdpa_kernel_is_for_all_threads() -> None:
    """Why they are refused: torch's choice is not a thread's own."""
    with sdpa_kernel(SDPBackend.MATH), ThreadPoolExecutor(1) as judge:
        assert not judge.submit(torch.backends.cuda.flash_sdp_enabled).result()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_why_a_run_stopped(config: TrainConfig, one_rank: torch.device) -> None:
    class Stopped:
        skipped_in_a_row, invalid_share = 2, 0.75
        judge = SimpleNamespace(last_errors=lambda: {"http://here": "gone"})

    stopped: Any = Stopped()
    stopped.config = config
    assert (
        reason_to_stop(stopped)
        == "75% of its videos got no score, and scoring.max_invalid_share is 50%; http://here: gone"
    )
    stopped.skipped_in_a_row = config.update.max_skipped_updates
    assert reason_to_stop(stopped).startswith(
        "5 updates in a row (update.max_skipped_updates) could not be made"
    )
