"""Read files of scores: those of `python -m fastgrpo score`, and those of any other judge.

Each line is a JSON object: {"video": path, "prompt": text, "rewards": {stage: number}}, or for a
judge that gives one number {"video": path, "score": number}. Either video or prompt may be missing.
A row with "error" is left out. Beside the rewards there may be "components": {name: number}, a
published model's scores on its own scale. Other keys are ignored. The samples.json beside saved
samples is read too.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo.errors import UserError
from fastgrpo.files import find_file

MEAN = "mean"
"""In place of a stage: the mean over a row's stages."""
Key = tuple[str, ...]


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
    errors: int
    not_finite: int

    def left_out(self) -> str:
        """How many rows have no scores, and why; "" if all have."""
        reasons = {
            "with an error": self.errors,
            "with a score that is no finite number": self.not_finite,
        }
        parts = [f"{count} {reason}" for reason, count in reasons.items() if count]
        return f"{', '.join(parts)} of {self.num_rows}" if parts else ""


def read_scores(path: Path) -> ScoreFile:
    """Read a file of scores.

    Raises:
        FileNotFoundError, UserError: There is no such file, a line is no row, or no row has scores.
    """
    file = find_file(str(path), "scores")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"scores: cannot read {file} as UTF-8 text: {error}") from error
    if file.suffix == ".json":
        entries = [
            (entry, f"{file}, sample {number}")
            for number, entry in enumerate(_samples(text, file), start=1)
        ]
    else:
        entries = [
            (_json(line, f"{file}, line {number}"), f"{file}, line {number}")
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    read = [_parse(entry, index, where) for index, (entry, where) in enumerate(entries)]
    scored = [row for row in read if row is not None]
    rows = [
        row for row in scored if all(map(math.isfinite, (row.scores | row.components).values()))
    ]
    found = ScoreFile(file, rows, len(read), len(read) - len(scored), len(scored) - len(rows))
    if not rows:
        why = f": {found.left_out()}" if read else ""
        raise UserError(f"scores: expected a row with scores in {file}, found none{why}")
    return found


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"scores: {where}: expected a JSON object, got {error}") from error


def _samples(text: str, file: Path) -> list[dict[str, Any]]:
    """The entries of a samples.json (`figures.save_samples`) as rows of scores."""
    content = _json(text, str(file))
    rows = []
    try:
        for sample in content["samples"]:
            row = {"video": sample["video"], "prompt": sample["prompt"]}
            if sample["scores"]:
                row["rewards"] = dict(zip(content["stages"], sample["scores"], strict=True))
            else:
                row["error"] = "no scores"
            rows.append(row)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"scores: {file}: expected .jsonl, or the samples.json of saved samples, got "
            f"{text[:60]!r} ({error!r})"
        ) from error
    return rows


def _parse(row: Any, index: int, where: str) -> ScoredRow | None:
    """The row with null as NaN; None for a row with an error."""
    texts = [row.get(key) for key in ("video", "prompt")] if isinstance(row, dict) else []
    if not any(texts) or not all(text is None or isinstance(text, str) for text in texts):
        expected = "a JSON object with the text video or prompt"
        raise UserError(f"scores: {where}: expected {expected}, got {_short(row)}")
    if row.get("error"):
        return None
    scores = row.get("rewards", {"score": row["score"]} if "score" in row else None)
    components = row.get("components", {})
    if not scores or not (_are_numbers(scores) and _are_numbers(components)):
        expected = "rewards, numbers by stage, or score, a number, or error"
        raise UserError(f"scores: {where}: expected {expected}, got {_short(row)}")
    scores, components = (
        {name: math.nan if value is None else float(value) for name, value in values.items()}
        for values in (scores, components)
    )
    return ScoredRow(texts[0], texts[1], scores, index, components)


def _short(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False)[:80]


def _are_numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        for value in values.values()
    )


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
        if score not in table:
            raise UserError(
                f"score: expected {MEAN} or one of {', '.join(table)} in {file.path}, got {score}"
            )
    return [table[score] for table in tables]


def match_rows(files: Sequence[ScoreFile]) -> list[list[ScoredRow]]:
    """For each video that all files have, sorted by its name, its row in each file.

    Videos are told apart by the first of these that is unique in every file: the name of the video
    file, its path, path and prompt. If any row has no video, they are told apart by the prompt.

    Raises:
        UserError: A file has a video or a prompt twice, or no video is in all files.
    """
    kinds: list[Callable[[ScoredRow], Key]] = [
        lambda row: (Path(row.video or "").name,),
        lambda row: (row.video or "",),
        lambda row: (row.video or "", row.prompt or ""),
    ]
    if any(row.video is None for file in files for row in file.rows):
        kinds = [lambda row: (row.prompt or "",)]
    for kind in kinds:
        keyed = [[kind(row) for row in file.rows] for file in files]
        if all(len(set(keys)) == len(keys) for keys in keyed):
            break
    for file, keys in zip(files, keyed, strict=True):
        if ("",) in keys:
            raise UserError(
                "scores: expected a video or a prompt in every row of all files, got a row without "
                f"in {file.path}"
            )
        key, times = Counter(keys).most_common(1)[0]
        if times > 1:
            raise UserError(
                f"scores: expected each video once in {file.path}, got "
                f"{' with the prompt '.join(key)} {times} times"
            )
    common = sorted(set(keyed[0]).intersection(*keyed[1:]))
    if not common:
        examples = " and ".join(
            f"{keys[0][0]} in {file.path}" for file, keys in zip(files, keyed, strict=True)
        )
        raise UserError(f"scores: expected a video that all files have, got none: {examples}")
    tables = [
        dict(zip(keys, file.rows, strict=True)) for file, keys in zip(files, keyed, strict=True)
    ]
    return [[table[key] for table in tables] for key in common]


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
    raise UserError(
        f"{key}: expected {len(paths)} names, all different, got {', '.join(choices[-1])}"
    )


def left_out_lines(names: Sequence[str], files: Sequence[ScoreFile], matched: int) -> list[str]:
    """For each judge whose file has more rows than were used, how many were left out and why."""
    lines = []
    for name, file in zip(names, files, strict=True):
        if file.left_out():
            lines.append(f"{name}: left out {file.left_out()} rows")
        if len(file.rows) > matched:
            others = len(file.rows) - matched
            lines.append(f"{name}: left out {others} videos that another judge has no score for")
    return lines
