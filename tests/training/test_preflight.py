"""What is checked before work starts."""

from __future__ import annotations

import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastgrpo_kernels import dispatch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgrpo.config import (
    EvaluationConfig,
    ParallelConfig,
    PromptsConfig,
    RolloutConfig,
    TrackingConfig,
    TrainConfig,
    UpdateConfig,
)
from fastgrpo.distributed import collectives
from fastgrpo.errors import UserError
from fastgrpo.training.preflight import (
    check_attention,
    check_config,
    check_job,
    checked_prompts,
)


@pytest.fixture
def config(tmp_path: Path, tiny_policy: Any, tiny_judge: Any) -> TrainConfig:
    """Valid throughout, with five training prompts and two validation ones."""
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


def test_a_valid_configuration_gives_its_prompts(config: TrainConfig) -> None:
    assert check_config(config) == (["a", "b", "c", "d", "e"], ["x", "y"])
    without = dataclasses.replace(
        config, prompts=dataclasses.replace(config.prompts, validation=None)
    )
    assert check_config(without) == (["a", "b", "c", "d", "e"], ["a", "b", "c"])


@pytest.mark.parametrize(
    ("section", "values", "parts"),
    [
        ("rollout", {"height": 3}, ["rollout.height", "(2, 2, 2)", "(2, 3, 2)"]),
        ("pacing", {"thresholds": (0.5,)}, ["pacing.thresholds", "expected 2", "(0.5,)"]),
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
        check_config(wrong)
    for part in parts:
        assert part in str(caught.value)


def test_prompts_that_ranks_cannot_share_are_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        ValueError, match=r"rollout\.num_prompts: expected a multiple of the 3 processes.*got 8"
    ):
        check_config(config)


def test_prompts_that_the_policy_cannot_take_are_refused_by_key_and_file(
    config: TrainConfig, tmp_path: Path
) -> None:
    def fail(prompts: list[str]) -> None:
        assert prompts == ["x", "y"]
        raise ValueError("no x")

    assert checked_prompts(
        config.policy, str(tmp_path / "validation.txt"), "prompts.validation"
    ) == ["x", "y"]
    config.policy.check_prompts = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match=r"prompts\.validation: no x") as caught:
        checked_prompts(config.policy, str(tmp_path / "validation.txt"), "prompts.validation")
    assert str(tmp_path / "validation.txt") in str(caught.value)


def test_optimizer_steps_are_no_matter_of_processes(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as videos are kept of all prompts, also on processes that keep fewer each."""
    update = dataclasses.replace(config.update, num_best=1, num_worst=1, optimizer_steps=8)
    rollout = dataclasses.replace(config.rollout, num_prompts=4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_config(dataclasses.replace(config, update=update, rollout=rollout))


@pytest.mark.parametrize(
    "attention", ["fa3", "fa4", "_native_cudnn", "_native_flash", "_native_math"]
)
def test_an_attention_that_would_switch_the_judges_kernels(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    monkeypatch.setattr(config.policy, "attention", attention)
    monkeypatch.setattr(config.reward, "memory_bytes", 0)
    check_attention(config.policy, config.reward)  # a judge elsewhere
    monkeypatch.setattr(config.reward, "memory_bytes", 1)
    with pytest.raises(ValueError, match=f"policy.attention: expected native.*got {attention}"):
        check_config(config)
    monkeypatch.setattr(config.reward, "memory_bytes", 0)
    monkeypatch.setattr(
        config.reward, "engine", SimpleNamespace(attention="sdpa"), raising=False
    )  # on another GPU of this process
    with pytest.raises(ValueError, match=r"policy\.attention"):
        check_attention(config.policy, config.reward)
    monkeypatch.setattr(config.policy, "attention", "native")
    check_config(config)


def test_sdpa_kernel_is_for_all_threads() -> None:
    """Why they are refused: torch's choice is not a thread's own."""
    with sdpa_kernel(SDPBackend.MATH), ThreadPoolExecutor(1) as judge:
        assert not judge.submit(torch.backends.cuda.flash_sdp_enabled).result()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_job_names_its_backend_and_refuses_what_cannot_serve(
    config: TrainConfig, one_rank: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "FORCED", "reference")
    assert check_job(config, "", one_rank) == "reference"
    monkeypatch.setattr(dispatch, "FORCED", "cuda")
    with pytest.raises(ValueError, match="'cuda' cannot serve this call: expected cuda tensors"):
        check_job(config, "", one_rank)
    monkeypatch.setattr(dispatch, "FORCED", None)
    apex = UpdateConfig(optimizer="apex_fused_adam")
    sharded = dataclasses.replace(config, update=apex, parallel=ParallelConfig(shard="full"))
    with pytest.raises(ValueError, match=r"update\.optimizer: apex_fused_adam cannot"):
        check_job(sharded, "", one_rank)


def test_ranks_of_two_configurations_are_no_job(
    config: TrainConfig, one_rank: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rank's value is a stand-in; tests/distributed/test_collectives.py runs two."""
    monkeypatch.setattr(collectives, "gather", lambda value, awaited: [value, "a: 2"])
    with pytest.raises(UserError, match=r"the configuration: expected .* ranks \[1\] differ"):
        check_job(config, "a: 1", one_rank)
