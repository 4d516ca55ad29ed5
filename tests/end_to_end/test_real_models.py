"""The whole command line on tiny pipelines in diffusers' format, with the recipes of the real
models: only the sizes are small.

embed, train on two ranks with FSDP2, export, diffusers' own loading; stops, other numbers of
processes, LoRA, HunyuanVideo, sample.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from fastgrpo import __main__ as command_line

PROMPTS = [
    "a red square moving right",
    "a dog runs",
    "a cat sleeps in the sun",
    "a boat on a lake",
]
SMALL: dict[str, Any] = {
    "iterations": 2,
    "reward": {"class_path": "tiny_parts.SmoothJudge"},
    "rollout": {
        "num_prompts": 2,
        "num_generations": 4,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 4,
    },
    "update": {"num_best": 1, "num_worst": 1, "learning_rate": 1e-3},
    "evaluation": {"interval": 0, "num_videos": 1},
    "checkpoint": {"interval": 1},
    "parallel": {"shard": "full", "replicas": 1},
    "tracking": {"trackers": []},
}
"""Laid over a recipe. Guidance 5, micro-batch 1, bf16 over fp32 weights, activations and
all else stay the recipe's.
"""
Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    """arguments(recipe, model folder, run folder, *more): what train and embed take."""
    common = tmp_path_factory.mktemp("small")
    (common / "train.txt").write_text("\n".join(PROMPTS) + "\n")

    def words(recipe: str, model: Path, run: Path, *more: str) -> list[str]:
        policy = {"init_args": {"model": str(model), "text_cache": str(common / "text")}}
        overlay = common / f"{recipe}.yaml"
        overlay.write_text(
            yaml.safe_dump(
                SMALL | {"policy": policy, "prompts": {"train": str(common / "train.txt")}}
            )
        )
        configs = ["--config", f"fastgrpo/recipes/{recipe}.yaml", "--config", str(overlay)]
        return [*configs, "--output_dir", str(run.parent), "--name", run.name, *more]

    return words


@pytest.fixture(scope="module")
def command(forked: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """command("export", ..., ranks=None): `python -m fastgrpo export ...`, or under torchrun, that
    has to succeed; both outputs.
    """

    def run(*argv: object, ranks: int | None = None) -> str:
        job = forked(argv, tmp_path_factory.mktemp("cwd"), ranks)
        out: str = job.finish()
        assert job.returncode == 0, out
        return out

    return run


@pytest.fixture(scope="module")
def job(command: Callable[..., str]) -> Callable[..., str]:
    """job(argv, ranks): a training job that has to succeed; what it printed."""
    return lambda argv, ranks=2: command("train", *argv, ranks=ranks)


def fastgrpo(environment: dict[str, str], *argv: object, code: int = 0) -> str:
    """`python -m fastgrpo ...` in a process of its own; both its outputs."""
    command = [sys.executable, "-m", "fastgrpo", *map(str, argv)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def trained_rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["iteration"] > 0]


def assert_exact_and_learning(folder: Path, iterations: int) -> None:
    """Ratio exactly 1 before every first update, every group trained, and gradients that are not
    zero.
    """
    rows = trained_rows(folder)
    assert [row["iteration"] for row in rows] == list(range(1, iterations + 1))
    for row in rows:
        assert row["ratio_drift"] == 0.0
        assert (
            row["num_skipped_groups"]
            == row["num_invalid_videos"]
            == row["num_skipped_updates"]
            == 0
        )
        assert row["grad_norm"] > 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def make_video(pipe: Any, **options: Any) -> torch.Tensor:
    """Frames [9, 3, 64, 64] of the first prompt in two steps, always from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    size = {
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": 2,
        "max_sequence_length": 64,
    }
    frames: torch.Tensor = pipe(
        PROMPTS[0], **size, **options, generator=draw, output_type="pt"
    ).frames[0]
    assert frames.shape == (9, 3, 64, 64)
    assert torch.isfinite(frames).all()
    return frames


