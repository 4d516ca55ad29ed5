"""The README's tour on tiny runs of the embedded world: each command takes what the one before has
left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgrpo import __main__ as command_line

JUDGE = ["--config", "fastgrpo/recipes/shapes.yaml"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_training_to_report(
    tmp_path: Path, train: Callable[..., Any], start: Callable[..., Any]
) -> None:
    def call(*words: object) -> str:
        done = start(tmp_path, [str(word) for word in words], main=command_line.main)
        assert done.code == 0, done.err
        return str(done.out)

    runs = [
        train(tmp_path / name, "--seed", seed, "--evaluation.num_videos", "3").folder
        for name, seed in (("one", "0"), ("two", "1"))
    ]
    call("sample", runs[0])
    samples = next((runs[0] / "samples").glob("*_ode"))
    scored = [tmp_path / "base.jsonl", tmp_path / "trained.jsonl"]
    for path in scored:
        saved = samples / path.stem
        files = ["--videos", saved, "--prompts", saved / "samples.json", "--output", path]
        call("score", *files, *JUDGE)
        entries = json.loads((saved / "samples.json").read_text())["samples"]
        assert [(Path(row["video"]).name, row["prompt"]) for row in rows_of(path)] == [
            (e["video"], e["prompt"]) for e in entries
        ]
    call("stages", *scored, "--output", tmp_path / "stages")
    found = json.loads((tmp_path / "stages" / "stages.json").read_text())
    for path in scored:
        for stage in found["stages"]:
            mean = np.mean([row["rewards"][stage] for row in rows_of(path)])
            assert found["sets"][path.stem]["stages"][stage]["mean"] == pytest.approx(
                mean, abs=1e-12
            )

    (tmp_path / "captions.txt").write_text("a red square moving up\na blue cross moving left\n")
    made = tmp_path / "made"
    assert "10 videos, 10 of them new" in call(
        "evaluate", "sample", runs[0], "--prompts", tmp_path / "captions.txt", "--output", made
    )
    judges = [tmp_path / "clean.jsonl", tmp_path / "noisy.jsonl"]
    for path, noise in zip(judges, ("0", "0.3"), strict=True):
        options = ["--reward.init_args.noise", noise]
        call(
            "score",
            "--videos",
            made / "videos",
            "--prompts",
            made / "prompts.json",
            "--output",
            path,
            *JUDGE,
            *options,
        )
    embeddings = [[float(row["prompt"].endswith("up")), 1.0] for row in rows_of(judges[0])]
    np.save(tmp_path / "words.npy", embeddings)
    options = [
        "--score",
        "visual_quality",
        "--embeddings",
        tmp_path / "words.npy",
        "--clusters",
        "2:2",
        "--output",
        tmp_path / "bias",
    ]
    call("bias", "--scores", *judges, *options)
    for path in judges:  # the two captions are the two clusters: Eq. 3 over their means
        of = {
            prompt: [r["rewards"]["visual_quality"] for r in rows_of(path) if r["prompt"] == prompt]
            for prompt in captions(judges[0])
        }
        means = [np.mean(scores) for scores in of.values()]
        bias = json.loads((tmp_path / "bias" / "bias.json").read_text())
        (told,) = (r["kappa_of_means"] for r in bias["kappa"] if r["judge"] == path.stem)
        assert told == pytest.approx(100 * np.std(means) / np.mean(means), abs=1e-9)

    results = tmp_path / "results.json"
    results.write_text(json.dumps({"imaging_quality": [0.62, []], "scene": [0.2, []]}))
    given = json.loads(call("evaluate", "vbench", results, "--json", "--values", "raw"))
    assert given["total"] is None
    assert given["dimensions"]["scene"] == pytest.approx(20.0)
    page = Path(
        call("report", *runs, "--attach", tmp_path / "bias", "--output", tmp_path / "page")
        .strip()
        .splitlines()[-1]
    )
    assert page.parent == tmp_path / "page"
    assert "one" in page.read_text()


def captions(path: Path) -> list[str]:
    return list(dict.fromkeys(row["prompt"] for row in rows_of(path)))
