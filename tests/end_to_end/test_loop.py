"""The loop through `fastgrpo.cli.train.main`: the ratio before the first update, the files of a
run, and what an update does to the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

import fastgrpo.training.step
import fastgrpo.training.validation
from fastgrpo.shapes.captions import train_captions
from fastgrpo.shapes.policy import SHIPPED_CHECKPOINT

PACKAGE = Path(fastgrpo.__file__).resolve().parent
STAGES = ("visual_quality", "temporal_smoothness", "text_alignment")
NUM_STEPS = 5


def of_model(state: dict[str, Any], part: str = "model/") -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(part): value for name, value in state.items() if name.startswith(part)
    }


def steps_trained(row: dict[str, Any]) -> list[int]:
    return sorted(int(key.rpartition("_")[2]) for key in row if key.startswith("ratio_drift/step_"))


GUIDED = " --rollout.guidance_scale 3"
SLIDING = "--rollout.sde_window sliding --rollout.window_size 2 --rollout.window_interval "
SETTINGS = [
    *[
        f"--rollout.sde {kind} --rollout.guidance_scale {scale}"
        for kind in ("dance", "flow", "linear", "cps")
        for scale in (1, 3)
    ],
    f"{SLIDING}1",
    f"{SLIDING}1 --rollout.window_order random --rollout.sde cps{GUIDED}",
    "--rollout.sde_window single",
    f"--rollout.sde_window single --rollout.sde flow{GUIDED}",
    # One video each, and four videos that three steps cannot share evenly.
    "--update.optimizer_steps 8 --update.num_best 2 --update.num_worst 2",
    "--update.optimizer_steps 3",
    "--update.ema_decay 0.5",
    f"--update.kl_coef 0.5{GUIDED}",
    f"--update.cfg_grad cond_only{GUIDED}",
    "--update.timestep_fraction 1.0",
    "--update.num_worst 0",
    "--update.max_grad_norm 1e-3 --update.weight_decay 0.1",
    # Eight videos in threes, and transitions too; one by one; more than there are.
    "--rollout.micro_batch_size 3",
    "--rollout.micro_batch_size 1",
    f"--rollout.micro_batch_size 32{GUIDED}",
    "--rollout.num_prompts 1 --rollout.num_generations 5 --rollout.micro_batch_size 2",
    "--rollout.num_inference_steps 2",
    "--rollout.same_noise false --rollout.decode final --rollout.timestep_rounding none "
    "--rollout.shift 1",
    f"--runtime.compute_dtype bf16{GUIDED}",
    *[
        f"--pacing.mode {mode}"
        for mode in ("self_paced", "one_stage", "two_stage", "joint", "static")
    ],
    "--pacing.mode static --pacing.static_stage 2",
    "--pacing.gate literal --pacing.thresholds [0.5,0.3,0.2]",
    "--pacing.competence batch --pacing.saturation hoyer",
    "--pacing.competence group --pacing.saturation off",
]


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight"
)  # bf16 on the CPU has no fused RMSNorm
@pytest.mark.parametrize("overrides", SETTINGS, ids=lambda overrides: overrides.replace("--", ""))
def test_ratio_is_exactly_one_before_the_first_update(
    tmp_path: Path, train: Callable[..., Any], overrides: str
) -> None:
    run = train(tmp_path / "run", "--iterations 2", overrides)
    assert run.code == 0
    rows = run.trained_rows
    assert [row["iteration"] for row in rows] == [1, 2]
    for row in rows:
        assert row["ratio_drift"] == 0.0
        steps = steps_trained(row)
        assert steps
        assert all(row[f"ratio_drift/step_{step:02d}"] == 0.0 for step in steps)
        assert max(steps) < NUM_STEPS - 1, "the last transition is never trained"
        assert row["grad_norm"] > 0
        assert (
            row["num_skipped_groups"]
            == row["num_invalid_videos"]
            == row["num_skipped_updates"]
            == 0
        )
        assert math.isclose(sum(row[f"weights/{stage}"] for stage in STAGES), 1.0, abs_tol=1e-12)


def test_ratio_drift_shows_weights_that_moved_between_rollout_and_update(
    tmp_path: Path, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: with weights moved by one part in 100,000, it would fail."""
    update = fastgrpo.training.step.update

    def late(policy: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            policy.transformer.proj_out.weight.mul_(1 + 1e-5)
        return update(policy, *args, **kwargs)

    monkeypatch.setattr(fastgrpo.training.step, "update", late)
    run = train(tmp_path / "run", "--iterations 2 --rollout.guidance_scale 3")
    assert all(0 < row["ratio_drift"] < 1e-3 for row in run.trained_rows)


def test_later_optimizer_steps_of_an_iteration_are_off_policy(
    tmp_path: Path, train: Callable[..., Any]
) -> None:
    """Two steps: the second sees other weights, so its ratios leave 1, though the drift, taken from
    the first, stays 0.
    """
    on, off = (
        train(
            tmp_path / name,
            f"--iterations 1 --update.clip_range 1e-7 --update.optimizer_steps {steps}",
        ).trained_rows[0]
        for name, steps in (("on", 1), ("off", 2))
    )
    assert on["approx_kl"] == 0 == on["clip_ratio"]
    assert off["approx_kl"] > 0
    assert off["clip_ratio"] > 0
    assert on["ratio_drift"] == off["ratio_drift"] == 0


def test_which_steps_are_trained(tmp_path: Path, train: Callable[..., Any]) -> None:
    def trained(name: str, *overrides: str) -> list[list[int]]:
        run = train(tmp_path / name, "--iterations 4 --rollout.num_inference_steps 6", *overrides)
        return [steps_trained(row) for row in run.trained_rows]

    assert trained("sliding", f"{SLIDING}2") == [[0, 1], [0, 1], [1, 2], [1, 2]]
    assert trained("every", "--update.timestep_fraction 1.0") == [[0, 1, 2, 3, 4]] * 4
    single = trained("single", "--rollout.sde_window single --rollout.num_prompts 1")
    assert all(len(steps) == 1 and steps[0] < 3 for steps in single)
    assert len({steps[0] for steps in single}) > 1


def test_the_recipe_as_it_stands(
    tmp_path: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two iterations of `make train`: the shipped recipe, captions, checkpoint and judge, with a
    window of four steps in the second run.
    """
    monkeypatch.chdir(tmp_path)
    argv = ["--config", str(PACKAGE / "recipes" / "shapes.yaml"), "--iterations 2"]
    run = start(tmp_path / "runs" / "shapes", argv)
    assert run.code == 0
    assert [row["ratio_drift"] for row in run.trained_rows] == [0.0, 0.0]
    assert steps_trained(run.trained_rows[0]) == list(range(15)), (
        "of 32 videos each trains 9 of the first 15 steps"
    )
    assert all(
        0 < row[f"eval/rewards/{stage}/mean"] < 1
        for row in (run.rows[0], run.rows[-1])
        for stage in STAGES
    )
    assert (
        run.rows[0][f"eval/rewards/{STAGES[0]}/mean"]
        > run.rows[0][f"eval/rewards/{STAGES[1]}/mean"]
        > run.rows[0][f"eval/rewards/{STAGES[2]}/mean"]
    )
    assert len(list((run.folder / "samples" / "iteration_000000").glob("*.mp4"))) == 8
    assert (run.folder / "tensorboard").is_dir(), "on by default"


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file of a tree by its name, size and content; compiled Python aside."""
    files = (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    )
    return {
        str(path.relative_to(folder)): (
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in files
    }


@pytest.fixture(scope="module")
def whole_run(
    tmp_path_factory: pytest.TempPathFactory,
    start: Callable[..., Any],
    tiny: Callable[..., list[str]],
) -> tuple[Any, Path, dict[str, Any], dict[str, Any]]:
    """A run with all that is on by default (tracker, videos, report), put where output_dir's
    default puts it: the working directory.
    """
    here = tmp_path_factory.mktemp("cwd")
    argv = tiny(
        Path("runs") / "whole",
        "--tracking.trackers [tensorboard] --evaluation.num_videos 2",
        "--evaluation.interval 2",
    )
    before = listing(PACKAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        run = start(here / "runs" / "whole", argv, report=True)
    return run, here, before, listing(PACKAGE)


def test_nothing_is_written_outside_the_run_folder(whole_run: Any) -> None:
    run, here, package_before, package_after = whole_run
    assert run.code == 0
    assert [
        path.relative_to(here).as_posix()
        for path in here.rglob("*")
        if not path.is_relative_to(run.folder)
    ] == ["runs"]
    assert package_before == package_after


def test_files_of_a_run(whole_run: Any) -> None:
    run, *_ = whole_run
    assert sorted(path.name for path in run.folder.iterdir()) == [
        ".lock",
        ".made_here",
        ".saved",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "report",
        "samples",
        "tensorboard",
        "transformer",
    ]
    assert (run.folder / "checkpoints" / "latest").resolve() == (
        run.folder / "checkpoints" / "iteration_000003"
    ).resolve()
    assert sorted(path.name for path in (run.folder / "samples").iterdir()) == [
        f"iteration_{i:06d}" for i in (0, 2, 3)
    ]
    for folder in (run.folder / "samples").iterdir():
        assert len(list(folder.glob("*.mp4"))) == 2
    assert (run.folder / "report" / "report.html").stat().st_size > 10_000
    assert (run.folder / "report" / "contact_sheet.png").is_file()


def test_metrics_and_console(whole_run: Any) -> None:
    run, *_ = whole_run
    assert [row["iteration"] for row in run.rows] == [0, 1, 2, 3]
    evaluated = [row["iteration"] for row in run.rows if f"eval/rewards/{STAGES[0]}/mean" in row]
    assert evaluated == [0, 2, 3]
    for row in run.trained_rows:
        assert {
            "reward",
            "reward_std",
            "clip_ratio",
            "grad_norm",
            "loss",
            "kl",
            "learning_rate",
            "step_time",
            "frac_reward_zero_std",
        } <= row.keys()
        for stage in STAGES:
            assert {
                f"rewards/{stage}/mean",
                f"rewards/{stage}/std",
                f"weights/{stage}",
                f"hoyer/{stage}",
                f"competence/{stage}",
            } <= row.keys()
        assert all(row[f"time/{phase}"] >= 0 for phase in ("rollout", "reward", "update"))
    lines = run.out.splitlines()
    trained = [line for line in lines if line.startswith("iteration ") and "validation" not in line]
    assert [int(line.split()[1]) for line in trained] == [1, 2, 3], "one line an iteration"
    assert all("|ratio-1|     0" in line for line in trained)
    assert [
        int(line.split()[1])
        for line in lines
        if line.startswith("iteration ") and "validation" in line
    ] == [0, 2, 3]
    assert any(line.startswith("done: ") and "runs/whole/" in line for line in lines)
    assert lines[-1].startswith("report: ")
    assert "it/s" not in run.err, "no progress bar where there is no terminal"


def test_exported_transformer_loads_with_diffusers_and_is_the_checkpoint(
    whole_run: Any, tensors: Callable[..., dict[str, Any]]
) -> None:
    run, *_ = whole_run
    exported = WanTransformer3DModel.from_pretrained(
        run.folder / "transformer", torch_dtype=torch.float32
    ).state_dict()
    trained = of_model(tensors(run.folder / "checkpoints" / "latest"))
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in exported)


def test_exported_transformer_goes_on_as_a_policy(
    whole_run: Any, tmp_path: Path, train: Callable[..., Any]
) -> None:
    """A run that starts from the export evaluates, untrained, to what that run ended with."""
    run, *_ = whole_run
    export = f"--policy.checkpoint {run.folder / 'transformer'}"
    further = train(tmp_path / "further", "--iterations 0", export)
    assert further.code == 0
    for stage in STAGES:
        assert (
            further.rows[0][f"eval/rewards/{stage}/mean"]
            == run.rows[-1][f"eval/rewards/{stage}/mean"]
            != run.rows[0][f"eval/rewards/{stage}/mean"]
        )


def test_second_start_in_a_used_folder_refuses(
    whole_run: Any, tiny: Callable[..., list[str]], start: Callable[..., Any]
) -> None:
    run, *_ = whole_run
    before = listing(run.folder)
    again = start(run.folder, tiny(run.folder))
    assert again.code == 2
    assert again.err.count("\n") == 1
    assert "--resume auto" in again.err
    assert str(run.folder) in again.err
    assert "--name" in again.err
    assert again.out == ""
    assert listing(run.folder) == before


def test_run_without_validation_prompts(tmp_path: Path, train: Callable[..., Any]) -> None:
    run = train(
        tmp_path / "run",
        "--iterations 1 --prompts.validation null --evaluation.num_videos 2",
    )
    assert run.code == 0
    names = {
        Path(path).stem
        for path in (tmp_path / "run" / "samples" / "iteration_000001").glob("*.mp4")
    }
    assert len(names) == 2
    assert all(str(caption).replace(" ", "-") in "".join(names) for caption in train_captions()[:2])


@pytest.fixture(scope="module")
def two_updates(tmp_path_factory: pytest.TempPathFactory, train: Callable[..., Any]) -> Any:
    folder = tmp_path_factory.mktemp("updates") / "run"
    return train(
        folder,
        "--iterations 2 --checkpoint.interval 1 --update.ema_decay 0.75",
        "--update.kl_coef 0.1",
    )


def test_first_update_moves_every_weight_by_the_learning_rate(
    two_updates: Any, tensors: Callable[..., dict[str, Any]]
) -> None:
    """Adam's first step is lr g / (|g| + 1e-8) and decoupled decay lr 1e-4 w, whatever the scale of
    the gradient.
    """
    after = of_model(tensors(two_updates.folder / "checkpoints" / "iteration_000001"))
    before = load_file(SHIPPED_CHECKPOINT / "transformer" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    moved = torch.cat(
        [(after[name] - before[name] * (1 - 2e-4 * 1e-4)).abs().flatten() for name in before]
    )
    assert moved.max() <= 2e-4 * 1.01
    assert ((moved > 1.9e-4) & (moved < 2.02e-4)).float().mean() > 0.9
    assert two_updates.trained_rows[0]["learning_rate"] == 2e-4


def test_average_of_the_weights(two_updates: Any, tensors: Callable[..., dict[str, Any]]) -> None:
    """The EMA starts at the first weights and is what is exported; the weights themselves are still
    in the checkpoint.
    """
    first, second = (
        tensors(two_updates.folder / "checkpoints" / f"iteration_{i:06d}") for i in (1, 2)
    )
    exported = load_file(two_updates.folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, weights in of_model(second).items():
        average = second[f"ema/{name}"]
        assert torch.equal(exported[name], average)
        expected = 0.75 * first[f"ema/{name}"].double() + 0.25 * weights.double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-9)
    assert any(
        not torch.equal(exported[name], weights) for name, weights in of_model(second).items()
    )


def test_kl_to_the_base_weights_starts_at_zero(two_updates: Any) -> None:
    first, second = two_updates.trained_rows
    assert first["kl"] == 0.0
    assert second["kl"] > 0.0


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("--update.lr_scheduler linear", [1, 3 / 4, 2 / 4, 1 / 4]),
        (
            "--update.lr_scheduler cosine",
            [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)],
        ),
        (
            "--update.lr_scheduler constant_with_warmup --update.warmup_iterations 2",
            [1 / 2, 1, 1, 1],
        ),
    ],
)
def test_learning_rate_schedules(
    tmp_path: Path, train: Callable[..., Any], schedule: str, factors: list[float]
) -> None:
    run = train(tmp_path / "run", "--iterations 4", schedule)
    assert [row["learning_rate"] for row in run.trained_rows] == pytest.approx(
        [2e-4 * factor for factor in factors], rel=1e-12
    )


def test_a_learning_rate_moves_the_weights_as_far_as_it_is(
    tmp_path: Path, train: Callable[..., Any], tensors: Callable[..., dict[str, Any]]
) -> None:
    """The schedule reaches the optimizer, not the log alone: Adam's first step is as long as the
    learning rate, 2e-4 / 100 in warm-up.
    """
    run = train(
        tmp_path / "run",
        "--iterations 1 --update.lr_scheduler constant_with_warmup",
        "--update.warmup_iterations 100",
    )
    before = load_file(SHIPPED_CHECKPOINT / "transformer" / "diffusion_pytorch_model.safetensors")
    after = of_model(tensors(run.folder / "checkpoints" / "latest"))
    assert run.trained_rows[0]["grad_norm"] > 0
    furthest = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert furthest == pytest.approx(2e-6, rel=0.1)


def test_videos_of_one_validation_prompt_differ(
    tmp_path: Path, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ODE makes one video of one noise, so the evaluation's videos need noise of their own,
    whatever a group does.
    """
    seen = []
    sample = fastgrpo.training.validation.sample_validation
    monkeypatch.setattr(
        fastgrpo.training.validation,
        "sample_validation",
        lambda *args, **kwargs: seen.append(sample(*args, **kwargs)) or seen[-1],
    )
    run = train(tmp_path / "run", "--iterations 1 --evaluation.num_generations 3")
    assert run.code == 0
    for validation in seen:
        for scores in validation.scores_PGK:
            assert len({tuple(row) for row in scores}) == 3
    assert seen[0].scores_PGK != seen[1].scores_PGK


def test_it_climbs_the_reward_it_is_given(tmp_path: Path, train: Callable[..., Any]) -> None:
    """A judge of one's own by its dotted path, and a reward that is easy to raise: a wrong sign
    anywhere would lower it.
    """
    run = train(
        tmp_path / "run",
        "--reward.class_path tiny_parts.RedJudge --iterations 12",
        "--rollout.num_generations 8 --rollout.micro_batch_size 16 --update.num_best 2",
        "--update.num_worst 2 --update.learning_rate 5e-4",
        "--evaluation.num_generations 4",
    )
    assert run.code == 0
    key = f"eval/rewards/{STAGES[0]}/mean"
    assert run.rows[-1][key] > run.rows[0][key] + 0.03
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config["reward"]["class_path"] == "tiny_parts.RedJudge"


def test_seeds(
    tmp_path: Path, train: Callable[..., Any], rows_without_times: Callable[[Path], list[str]]
) -> None:
    """The same seed gives the same run, digit for digit; another one another."""
    runs = [
        train(tmp_path / name, f"--iterations 2 --seed {seed}")
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    a, b, c = (rows_without_times(run.folder) for run in runs)
    assert a == b
    assert a[1] != c[1]
    assert json.loads(a[1])["reward"] != json.loads(c[1])["reward"]
    assert os.path.samefile(runs[0].folder.parent, tmp_path)