@pytest.fixture(scope="module")
def wan_run(
    wan_folder: Path,
    arguments: Arguments,
    job: Any,
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """embed, then two iterations by two processes with FSDP2."""
    run = tmp_path_factory.mktemp("runs") / "wan"
    argv = arguments("wan2.1_t2v_1.3b", wan_folder, run)
    assert "5 prompts ready" in fastgrpo(
        environment, "embed", *argv
    )  # four prompts and the negative one
    out = job(argv)
    assert re.search(r"5 prompts ready in \S+, 0 of them new", out), (
        "training takes them from the disk"
    )
    assert re.search(r"attention: native \(\w*attention\w*", out), "which kernel serves"
    return run


# Wan


def test_from_embed_to_a_video(
    wan_run: Path, wan_folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    assert_exact_and_learning(wan_run, 2)
    said = fastgrpo(environment, "export", wan_run, "--output", tmp_path / "export")
    assert str(tmp_path / "export") in said
    exported, base = weights(tmp_path / "export"), weights(wan_folder / "transformer")
    kept = weights(wan_run / "transformer")
    assert exported.keys() == base.keys() == kept.keys()
    assert all(torch.equal(exported[name], kept[name]) for name in kept), (
        "one process reads what two have written"
    )
    assert sum(not torch.equal(exported[name], base[name]) for name in base) > len(base) // 2
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "export")
    trained = make_video(WanPipeline.from_pretrained(wan_folder, transformer=transformer))
    assert not torch.equal(trained, make_video(WanPipeline.from_pretrained(wan_folder)))
    card = ModelCard.load(tmp_path / "export" / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-video"
    assert 'WanTransformer3DModel.from_pretrained("THIS_FOLDER"' in card.text
    assert "visual quality" in card.text
    assert str(wan_folder.parent) not in card.content, "places on this machine are not published"


def test_export_refuses(wan_run: Path, start: Any, tmp_path: Path) -> None:
    """One line each for an average that was not kept, a folder that is used, and a run or a
    checkpoint that is not there.
    """
    for argv, words in (
        ([wan_run, "--ema"], "update.ema_decay 0"),
        ([wan_run, "--output", tmp_path], "new"),
        ([wan_run, "--checkpoint", "iteration_000009"], "iteration_000009"),
        ([tmp_path], "config.yaml"),
    ):
        refused = start(tmp_path, ["export", *map(str, argv)], main=command_line.main)
        assert refused.code == 2
        assert refused.err.startswith("error: ")
        assert refused.err.count("\n") == 1
        assert words in refused.err
    assert not (wan_run / "export").exists()


@pytest.mark.slow
def test_sample(wan_run: Path, command: Any, environment: dict[str, str], tmp_path: Path) -> None:
    """Both schedulers, other sizes, a judge whose module is not there; under torchrun the same
    videos as in one process.
    """
    args = ("--num_videos", 3, "--num_inference_steps", 2)
    said = command("sample", wan_run, *args, "--output", tmp_path / "one")
    assert re.search(r"trained +visual_quality 0\.\d+", said)
    for name in ("base", "trained"):
        assert len(list((tmp_path / "one" / name).glob("*.mp4"))) == 3
    stills = [sorted((tmp_path / "one" / name).glob("*.png")) for name in ("base", "trained")]
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(*stills, strict=True)] == [False] * 3
    without_judge = {
        **environment,
        "PYTHONPATH": os.pathsep.join(environment["PYTHONPATH"].split(os.pathsep)[1:]),
    }
    said = fastgrpo(
        without_judge,
        "sample",
        wan_run,
        *args,
        "--scheduler",
        "pipeline",
        "--height",
        32,
        "--width",
        48,
        "--output",
        tmp_path / "own",
    )
    assert re.search(r"note: no scores.*tiny_parts", said)
    assert (
        json.loads((tmp_path / "own" / "trained" / "samples.json").read_text())["samples"][0][
            "scores"
        ]
        is None
    )
    assert (tmp_path / "own" / "comparison.png").stat().st_size > 1000
    command("sample", wan_run, *args, "--output", tmp_path / "two", ranks=2)
    for one in sorted((tmp_path / "one").glob("*/*.png")):
        assert (
            one.read_bytes() == (tmp_path / "two" / one.relative_to(tmp_path / "one")).read_bytes()
        )


@pytest.mark.slow
def test_killed_and_resumed(
    wan_folder: Path,
    arguments: Arguments,
    forked: Any,
    job: Any,
    tmp_path: Path,
    assert_same_end: Any,
) -> None:
    """SIGKILL of both ranks in the second and in the third iteration: the same end, bit for bit, as
    without. (The launcher's death: test_resume.py.)
    """
    argv = {
        name: arguments("wan2.1_t2v_1.3b", wan_folder, tmp_path / name, "--iterations", "3")
        for name in ("whole", "killed")
    }
    job(argv["whole"])
    for line in ("iteration     1 ", "iteration     2 "):
        killed = forked(["train", *argv["killed"], "--resume", "auto"], tmp_path, 2)
        killed.wait_for(line)
        killed.kill()
    assert re.search(
        r"resume: going on after iteration [12]\n", job([*argv["killed"], "--resume", "auto"])
    )
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
    assert_exact_and_learning(tmp_path / "killed", 3)


@pytest.mark.slow
def test_one_rank_then_two_then_one(
    wan_folder: Path, arguments: Arguments, job: Any, tmp_path: Path
) -> None:
    """The state that two load from one, and one from two, is the same to the bit; the run goes on
    as one rank alone would, to rounding.
    """

    def go_on(name: str, ranks: int, iterations: int) -> Path:
        more = [
            "--iterations",
            str(iterations),
            "--resume",
            "auto",
        ]
        job(arguments("wan2.1_t2v_1.3b", wan_folder, tmp_path / name, *more), ranks)
        return tmp_path / name

    run = go_on("changing", 1, 1)
    for ranks, iterations in ((2, 1), (2, 2), (1, 2), (1, 3)):
        before, last = weights(run / "transformer"), trained_rows(run)[-1]["iteration"]
        shutil.rmtree(run / "transformer")
        after = weights(go_on("changing", ranks, iterations) / "transformer")
        assert all(torch.equal(before[name], after[name]) for name in before) == (
            last == iterations
        )
    assert_exact_and_learning(run, 3)
    alone = go_on("alone", 1, 3)
    for one, other in zip(trained_rows(run), trained_rows(alone), strict=True):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.2)


