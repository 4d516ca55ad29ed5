"""`python -m fastgrpo stages`: means, spread and intervals by hand and against the normal formula,
paired differences, and refusals.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgrpo import __main__ as command_line
from fastgrpo.cli.stages import bootstrap_interval, stage_figure, summarize

STAGES = ("visual_quality", "temporal_smoothness", "text_alignment")


def write(path: Path, scores: np.ndarray, folder: str = "", prompts: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [
        {"video": f"{folder}{i:03d}.mp4", "rewards": dict(zip(STAGES, row, strict=True))}
        | ({"prompt": f"p {i}"} if prompts else {})
        for i, row in enumerate(scores.tolist())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(*words: object) -> int:
    return command_line.main(["stages", *map(str, words)])


def test_the_interval_is_the_normal_one_where_videos_are_many() -> None:
    values = np.random.default_rng(0).normal([0.7, 0.5], [0.1, 0.02], size=(400, 2))
    low, high = bootstrap_interval(values, [str(i) for i in range(400)], seed=0)
    half = 1.96 * values.std(0, ddof=1) / 20
    np.testing.assert_allclose(high - values.mean(0), half, rtol=0.08)
    np.testing.assert_allclose(values.mean(0) - low, half, rtol=0.08)
    again = bootstrap_interval(values, [str(i) for i in range(400)], seed=0)
    np.testing.assert_array_equal(again, (low, high))
    assert (bootstrap_interval(values, [str(i) for i in range(400)], seed=1)[0] != low).all()


def test_videos_of_one_prompt_are_not_independent() -> None:
    """Four equal videos of each prompt tell no more than one; with groups of different sizes the
    mean is still over videos.
    """
    one = np.random.default_rng(0).normal(0.7, 0.1, size=(200, 1))
    prompts = [str(i) for i in range(200)]
    np.testing.assert_allclose(
        bootstrap_interval(np.repeat(one, 4, axis=0), [p for p in prompts for _ in range(4)], 0),
        bootstrap_interval(one, prompts, 0),
    )
    # Of two prompts a draw takes (a, a), (a, b) or (b, b): the ends are the means of the prompts
    # alone.
    low, high = bootstrap_interval(np.array([[1.0], [2.0], [6.0]]), ["a", "a", "b"], 0)
    assert (low[0], high[0]) == (1.5, 6.0)


def test_the_order_of_rows_changes_nothing() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, size=(60, 1))
    prompts = [f"p {i % 20}" for i in range(60)]
    shuffle = np.random.default_rng(1).permutation(60)
    shuffled = bootstrap_interval(values[shuffle], [prompts[i] for i in shuffle], 0)
    np.testing.assert_allclose(shuffled, bootstrap_interval(values, prompts, 0), rtol=1e-12)


def test_a_summary_by_hand() -> None:
    (found,) = summarize(np.array([[1.0], [2.0], [3.0], [6.0]]), list("abcd"), seed=0)
    assert found.mean == 3
    assert found.std == pytest.approx(math.sqrt(14 / 3))
    assert found.quartiles == (1.75, 2.5, 3.75)
    assert 1 < found.low < 3 < found.high < 6
    (alone,) = summarize(np.array([[0.5]]), ["a"], seed=0)
    assert alone.mean == 0.5
    assert all(math.isnan(value) for value in (alone.low, alone.high, alone.std))


def test_the_figure_shows_the_means() -> None:
    values = np.array(
        [[0.7, 0.5], [0.72, 0.5], [0.9, 0.5]]
    )  # one stage without spread, whose density is a line
    summaries = summarize(values, list("abc"), seed=0)
    (axes,) = stage_figure({"base": values}, {"base": summaries}, ["a_b", "c"]).axes
    lines = {line.get_gid(): line for line in axes.lines}
    np.testing.assert_allclose(lines["means/base"].get_ydata(), values.mean(0))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a b", "c"]


def test_two_sets_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trained set's scores are the base's plus 0.1, 0.2, 0.3: the paired difference is exact,
    far narrower than the sets' spread.
    """
    base = np.random.default_rng(0).uniform(0.3, 0.6, size=(40, 3))
    first = write(tmp_path / "base" / "s.jsonl", base, "/b/")
    second = write(
        tmp_path / "trained" / "s.jsonl",
        base[:30] + np.array([0.1, 0.2, 0.3]),
        "/t/",
        prompts=False,
    )
    with first.open("a") as file:
        file.write('{"video": "x.mp4", "prompt": "x", "error": "cut"}\n')
    assert call(first, second) == 0
    text = capsys.readouterr().out
    assert "minus base" in text
    assert "[+0.2000, +0.2000]" in text
    assert "note: base: left out 1 with an error of 41 rows" in text
    found = json.loads((first.parent / "stages" / "stages.json").read_text())
    assert found["stages"] == list(STAGES)
    assert found["sets"]["base"]["difference"] is None
    for j, stage in enumerate(STAGES):
        summary, difference = (
            found["sets"]["base"]["stages"][stage],
            found["sets"]["trained"]["difference"][stage],
        )
        assert summary["mean"] == pytest.approx(base[:, j].mean())
        assert summary["std"] == pytest.approx(base[:, j].std(ddof=1))
        assert difference["videos"] == 30
        for key in ("mean", "low", "high"):
            assert difference[key] == pytest.approx(0.1 * (j + 1))
    rows = list(csv.DictReader((first.parent / "stages" / "stages.csv").open()))
    assert [(row["set"], row["stage"]) for row in rows] == [
        (name, stage) for name in ("base", "trained") for stage in STAGES
    ]
    assert float(rows[0]["median"]) == pytest.approx(np.median(base[:, 0]))
    assert rows[0]["difference_mean"] == ""
    assert float(rows[3]["difference_mean"]) == pytest.approx(0.1)
    for name in ("stages.png", "stages.svg"):
        assert (first.parent / "stages" / name).stat().st_size > 5000


