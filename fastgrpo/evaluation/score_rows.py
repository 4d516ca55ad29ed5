"""Read files of scores: those of `python -m fastgrpo score`, and those of any other judge.

Each line is a JSON object: {"video": path, "prompt": text, "rewards": {stage: number}}, or for a
judge that gives one number {"video": path, "score": number}. Either video or prompt may be missing.
A row with "error" is left out. Beside the rewards there may be "components": {name: number}, a
published model's scores on its own scale. Other keys are ignored. The samples.json beside saved
samples is read too.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo.errors import UserError, require
from fastgrpo.evaluation.json_rows import read_json
from fastgrpo.training.prompts import checked_text

MEAN = "mean"
"""In place of a stage: the mean over a row's stages."""


@dataclass(frozen=True)
class ScoredRow:
    """One video with finite scores.

    Attributes:
        video: Its path, or None.
        prompt: Its prompt, or None.
        scores: By stage; a file with one number per row has the stage `score`.
        row_index: Index of the row in its file, counting also the rows that are left out.
        components: The same judge's scores on its own scale, by name.
    """

    video: str | None
    prompt: str | None
    scores: dict[str, float]
    row_index: int
    components: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoreFile:
    """The rows of a file that have scores, and how many rows it has in all."""

    path: Path
    rows: list[ScoredRow]
    num_rows: int


def read_scores(path: Path) -> ScoreFile:
    """Read a file of scores. Rows with an error or without finite scores are left out.

    Raises:
        FileNotFoundError, UserError: There is no such file, a line is no row, or no row has scores.
    """
    content = read_json(path, "scores")
    if isinstance(content, dict):
        content = _samples(content, path)
    require(isinstance(content, list), f"scores: {path}", "rows of scores", content)
    parsed = [_parse(row, index, path) for index, row in enumerate(content)]
    rows = [row for row in parsed if row is not None]
    require(rows, "scores", f"a row with scores in {path}", f"none in {len(parsed)} rows")
    return ScoreFile(path, rows, len(parsed))


def _samples(content: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The entries of a samples.json (`sample_files.save_samples`) as rows of scores."""
    try:
        return [
            {"video": sample["video"], "prompt": sample["prompt"]}
            | (
                {"rewards": dict(zip(content["stages"], sample["scores"], strict=True))}
                if sample["scores"]
                else {"error": "no scores"}
            )
            for sample in content["samples"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"scores: {path}: expected .jsonl, or the samples.json of saved samples, got {error!r}"
        ) from error


def _parse(row: Any, index: int, path: Path) -> ScoredRow | None:
    where = f"scores: {path}, row {index + 1}"
    texts = [row.get(key) for key in ("video", "prompt")] if isinstance(row, dict) else []
    named = any(texts) and all(text is None or isinstance(text, str) for text in texts)
    require(named, where, "a JSON object with the text video or prompt", row)
    if row.get("error"):
        return None
    if texts[1]:
        checked_text(texts[1], where)
    scores = row.get("rewards", {"score": row["score"]} if "score" in row else None)
    components = row.get("components", {})
    are_numbers = bool(scores) and all(
        isinstance(table, dict) and all(type(x) in (int, float, type(None)) for x in table.values())
        for table in (scores, components)
    )
    require(are_numbers, where, "rewards, numbers by stage, or score, a number, or error", row)
    values = [*scores.values(), *components.values()]
    # Compared, since an integer beyond a float's range cannot be converted.
    if not all(value is not None and abs(value) <= sys.float_info.max for value in values):
        return None
    return ScoredRow(texts[0], texts[1], scores, index, components)


def pick(file: ScoreFile, rows: Sequence[ScoredRow], score: str) -> list[float]:
    """One number per row: the stage of this name, else the component, or with MEAN the mean over
    the stages.

    Raises:
        UserError: A row has no score of this name.
    """
    if score == MEAN:
        return [sum(row.scores.values()) / len(row.scores) for row in rows]
    tables = [row.components | row.scores for row in rows]
    for table in tables:
        names = ", ".join([MEAN, *table])
        require(score in table, "score", f"one of {names} in {file.path}", score)
    return [table[score] for table in tables]


def match_rows(files: Sequence[ScoreFile]) -> list[list[ScoredRow]]:
    """For each video that all files have, sorted by its name, its row in each file.

    Videos are told apart by the name of the video file or, if that is not unique in a file, by its
    path, or else by path and prompt. If any row has no video, they are told apart by the prompt.

    Raises:
        UserError: A file has a video or a prompt twice, or no video is in all files, or one has
            another prompt in another file.
    """
    kinds: list[Callable[[ScoredRow], Any]] = [
        lambda row: Path(row.video or "").name,
        lambda row: row.video,
        lambda row: (row.video, row.prompt or ""),
    ]
    if any(row.video is None for file in files for row in file.rows):
        for file in files:
            prompts = [row.prompt or "" for row in file.rows]
            require(all(prompts), "scores", f"a video or a prompt in all rows of {file.path}", "")
        kinds = [lambda row: row.prompt]
    for kind in kinds:
        tables = [{kind(row): row for row in file.rows} for file in files]
        if all(len(table) == len(file.rows) for table, file in zip(tables, files, strict=True)):
            break
    for file in files:
        key, times = Counter(map(kind, file.rows)).most_common(1)[0]
        require(times == 1, "scores", f"each video once in {file.path}", f"{key} {times} times")
    common = sorted(set(tables[0]).intersection(*tables[1:]))
    examples = [next(iter(table)) for table in tables]
    require(common, "scores", "a video that all files have", examples)
    matched = [[table[key] for table in tables] for key in common]
    for rows in matched:
        # Videos of one name that show other prompts are not the same video.
        prompts = list(dict.fromkeys(row.prompt for row in rows if row.prompt))
        require(len(prompts) < 2, "scores", f"one prompt of {rows[0].video} in all files", prompts)
    return matched


def name_files(
    paths: Sequence[Path], names: Sequence[str] | None, key: str = "scores"
) -> list[str]:
    """A name for each file: the given ones, or its name without ending, or its folder's, or its
    path, whichever first tells all apart.

    Raises:
        UserError: There is not one name per file, or two are alike; names `key` or `names`.
    """
    absolute = [path.absolute() for path in paths]
    choices = [
        [re.sub(r"(_eval_results)?\.jsonl?$", "", path.name) for path in absolute],
        [path.parent.name for path in absolute],
        [str(path) for path in absolute],
    ]
    if names:
        key, choices = "names", [list(names)]
    for found in choices:
        if len(set(found)) == len(found) == len(paths):
            return found
    got = ", ".join(choices[-1])
    raise UserError(f"{key}: expected {len(paths)} names, all different, got {got}")


def left_out_lines(names: Sequence[str], files: Sequence[ScoreFile], matched: int) -> list[str]:
    """For each judge whose file has more rows than were used, how many were left out and why."""
    lines = []
    for name, file in zip(names, files, strict=True):
        without, others = file.num_rows - len(file.rows), len(file.rows) - matched
        if without:
            why = "with an error or without finite scores"
            lines.append(f"{name}: left out {without} of {file.num_rows} rows, {why}")
        if others > 0:
            lines.append(f"{name}: left out {others} videos that another judge has no score for")
    return lines