@pytest.mark.slow
def test_lora(
    wan_folder: Path,
    arguments: Arguments,
    job: Any,
    command: Any,
    tmp_path: Path,
    tensors: Any,
) -> None:
    """The overlay for one GPU, by two processes: only adapters are kept and exported, and the
    pipeline takes them as they are.
    """
    overlay = [
        "--config",
        "fastgrpo/recipes/wan2.1_lora_one_gpu.yaml",
        "--rollout.num_prompts",
        "2",
    ]
    said = job(
        arguments(
            "wan2.1_t2v_1.3b",
            wan_folder,
            tmp_path / "run",
            *overlay,
            "--update.learning_rate",
            "1e-2",
        )
    )
    assert "transformer/ (for diffusers' load_lora_weights)" in said
    assert_exact_and_learning(tmp_path / "run", 2)
    command("export", tmp_path / "run")
    export = tmp_path / "run" / "export" / "iteration_000002"
    assert sorted(path.name for path in export.iterdir()) == [
        "README.md",
        "pytorch_lora_weights.safetensors",
    ]
    assert 'pipe.load_lora_weights("THIS_FOLDER")' in (export / "README.md").read_text()
    pipe = WanPipeline.from_pretrained(wan_folder)
    base = make_video(pipe)
    pipe.load_lora_weights(export)
    assert pipe.transformer.peft_config["default_0"].r == 32
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 64.0
    assert not torch.equal(base, make_video(pipe))
    kept = {
        name: t
        for name, t in tensors(tmp_path / "run" / "checkpoints" / "latest").items()
        if name.startswith("model/")
    }
    assert len(kept) > 10
    assert all("lora_" in name for name in kept)
    loaded = {
        f"model/{name.replace('default_0', 'default')}": t
        for name, t in pipe.transformer.state_dict().items()
        if "lora_" in name
    }
    assert loaded.keys() == kept.keys()
    assert all(torch.equal(loaded[name], kept[name]) for name in kept)
    command("sample", tmp_path / "run", "--num_videos", 1, "--output", tmp_path / "sampled")
    before, after = (
        next((tmp_path / "sampled" / name).glob("*.png")).read_bytes()
        for name in ("base", "trained")
    )
    assert before != after


# HunyuanVideo


@pytest.mark.slow
def test_hunyuan_video(
    hunyuan_folder: Path,
    arguments: Arguments,
    job: Any,
    command: Any,
    tmp_path: Path,
    tensors: Any,
) -> None:
    """The same from embed to a video, with an average of the weights, which export gives on
    request.
    """
    argv = arguments("hunyuanvideo", hunyuan_folder, tmp_path / "run", "--update.ema_decay", "0.5")
    command("embed", *argv)
    job(argv)
    assert_exact_and_learning(tmp_path / "run", 2)
    command("export", tmp_path / "run", "--ema")
    command("export", tmp_path / "run")
    average, last = (tmp_path / "run" / "export" / f"iteration_000002{end}" for end in ("_ema", ""))
    kept = tensors(tmp_path / "run" / "checkpoints" / "latest")
    for folder, part in ((average, "ema"), (last, "model")):
        exported = weights(folder)
        assert all(torch.equal(tensor, kept[f"{part}/{name}"]) for name, tensor in exported.items())
    assert any(
        not torch.equal(tensor, kept[f"model/{name}"]) for name, tensor in weights(average).items()
    )
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(average)
    make_video(HunyuanVideoPipeline.from_pretrained(hunyuan_folder, transformer=transformer))
    command(
        "sample",
        tmp_path / "run",
        "--num_videos",
        1,
        "--scheduler",
        "pipeline",
        "--output",
        tmp_path / "sampled",
    )
    assert (tmp_path / "sampled" / "comparison.png").exists()


# The pipeline's own scheduler
