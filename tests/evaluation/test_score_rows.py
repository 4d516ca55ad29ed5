"""Files of scores: every form of row, matching by video or prompt, refusals; and tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgrpo.evaluation.score_rows import (
    ScoredRow,
    ScoreFile,
    left_out_lines,
    match_rows,
    name_files,
    pick,
    read_scores,
)
from fastgrpo.evaluation.tables import Format, number, render_table, write_csv, write_json
from fastgrpo.training.sample_files import save_samples

FORMATS: tuple[Format, ...] = ("text", "markdown", "latex")


def write(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def test_every_form_of_row(tmp_path: Path) -> None:
    full = {
        "video": "a.mp4",
        "prompt": "a",
        "answers": {"x": 5.0},
        "rewards": {"x": 0.5, "y": 1},
        "judge": "0f",
    }
    error, null, nan = (
        {"video": "e", "error": "cut"},
        {"video": "n", "score": None},
        {"video": "n", "rewards": {"x": math.nan}},
    )
    path = write(
        tmp_path / "s.jsonl",
        full,
        error,
        "",
        {"video": "b.mp4", "score": -2},
        null,
        {"prompt": "c", "score": 3.5},
        nan,
    )
    found = read_scores(path)
    assert found.rows == [
        ScoredRow("a.mp4", "a", {"x": 0.5, "y": 1.0}, 0),
        ScoredRow("b.mp4", None, {"score": -2.0}, 2),
        ScoredRow(None, "c", {"score": 3.5}, 4),
    ]
    assert found.num_rows == 6
    assert left_out_lines(["judge"], [found], matched=1) == [
        "judge: left out 3 of 6 rows, with an error or without finite scores",
        "judge: left out 2 videos that another judge has no score for",
    ]
    assert pick(found, found.rows, "mean") == [0.75, -2.0, 3.5]
    with pytest.raises(ValueError, match=r"score: expected one of mean, score in .*, got 'x'"):
        pick(found, found.rows, "x")


def test_components_are_picked_by_name(tmp_path: Path) -> None:
    """As VideoAlign's rows have them: rewards in [0, 1] from raw scores, which may be negative."""
    rows = [
        {"video": str(i), "rewards": {"overall": 0.5}, "components": {"VQ": -1.5 + i, "overall": 9}}
        for i in range(2)
    ]
    found = read_scores(
        write(tmp_path / "s.jsonl", *rows, {"video": "2", "score": 1, "components": {"VQ": None}})
    )
    assert [pick(found, found.rows, score) for score in ("VQ", "overall", "mean")] == [
        [-1.5, -0.5],
        [0.5, 0.5],
        [0.5, 0.5],
    ]
    assert found.num_rows == 3
    with pytest.raises(ValueError, match="row 1: expected rewards"):
        read_scores(
            write(tmp_path / "s.jsonl", {"video": "a", "score": 1, "components": {"VQ": "1"}})
        )


def test_saved_samples(tmp_path: Path) -> None:
    """As training and `python -m fastgrpo sample` write them: with scores, with a score that was
    not finite, without.
    """
    scores = torch.tensor([[0.5, 0.75], [math.nan, 0.5]])
    save_samples(tmp_path, torch.zeros(2, 2, 3, 8, 8), ["a cat", "b"], 8.0, scores, ["x", "y"])
    found = read_scores(tmp_path / "samples.json")
    assert found.rows == [ScoredRow("00_a-cat.mp4", "a cat", {"x": 0.5, "y": 0.75}, 0)]
    assert found.num_rows == 2
    save_samples(tmp_path, torch.zeros(1, 2, 3, 8, 8), ["a cat"], 8.0)
    with pytest.raises(ValueError, match="got 'none in 1 rows'"):
        read_scores(tmp_path / "samples.json")
    for text in (
        '{"a": 1}',
        '{"stages": ["x"], "samples": [{"video": "a", "prompt": "a", "scores": [1, 2]}]}',
    ):
        (tmp_path / "samples.json").write_text(text)
        with pytest.raises(
            ValueError,
            match=r"samples.json: expected .jsonl, or the samples.json of saved samples, got",
        ):
            read_scores(tmp_path / "samples.json")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 as JSON in UTF-8"),
        ([1], r"row 2: expected a JSON object with the text video or prompt, got \[1\]"),
        ({"score": 1}, "row 2: expected a JSON object with the text video or prompt"),
        ({"video": 7, "score": 1}, "row 2: expected a JSON object with the text video or prompt"),
        ({"video": "a"}, "row 2: expected rewards, numbers by stage, or score"),
        ({"video": "a", "score": "3"}, "row 2: expected rewards"),
        ({"video": "a", "score": True}, "row 2: expected rewards"),
        ({"video": "a", "rewards": {}}, "row 2: expected rewards"),
        ({"video": "a", "rewards": [0.5]}, "row 2: expected rewards"),
    ],
)
def test_what_is_no_row_is_told_by_its_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"scores: .*s.jsonl, {message}"):
        read_scores(write(tmp_path / "s.jsonl", {"video": "a", "score": 1}, row))