def test_differences_too_are_resampled_by_prompt(tmp_path: Path) -> None:
    """Two prompts, of which one has two videos; the second file does not tell prompts. Ends as in
    the test of the interval.
    """
    base = [{"video": f"{i}.mp4", "prompt": prompt, "score": 1.0} for i, prompt in enumerate("aab")]
    trained = [{"video": f"{i}.mp4", "score": score} for i, score in enumerate((2.0, 3.0, 7.0))]
    for name, rows in (("base", base), ("trained", trained)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call(tmp_path / "base.jsonl", tmp_path / "trained.jsonl") == 0
    found = json.loads((tmp_path / "stages" / "stages.json").read_text())["sets"]["trained"][
        "difference"
    ]["score"]
    assert (found["mean"], found["low"], found["high"]) == (3.0, 1.5, 6.0)


def test_sets_without_a_common_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = np.random.default_rng(0).uniform(size=(3, 3))
    first, second = (
        write(tmp_path / "a.jsonl", scores),
        write(tmp_path / "b.jsonl", scores, "other"),
    )
    assert call(first, second, "--names", "one", "two", "--output", tmp_path / "out") == 0
    assert (
        "note: two: no difference to one: expected a video that all files have, got none"
        in capsys.readouterr().out
    )
    found = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert found["sets"]["two"]["difference"] is None


def test_one_video_has_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"video": "a.mp4", "score": 0.25}\n')
    assert call(path) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "score",
        "s",
        "1",
        "0.2500",
        "–",
        "–",
    ]
    found = json.loads((tmp_path / "stages" / "stages.json").read_text())
    assert found["sets"]["s"]["stages"]["score"]["low"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.jsonl"], "scores: expected a file, found none"),
        (["empty.jsonl"], "scores: expected a row with scores in"),
        (
            ["s.jsonl", "plain.jsonl"],
            "scores: expected the stages visual_quality, temporal_smoothness, text_alignment in all rows, got score",
        ),
        (["s.jsonl", "--names", "a", "b"], "names: expected one for each of 1 files of scores"),
        (["s.jsonl", "--seed", "-1"], "seed: expected at least 0, got -1"),
        ([], "the following arguments are required: scores"),
    ],
)
def test_one_line_for_what_is_wrong(
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s.jsonl", np.full((2, 3), 0.5))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "plain.jsonl").write_text('{"video": "a", "score": 1}\n')
    with pytest.raises(SystemExit) as stop:
        call(*words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_published_models_own_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Raw VQ and MQ, which the rewards are a map of; a file without them is one line."""
    path = tmp_path / "a.jsonl"
    rows = [
        {"video": f"{i}.mp4", "rewards": {"reward": 0.5}, "components": {"VQ": 3.0 + i, "MQ": -1.0}}
        for i in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call(path, "--components", "--output", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert found["stages"] == ["VQ", "MQ"]
    assert [found["sets"]["a"]["stages"][name]["mean"] for name in ("VQ", "MQ")] == [4.0, -1.0]
    without = write(tmp_path / "b.jsonl", np.ones((2, 3)))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(without, "--components")
    assert stop.value.code == 2
    assert "expected rows with components" in capsys.readouterr().err
