"""`python -m fastgrpo stages`: means, spread and intervals by hand and against the normal formula,
paired differences, and refusals.
"""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgrpo import __main__ as command_line
from fastgrpo.evaluation.stages import interval_of_means, stage_figure, summarize

STAGES = ("visual_quality", "temporal_smoothness", "text_alignment")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(path: Path, scores: np.ndarray, folder: str = "", prompts: bool = True) -> Path:
    return write_rows(
        path,
        [
            {"video": f"{folder}{i:03d}.mp4", "rewards": dict(zip(STAGES, row, strict=True))}
            | ({"prompt": f"p {i}"} if prompts else {})
            for i, row in enumerate(scores.tolist())
        ],
    )


def call(*words: object) -> int:
    return command_line.main(["stages", *map(str, words)])


def results(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "stages.json").read_text())
    return read


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of an exit with code 2."""
    with pytest.raises(SystemExit) as stop:
        call(*words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_interval_is_students() -> None:
    """Of 1, 2, 3, 6: mean 3, standard error √(14/3) / 2; t of 3 degrees of freedom, from a table.
    With two groups of 2 and 1 rows: mean 3, and 6 and 1.5 without one of them; t of one is 12.7062.
    """
    low, high = interval_of_means(np.array([[1.0], [2.0], [3.0], [6.0]]), list("abcd"))
    half = 3.182446 * math.sqrt(14 / 3) / 2
    assert (low[0], high[0]) == (pytest.approx(3 - half), pytest.approx(3 + half))
    low, high = interval_of_means(np.array([[1.0], [2.0], [6.0]]), ["a", "a", "b"])
    half = 12.706205 * math.sqrt((3**2 + 1.5**2) / 2)
    assert (low[0], high[0]) == (pytest.approx(3 - half), pytest.approx(3 + half))
    values = np.random.default_rng(0).normal(0.7, 0.1, size=(10_000, 1))
    low, high = interval_of_means(values, [str(i) for i in range(10_000)])
    assert high - low == pytest.approx(2 * 1.9602 * values.std(0, ddof=1) / 100, rel=1e-4)


@pytest.mark.parametrize(
    ("sizes", "most"),
    [([5] * 5, 0.967), ([5] * 20, 0.967), ([1, 1, 2, 5, 11], 0.995), ([1] * 10 + [10] * 10, 0.967)],
)
def test_the_interval_covers_what_it_says(sizes: list[int], most: float) -> None:
    """Prompts that differ, with so many videos: 95 % of 1,000 simulations, within two and a half
    standard errors, or more with few and unequal ones. Percentiles of a bootstrap cover 83 and 91 %
    of the first two, the linearised ratio with a degree for each prompt 84 and 93 % of the others.
    """
    rng = np.random.default_rng(0)
    groups = [str(i) for i in np.repeat(range(len(sizes)), sizes)]
    values = np.repeat(rng.normal(0.6, 0.1, size=(len(sizes), 1000)), sizes, axis=0)
    values += rng.normal(0, 0.05, size=values.shape)
    low, high = interval_of_means(values, groups)
    covered = float(((low <= 0.6) & (high >= 0.6)).mean())
    assert 0.933 <= covered <= most


def test_videos_of_one_prompt_are_not_independent() -> None:
    """Four equal videos of each prompt tell no more than one."""
    one = np.random.default_rng(0).normal(0.7, 0.1, size=(200, 1))
    prompts = [str(i) for i in range(200)]
    np.testing.assert_allclose(
        interval_of_means(np.repeat(one, 4, axis=0), [p for p in prompts for _ in range(4)]),
        interval_of_means(one, prompts),
    )


def test_the_order_of_rows_changes_nothing() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, size=(60, 1))
    prompts = [f"p {i % 20}" for i in range(60)]
    shuffle = np.random.default_rng(1).permutation(60)
    shuffled = interval_of_means(values[shuffle], [prompts[i] for i in shuffle])
    np.testing.assert_allclose(shuffled, interval_of_means(values, prompts), rtol=1e-12)


def test_a_summary_by_hand() -> None:
    (found,) = summarize(np.array([[1.0], [2.0], [3.0], [6.0]]), list("abcd"))
    assert found["mean"] == 3
    assert found["std"] == pytest.approx(math.sqrt(14 / 3))
    assert [found[key] for key in ("q25", "median", "q75")] == [1.75, 2.5, 3.75]
    assert found["high"] - 3 == pytest.approx(3 - found["low"])
    (alone,) = summarize(np.array([[0.5]]), ["a"])
    assert alone["std"] is alone["low"] is alone["high"] is None


def test_the_figure_shows_the_means() -> None:
    values = np.array(
        [[0.7, 0.5], [0.72, 0.5], [0.9, 0.5]]
    )  # one stage without spread, whose density is a line
    summaries = summarize(values, list("abc"))
    content = {"base": {"stages": dict(zip(["a_b", "c"], summaries, strict=True))}}
    (axes,) = stage_figure({"base": values}, content).axes
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
    assert "note: base: left out 1 of 41 rows" in text
    found = results(first.parent / "stages")
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


def test_differences_too_have_intervals_over_prompts(tmp_path: Path) -> None:
    """Two prompts, of which one has two videos; the second file does not tell prompts. Ends as in
    the test of the interval.
    """
    base = [{"video": f"{i}.mp4", "prompt": prompt, "score": 1.0} for i, prompt in enumerate("aab")]
    trained = [{"video": f"{i}.mp4", "score": score} for i, score in enumerate((2.0, 3.0, 7.0))]
    files = [write_rows(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((base, trained))]
    assert call(*files) == 0
    found = results(tmp_path / "stages")["sets"]["1"]["difference"]["score"]
    assert (found["mean"], found["high"]) == (3.0, pytest.approx(33.135411))


def test_names_and_numbers_as_they_are(tmp_path: Path) -> None:
    """Dollars are no formula, and a whole number may be of any size."""
    scores = 10**300, 1
    rows = [{"video": str(i), "rewards": {r"$\frac{$": score}} for i, score in enumerate(scores)]
    assert call(write_rows(tmp_path / "$^$.jsonl", rows)) == 0
    (found,) = results(tmp_path / "stages")["sets"]["$^$"]["stages"].values()
    assert found["mean"] == pytest.approx(5e299)


def test_sets_without_a_common_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = np.random.default_rng(0).uniform(size=(3, 3))
    files = write(tmp_path / "a.jsonl", scores), write(tmp_path / "b.jsonl", scores, "other")
    assert call(*files, "--names", "one", "two", "--output", tmp_path / "out") == 0
    note = "note: two: no difference to one: expected a video that all files have, got "
    assert note in capsys.readouterr().out
    assert results(tmp_path / "out")["sets"]["two"]["difference"] is None


def test_a_name_with_another_prompt_is_another_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"video": "a.mp4", "prompt": prompt, "score": 0.5} for prompt in ("a cat", "a dog")]
    files = [write_rows(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate(rows)]
    assert call(*files) == 0
    assert (
        "no difference to 0: expected one prompt of a.mp4 in all files" in capsys.readouterr().out
    )


def test_one_video_has_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(write_rows(tmp_path / "s.jsonl", [{"video": "a.mp4", "score": 0.25}])) == 0
    line = capsys.readouterr().out.splitlines()[2]
    assert re.fullmatch(r"score +s +1 +0.2500 +– +– *", line)
    assert results(tmp_path / "stages")["sets"]["s"]["stages"]["score"]["low"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("none.jsonl", "scores: expected a file, found none"),
        ("empty.jsonl", "scores: expected a row with scores in"),
        (
            "s.jsonl plain.jsonl",
            "plain.jsonl: expected the stages visual_quality, temporal_smoothness, text_alignment "
            "in all rows, got ['score']",
        ),
        ("s.jsonl --names a b", "names: expected 1 names, all different, got a, b"),
        ("s.jsonl --components", "scores: expected rows with components"),
        ("", "the following arguments are required: scores"),
    ],
)
def test_one_line_for_what_is_wrong(
    tmp_path: Path,
    words: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s.jsonl", np.full((2, 3), 0.5))
    write_rows(tmp_path / "empty.jsonl", [])
    write_rows(tmp_path / "plain.jsonl", [{"video": "a", "score": 1}])
    assert message in refused(capsys, *words.split())


def test_a_published_models_own_scores(tmp_path: Path) -> None:
    """Raw VQ and MQ, which the rewards are a map of."""
    rows = [
        {"video": f"{i}.mp4", "rewards": {"reward": 0.5}, "components": {"VQ": 3.0 + i, "MQ": -1.0}}
        for i in range(3)
    ]
    assert call(write_rows(tmp_path / "a.jsonl", rows), "--components") == 0
    found = results(tmp_path / "stages")
    assert found["stages"] == ["VQ", "MQ"]
    assert [found["sets"]["a"]["stages"][name]["mean"] for name in ("VQ", "MQ")] == [4.0, -1.0]