def test_files_without_scores(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("3")
    with pytest.raises(ValueError, match=r"scores: .*s.json: expected rows of scores, got 3"):
        read_scores(tmp_path / "s.json")
    with pytest.raises(FileNotFoundError, match="scores: expected a file"):
        read_scores(tmp_path / "none.jsonl")
    for rows in ([], [{"video": "a", "error": "cut"}]):
        with pytest.raises(ValueError, match=f"a row with scores in .* got 'none in {len(rows)} "):
            read_scores(write(tmp_path / "s.jsonl", *rows))
    (tmp_path / "s.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"scores: cannot read .* as JSON in UTF-8"):
        read_scores(tmp_path / "s.jsonl")


def score_file(*rows: tuple[str | None, str | None]) -> ScoreFile:
    scored = [
        ScoredRow(video, prompt, {"score": float(i)}, i) for i, (video, prompt) in enumerate(rows)
    ]
    return ScoreFile(Path("s.jsonl"), scored, len(rows))


def test_videos_are_matched_by_the_first_name_that_tells_them_apart() -> None:
    def places(*files: ScoreFile) -> list[list[int]]:
        return [[row.row_index for row in rows] for rows in match_rows(files)]

    names = score_file(("/x/b.mp4", "p"), ("/x/a.mp4", "p"), ("/x/c.mp4", "p"))
    assert places(names, score_file(("/y/a.mp4", None), ("b.mp4", "p"))) == [[1, 0], [0, 1]]
    assert places(names) == [[1], [0], [2]]  # sorted
    paths = score_file(("/x/a.mp4", "p"), ("/y/a.mp4", "p"))
    assert places(paths, score_file(("/y/a.mp4", "p"), ("/z/a.mp4", "p"))) == [[1, 0]]
    without = score_file(("/y/a.mp4", None), ("/x/a.mp4", None))
    assert places(paths, without) == [[0, 1], [1, 0]]
    prompts = score_file(("a.mp4", "p"), ("a.mp4", "q"))
    assert places(prompts, score_file(("a.mp4", "q"))) == [[1, 0]]
    assert places(score_file((None, "p"), (None, "q")), score_file(("a.mp4", "q"))) == [[1, 0]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([[("a.mp4", "p"), ("a.mp4", "p")]], r"each video once in s.jsonl, got .*a.mp4.* 2 times"),
        ([[(None, "p"), (None, "p")]], "each video once in s.jsonl, got 'p 2 times'"),
        ([[("a.mp4", None)], [("b.mp4", None)]], r"all files have, got \['a.mp4', 'b.mp4'\]"),
        (
            [[("a.mp4", "p")], [("a.mp4", "q")]],
            r"one prompt of a.mp4 in all files, got \['p', 'q'\]",
        ),
        ([[(None, "p")], [("a.mp4", None)]], "a video or a prompt in all rows of s.jsonl"),
    ],
)
def test_what_cannot_be_matched(files: list[list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=f"scores: expected .*{message}"):
        match_rows([score_file(*rows) for rows in files])


def test_names_of_files() -> None:
    assert name_files([Path("x/a.jsonl"), Path("y/b.jsonl")], None) == ["a", "b"]
    assert name_files([Path("x/s.jsonl"), Path("y/s.jsonl")], None) == ["x", "y"]
    assert name_files([Path("/x/s.jsonl"), Path("/z/x/s.jsonl")], None) == [
        "/x/s.jsonl",
        "/z/x/s.jsonl",
    ]
    assert name_files([Path("x/s.jsonl"), Path("y/s.jsonl")], ["one", "two"]) == ["one", "two"]
    assert name_files([Path("r_eval_results.json"), Path("wan2.1")], None) == ["r", "wan2.1"]
    with pytest.raises(ValueError, match=r"results: expected 2 names, all different, got /.*/x, /"):
        name_files([Path("x"), Path("x")], None, key="results")
    for names in (["one"], ["one", "one"]):
        with pytest.raises(ValueError, match="names: expected 2 names, all different, got one"):
            name_files([Path("x"), Path("y")], names)


def test_tables_to_read() -> None:
    """Names that the format would misread are escaped; a minus sign is one, a hyphen stays."""
    rows = [["a", "x_1|y"], ["b", "-0.1 (-2)"], ["run-2", ""]]
    tables = {format: render_table(rows, format, totals=[1]) for format in FORMATS}
    lines = tables["text"].splitlines()
    assert [line.split() for line in lines if "--" not in line] == [
        *(["a", "x_1|y"], ["b", "-0.1", "(-2)"], ["run-2"]),
    ]
    assert lines[1] == lines[3] == "-----  ---------"
    assert "x_1\\|y" in tables["markdown"]
    assert "| **b** | **−0.1 (−2)** |" in tables["markdown"]
    assert tables["latex"].count(r"\midrule") == 2
    assert r"x\_1\textbar{}y" in tables["latex"]
    assert "$-$0.1 ($-$2)" in tables["latex"]
    assert all("run-2" in table for table in tables.values())


def test_tables_as_files(tmp_path: Path) -> None:
    assert [number(0.5), number(math.nan), number(math.inf)] == [0.5, None, None]
    write_csv(tmp_path / "t.csv", [{"a": 1, "b": None}, {"a": 'x, "y"', "b": 0.5}])
    assert (tmp_path / "t.csv").read_bytes() == b'a,b\r\n1,\r\n"x, ""y""",0.5\r\n'
    write_json(tmp_path / "t.json", {"κ": None})
    assert json.loads((tmp_path / "t.json").read_text()) == {"κ": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "t.json", {"κ": math.nan})
