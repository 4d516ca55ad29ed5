"""A run opened outside of training: its configuration, its judge, a checkpoint's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastgrpo.config import (
    ParallelConfig,
    PromptsConfig,
    RolloutConfig,
    RuntimeConfig,
    TrainConfig,
)
from fastgrpo.distributed import collectives, sharding
from fastgrpo.evaluation.options import SamplingOptions
from fastgrpo.shapes.judge import ShapesJudge
from fastgrpo.training import checkpoint, sampling
from fastgrpo.training.sampling import Unscored
from fastgrpo.training.trust import sign

CPU = torch.device("cpu")
SHAPES_JUDGE = "fastgrpo.shapes.judge.ShapesJudge"
STAGE_JUDGE = "fastgrpo.rewards.vlm.judge.StageJudge"
NO_ENGINE = {
    "class_path": "fastgrpo.rewards.vlm.qwen.TransformersEngine",
    "init_args": {"model": "/no/model"},
}
RECIPE = {
    "name": "written",
    "policy": {"class_path": "fastgrpo.shapes.policy.ShapesPolicy"},
    "prompts": {"train": "train.txt"},
    "rollout": {"num_prompts": 3},
}


@pytest.fixture
def tiny_run(tmp_path: Path, tiny_policy: Any, one_rank: torch.device) -> dict[str, Any]:
    """A run folder with a checkpoint, without and with an average; what the checkpoints hold."""
    tensors = {}
    for iteration, seed in ((1, 5), (2, 6)):
        state = tiny_policy(seed).transformer.state_dict()
        tensors[iteration] = {"model": state}
    tensors[2]["ema"] = tiny_policy(7).transformer.state_dict()
    for iteration, saved in tensors.items():
        checkpoint.save(tmp_path / "checkpoints", iteration, saved, {}, keep=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(RECIPE | {"reward": {"class_path": "no"}}))
    return tensors


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("reward", ["no.such.Judge", SHAPES_JUDGE])
def test_a_run_is_read_without_its_judge(tmp_path: Path, reward: str) -> None:
    recipe = RECIPE | {"reward": {"class_path": reward}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    config = sampling.read_run(str(tmp_path))
    assert (config.name, config.rollout.num_prompts) == ("written", 3)
    assert isinstance(config.reward, Unscored)
    scores, valid = config.reward.score(torch.zeros(2, 1, 3, 1, 1), ["a", "b"], 1.0)
    assert (scores.shape, valid.tolist()) == ((2, 0), [True, True])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "run: expected a run folder with config.yaml, found none at"),
        ("a: [", "config.yaml: cannot be read as YAML"),
        ("- 1\n", "config.yaml: expected keys and their values"),
    ],
)
def test_a_run_that_cannot_be_read(tmp_path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        sampling.read_run(str(tmp_path))


def test_own_checkpoints_may_lie_on_another_disk(tmp_path: Path) -> None:
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    run.mkdir()
    scratch.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(RECIPE | {"reward": {"class_path": "no"}}))
    (run / "checkpoints").symlink_to(scratch)
    with pytest.raises(ValueError, match="checkpoints: expected a file in"):
        sampling.read_run(str(run))
    sign(run)
    assert sampling.read_run(str(run)).name == "written"
    (run / "judge.json").symlink_to(scratch)
    with pytest.raises(ValueError, match=r"judge\.json: expected a file in"):
        sampling.read_run(str(run))


def test_weights_are_told_apart_by_every_byte(tmp_path: Path) -> None:
    """A fine-tuned head may be the only change, in the middle of a file of the same size."""
    with open(tmp_path / "weights", "wb") as file:
        file.truncate(40 << 20)
    section = {"init_args": {"engine": [{"model": str(tmp_path)}]}}
    before = sampling.local_contents(section)
    assert before == sampling.local_contents(section)
    with open(tmp_path / "weights", "r+b") as file:
        file.seek((10 << 20) + 99)
        file.write(b"x")
    assert before != sampling.local_contents(section)
    assert before.keys() == {str(tmp_path)}


@pytest.mark.usefixtures("tiny_run")
def test_a_checkpoint_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (tmp_path / "checkpoints" / f"iteration_00000{i}" for i in (1, 2))
    assert sampling.find_checkpoint("latest", tmp_path) == second
    assert sampling.find_checkpoint("iteration_000001", tmp_path) == first
    monkeypatch.chdir(tmp_path / "checkpoints")
    assert sampling.find_checkpoint(str(first), Path("elsewhere")) == first
    config, path = sampling.open_run(str(tmp_path), "iteration_000001")
    assert (config.name, path) == ("written", first)
    with pytest.raises(FileNotFoundError, match=r"found none at .* or third"):
        sampling.find_checkpoint("third", tmp_path)
    (first / "state.json").write_text("{ }")
    with pytest.raises(ValueError, match=r"state\.json"):
        sampling.open_run(str(tmp_path), "iteration_000001")


def test_trained_weights_are_the_average_if_there_is_one(
    tmp_path: Path, tiny_policy: Any, tiny_run: dict[str, Any]
) -> None:
    for iteration, part in ((1, "model"), (2, "ema")):
        policy = tiny_policy()
        path = sampling.find_checkpoint(f"iteration_00000{iteration}", tmp_path)
        sampling.load_trained(path, policy)
        assert equal(policy.transformer.state_dict(), tiny_run[iteration][part])


@pytest.mark.parametrize("shard", ["none", "full"])
def test_base_weights_are_embedded_loaded_and_sharded(
    tiny_policy: Any, tiny_judge: Any, one_rank: torch.device, shard: Any
) -> None:
    """Training's own settings, such as offloading and compilation, are not taken."""
    calls: list[Any] = []

    class Watched(tiny_policy):  # type: ignore[misc]
        def embed(self, prompts: Sequence[str], device: torch.device) -> None:
            calls.append(list(prompts))

        def load(self, device: torch.device) -> None:
            calls.append(device)

    parallel = ParallelConfig(shard=shard, compile=True, activations="full")
    if shard == "full":
        parallel = dataclasses.replace(parallel, cpu_offload=True)
    config = TrainConfig(Watched(), tiny_judge(), PromptsConfig("-"), parallel=parallel)
    sampling.load_base(config, ["a", "b"], one_rank)
    network = config.policy.transformer
    assert calls == [["a", "b"], CPU]
    assert isinstance(network, FSDPModule) == (shard == "full")
    assert equal(sharding.full_state_dict(network), tiny_policy().transformer.state_dict())
    assert "forward" not in vars(network), "compiled or computed again"


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        ({"class_path": SHAPES_JUDGE}, None),
        ({"class_path": "no.such.Judge"}, "no.such.Judge"),
        ({"class_path": STAGE_JUDGE, "init_args": {"engine": NO_ENGINE}}, "FileNotFoundError: "),
    ],
)
def test_a_judge_that_cannot_be_loaded_scores_nothing(
    tmp_path: Path,
    one_rank: torch.device,
    capsys: pytest.CaptureFixture[str],
    reward: dict[str, Any],
    problem: str | None,
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"reward": reward}))
    judge = sampling.load_judge(path, one_rank)
    said = capsys.readouterr()
    assert said.err == ""
    if problem is None:
        assert type(judge) is ShapesJudge
        assert said.out == ""
    else:
        assert type(judge) is Unscored
        assert said.out.startswith("note: no scores, the run's judge cannot be loaded: ")
        assert problem in said.out


def test_the_other_processes_are_joined_for_a_block() -> None:
    assert not collectives.started()
    runtime = RuntimeConfig(device="cpu")
    with sampling.joined(runtime) as device:
        assert device == CPU
        assert collectives.started()
        with sampling.joined(runtime):  # by the caller already
            pass
        assert collectives.started()
    assert not collectives.started()


def test_options_replace_the_runs_settings(tiny_policy: Any, tiny_judge: Any) -> None:
    trained = RolloutConfig(height=2, width=2, num_frames=2, num_inference_steps=9)
    config = TrainConfig(tiny_policy(), tiny_judge(), PromptsConfig("-"), rollout=trained)
    cfg = SamplingOptions("run", num_inference_steps=4).rollout(config)
    assert cfg == dataclasses.replace(
        trained, sde="ode", sde_window="all", num_generations=1, num_inference_steps=4
    )
    assert SamplingOptions("run", sde="cps").rollout(config).sde == "cps"
    with pytest.raises(ValueError, match=r"expected num_frames, height, width \(2, 2, 2\)"):
        SamplingOptions("run", height=3).rollout(config)
    with pytest.raises(ValueError, match="num_videos: expected at least 1, got 0"):
        SamplingOptions("run", num_videos=0)
