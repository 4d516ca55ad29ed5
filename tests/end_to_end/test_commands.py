"""`python -m fastgrpo` and its commands: what they say of themselves, and what calibrate, sample
and report leave behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from fastgrpo import __main__ as command_line
from fastgrpo.training.recipe_parser import parse_config

STAGES = ("visual_quality", "temporal_smoothness", "text_alignment")
SMOOTHING = 4
Start = Callable[..., Any]


@pytest.fixture
def fastgrpo(start: Start, tmp_path: Path) -> Callable[..., Any]:
    """fastgrpo("report", ...): `python -m fastgrpo report ...` in this process."""
    return lambda *argv: start(tmp_path, [str(word) for word in argv], main=command_line.main)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "train",
            [
                "--rollout.num_generations",
                "G, the videos of one group",
                "--config",
                "--print_config",
                "--pacing.sharpness",
                "default: 5.0)",
            ],
        ),
        (
            "calibrate",
            [
                "--options.iterations",
                "Iterations on each stage alone",
                "0.7",
                "--config",
                "thresholds",
            ],
        ),
        ("sample", ["run", "--checkpoint", "--prompts", "same noise"]),
        ("report", ["run", "--smoothing_window"]),
    ],
)
def test_help_explains_itself(fastgrpo: Any, command: str, words: Sequence[str]) -> None:
    helped = fastgrpo(command, "--help")
    assert helped.code == 0
    assert helped.err == ""
    text = " ".join(helped.out.split())
    assert all(word in text for word in words), text


def test_every_key_of_train_is_documented(fastgrpo: Any) -> None:
    """A sentence for every option of every section, between its name and its type."""
    text = " ".join(fastgrpo("train", "--help").out.split())
    options = re.findall(r" --(\w+\.\w+) (.*?) \((?:required, )?type:", text)
    assert len(options) > 50
    for name, words in options:
        assert words.endswith("."), name


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["sample"], "run"),
        (["sample", ".", "--sede", "3"], "sede"),
        (["sample", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["report", ".", "--smoothing_windw", "3"], "smoothing_windw"),
        (["calibrate", "--options.iteration", "3"], "--options.iteration"),
        (["calibrate", "--options.fraction", "2"], "options.fraction"),
    ],
)
def test_wrong_arguments(
    fastgrpo: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    word: str,
    tiny: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = fastgrpo(*argv, *(tiny(tmp_path / "run") if argv[0] == "calibrate" else []))
    assert refused.code == 2
    assert "error: " in refused.err
    assert word in refused.err
    assert "Traceback" not in refused.err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def calibrated(
    tmp_path_factory: pytest.TempPathFactory, start: Start, tiny: Callable[..., list[str]]
) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("calibrate")
    return start(
        folder, ["calibrate", *tiny(folder / "world", *options())], main=command_line.main
    ), folder


def options() -> list[str]:
    return [
        "--options.iterations",
        "3",
        "--options.smoothing_window",
        str(SMOOTHING),
        "--options.fraction",
        "0.6",
    ]


def recomputed_thresholds(folder: Path) -> list[float]:
    """start + 0.6 (end - start) of a moving average, from the metrics of the stages' own runs."""
    thresholds = []
    for stage in STAGES:
        rows = [
            json.loads(line)
            for line in (folder / f"world-calibrate-{stage}" / "metrics.jsonl")
            .read_text()
            .splitlines()
        ]
        curve = np.array([row[f"rewards/{stage}/mean"] for row in rows if row["iteration"] > 0])
        smooth = [
            curve[max(0, i - SMOOTHING // 2) : i + (SMOOTHING - 1) // 2 + 1].mean()
            for i in range(len(curve))
        ]
        thresholds.append(smooth[0] + 0.6 * (smooth[-1] - smooth[0]))
    return thresholds


def test_calibrate_trains_each_stage_alone(calibrated: tuple[Any, Path]) -> None:
    outcome, folder = calibrated
    assert outcome.code == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "world-calibrate",
        *sorted(f"world-calibrate-{stage}" for stage in STAGES),
    ]
    for number, stage in enumerate(STAGES):
        rows = [
            json.loads(line)
            for line in (folder / f"world-calibrate-{stage}" / "metrics.jsonl")
            .read_text()
            .splitlines()
        ]
        assert [row["iteration"] for row in rows] == [0, 1, 2, 3]
        for row in rows[1:]:
            assert [row[f"weights/{s}"] for s in STAGES] == [float(i == number) for i in range(3)]
            assert row["reward"] == pytest.approx(row[f"rewards/{stage}/mean"], rel=1e-12)


def test_thresholds_are_what_the_metrics_say(calibrated: tuple[Any, Path]) -> None:
    outcome, folder = calibrated
    fragment = yaml.safe_load((folder / "world-calibrate" / "thresholds.yaml").read_text())
    expected = recomputed_thresholds(folder)
    assert fragment == {"pacing": {"thresholds": pytest.approx(expected[:2], abs=5.1e-5)}}
    assert len(set(np.round(expected, 4))) == 3
    text = (folder / "world-calibrate" / "thresholds.yaml").read_text()
    for stage, threshold in zip(STAGES, expected, strict=True):
        assert f"{stage} (threshold {threshold:.4f})" in text, (
            "the third one too, for the literal gate"
        )
        assert f"{stage} {threshold:.3f}" in outcome.out
    assert (folder / "world-calibrate" / "curves.png").is_file()


def test_fragment_is_accepted_after_a_recipe(
    calibrated: tuple[Any, Path], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    _, folder = calibrated
    fragment = folder / "world-calibrate" / "thresholds.yaml"
    config, _, _ = parse_config([*tiny(tmp_path / "run"), "--config", str(fragment)])
    assert config.pacing.thresholds == tuple(
        yaml.safe_load(fragment.read_text())["pacing"]["thresholds"]
    )
    assert config.rollout.num_generations == 4


def test_the_literal_gate_gets_three(
    calibrated: tuple[Any, Path], tiny: Callable[..., list[str]], start: Start, tmp_path: Path
) -> None:
    """From finished runs: calibrate again with another gate trains nothing anew."""
    _, folder = calibrated
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    argv = [
        "calibrate",
        *tiny(tmp_path / "copy" / "world", *options()),
        "--resume",
        "auto",
        "--pacing.gate",
        "literal",
    ]
    outcome = start(
        tmp_path, [*argv, "--pacing.thresholds", "[0.1, 0.1, 0.1]"], main=command_line.main
    )
    assert outcome.code == 0
    assert "iteration     1" not in outcome.out
    changed = start(tmp_path, [*argv, "--update.learning_rate", "0.5"], main=command_line.main)
    assert "was made with another configuration: update.learning_rate: " in only_line(changed)
    fragment = tmp_path / "copy" / "world-calibrate" / "thresholds.yaml"
    assert yaml.safe_load(fragment.read_text())["pacing"]["thresholds"] == pytest.approx(
        recomputed_thresholds(folder), abs=5.1e-5
    )


def test_interrupted_calibrate_goes_on(
    calibrated: tuple[Any, Path],
    tiny: Callable[..., list[str]],
    start: Start,
    each_step: Any,
    tmp_path: Path,
) -> None:
    """A signal in the second stage's second iteration: no thresholds yet, exit code not 0; --resume
    auto ends with the same numbers.
    """
    steps: list[int] = []

    def stop_at_fifth(iteration: int) -> None:
        steps.append(iteration)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    argv = ["calibrate", *tiny(tmp_path / "world", *options())]
    with each_step(stop_at_fifth):
        stopped = start(tmp_path, argv, main=command_line.main)
    assert stopped.code == 1
    assert "--resume auto goes on" in stopped.out
    assert steps == [1, 2, 3, 1, 2]
    assert not (tmp_path / "world-calibrate").exists()
    again = start(tmp_path, argv, main=command_line.main)
    assert again.code == 2, "without --resume the used folders are refused"
    resumed = start(tmp_path, [*argv, "--resume", "auto"], main=command_line.main)
    assert resumed.code == 0
    ours, theirs = (
        yaml.safe_load((f / "world-calibrate" / "thresholds.yaml").read_text())
        for f in (tmp_path, calibrated[1])
    )
    assert ours == theirs


@pytest.mark.slow
def test_calibrate_on_two_ranks(
    tiny: Callable[..., list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    """One process group for all the runs: made anew for each, it would now and then find the
    addresses of the one before.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fastgrpo",
        "calibrate",
    ]
    command += tiny(tmp_path / "world", "--options.iterations", "2")
    for _ in range(3):
        job = subprocess.run(
            command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=90
        )
        assert job.returncode == 0, job.stderr
        thresholds = yaml.safe_load((tmp_path / "world-calibrate" / "thresholds.yaml").read_text())[
            "pacing"
        ]["thresholds"]
        assert len(thresholds) == 2
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, train: Start) -> Path:
    """A run whose evaluation videos show what base and trained model make of three captions; a
    large learning rate makes it plain.
    """
    folder = tmp_path_factory.mktemp("finished") / "run"
    run = train(
        folder,
        "--evaluation.num_videos",
        "3",
        "--update.learning_rate",
        "1e-2",
        "--update.ema_decay",
        "0.5",
    )
    assert run.code == 0
    return folder


def stills(folder: Path) -> dict[str, Any]:
    return {path.stem: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_sample_shows_base_and_trained_from_the_same_noise(
    finished: Path, fastgrpo: Any, tmp_path: Path
) -> None:
    """The base videos are those of the untrained model in the run's own evaluation, the trained
    ones those of its last.
    """
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    outcome = fastgrpo("sample", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    out = tmp_path / "run" / "samples" / "iteration_000003_ode"
    assert str(out) in outcome.out
    names = ["base", "comparison.png", "sampling.json", "trained"]
    assert sorted(path.name for path in out.iterdir()) == names
    before, after = (
        stills(finished / "samples" / "iteration_000000"),
        stills(finished / "samples" / "iteration_000003"),
    )
    base, trained = stills(out / "base"), stills(out / "trained")
    assert len(base) == 3
    assert base.keys() == before.keys() == trained.keys() == after.keys()
    for name in base:
        assert np.array_equal(base[name], before[name])
        assert np.array_equal(trained[name], after[name])
        assert not np.array_equal(base[name], trained[name])
    for folder in (out / "base", out / "trained"):
        assert len(list(folder.glob("*.mp4"))) == 3
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for word, row in (("base", rows[0]), ("trained", rows[-1])):
        (said,) = [line for line in outcome.out.splitlines() if line.startswith(word + " ")]
        assert f"{STAGES[0]} {row[f'eval/rewards/{STAGES[0]}/mean']:.3f}" in said


def test_sample_with_options_of_its_own(finished: Path, fastgrpo: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(
        "a red cross moving up\na blue square moving left\na green square moving left\n"
    )
    arguments = [
        "--prompts",
        tmp_path / "mine.txt",
        "--num_videos",
        "2",
        "--num_inference_steps",
        "3",
        "--sde",
        "dance",
        "--output",
        tmp_path / "out",
    ]
    outcome = fastgrpo("sample", finished, *arguments)
    assert outcome.code == 0, outcome.err
    first = stills(tmp_path / "out" / "base")
    assert [name.partition("_")[2] for name in first] == [
        "a-red-cross-moving-up",
        "a-blue-square-moving-left",
    ]
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "base").iterdir()}
    assert fastgrpo("sample", finished, *arguments, "--no_scores").code == 0
    assert stills(tmp_path / "out" / "base").keys() == first.keys()
    (tmp_path / "mine.txt").write_text("a green square moving left\n")
    assert "prompts: " in only_line(fastgrpo("sample", finished, *arguments))
    assert set((tmp_path / "out" / "base").iterdir()) == before.keys()


def only_line(outcome: Any) -> str:
    """The one line of an exit with code 2."""
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    return str(line)


def test_samples_made_otherwise_never_share_a_folder(
    finished: Path, fastgrpo: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    options = ["--num_videos", "1", "--no_scores"]
    assert fastgrpo("sample", run, *options).code == 0
    made = stills(run / "samples" / "iteration_000003_ode_videos1" / "base")
    for key, value in (("seed", 77), ("num_inference_steps", 3)):
        assert fastgrpo("sample", run, *options, f"--{key}", value).code == 0
        name = f"iteration_000003_ode_videos1_{key.removeprefix('num_')}{value}"
        others = stills(run / "samples" / name / "base")
        assert others.keys() == made.keys()
        assert not any(np.array_equal(made[key], others[key]) for key in made)
    # What no option says: other weights of this name, another guidance in config.yaml.
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("guidance_scale: ", "guidance_scale: 1"))
    assert "sampler.guidance_scale: " in only_line(fastgrpo("sample", run, *options, "--trust"))
    (run / "config.yaml").write_text(config)
    manifest = run / "checkpoints" / "iteration_000003" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    assert "weights: 'iteration_000003 " in only_line(fastgrpo("sample", run, *options))


def test_sample_refuses(finished: Path, fastgrpo: Any, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    missing = fastgrpo("sample", tmp_path / "run", "--checkpoint", "iteration_000099")
    file = tmp_path / "run" / "checkpoints" / "latest" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    damaged = fastgrpo("sample", tmp_path / "run")
    (tmp_path / "strange.txt").write_text("a red square moving up\nsomething else\n")
    strange = fastgrpo("sample", finished, "--prompts", tmp_path / "strange.txt")
    (tmp_path / "strange.txt").write_text("")
    empty = fastgrpo("sample", finished, "--prompts", tmp_path / "strange.txt")
    none = fastgrpo("sample", finished, "--num_videos", "0")
    for refused, word in (
        (missing, "iteration_000099"),
        (damaged, "__0_0.distcp"),
        (strange, "something else"),
        (empty, "at least one prompt"),
        (none, "num_videos: expected at least 1"),
    ):
        assert refused.code == 2
        (line,) = refused.err.splitlines()
        assert line.startswith("error: ")
        assert word in line
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "iteration_000000",
        "iteration_000003",
    ]


def test_report_of_a_run(finished: Path, fastgrpo: Any, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    outcome = fastgrpo("report", tmp_path / "run", "--smoothing_window", "2")
    assert outcome.code == 0
    page = tmp_path / "run" / "report" / "report.html"
    assert outcome.out.strip() == str(page)
    assert "3 of 3 iterations" in page.read_text()
    assert (tmp_path / "run" / "report" / "contact_sheet.png").is_file()
