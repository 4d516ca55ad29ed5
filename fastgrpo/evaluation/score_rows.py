"""Files of scores as the analysis reads them: of `python -m fastgrpo score`, or of any other judge.

A JSON object a line: {"video": path, "prompt": text, "rewards": {stage: number}}, or of a judge
that gives one number {"video": path, "score": number}. One of video and prompt may be missing,
and a row with "error" is left out. Beside rewards there may be "components": {name: number}, a
published model's scores on its own scale; other keys are ignored. The samples.json beside saved
samples is taken too.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo.files import find_file

MEAN = "mean"
"""Names the mean of a row's scores, where a stage may be named."""
Key = tuple[str, ...]


@dataclass(frozen=True)
class ScoredRow:
    """The scores of one video, finite, by stage; a file with one number a row has the stage
    `score`.
    """

    video: str | None
    prompt: str | None
    scores: dict[str, float]
    place: int
    """Which of the file's rows it is, from 0, those left out counted too."""
    components: dict[str, float] = field(default_factory=dict)
    """Beside the scores, the same judge's on its own scale."""


@dataclass(frozen=True)
class ScoreFile:
    """The rows of a file that have scores, and how many it has in all."""

    path: Path
    rows: list[ScoredRow]
    num_rows: int
    errors: int
    not_finite: int

    def left_out(self) -> str:
        """In words, the rows that have no scores; empty where all have."""
        parts = [
            (self.errors, "with an error"),
            (self.not_finite, "with a score that is no finite number"),
        ]
        return (
            f"{', '.join(f'{count} {what}' for count, what in parts if count)} of {self.num_rows}"
            if len(self.rows) < self.num_rows
            else ""
        )


def read_scores(path: Path) -> ScoreFile:
    """The rows of a file of scores. FileNotFoundError, ValueError: no such file, a line that is no
    row, or no row with scores; names it.
    """
    file = find_file(str(path), "scores")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"scores: cannot read {file} as UTF-8 text: {error}") from error
    if file.suffix == ".json":
        samples = [
            (row, f"{file}, sample {number}")
            for number, row in enumerate(_samples(text, file), start=1)
        ]
        values = [_parse(row, where) for row, where in samples]
    else:
        lines = [
            (line, f"{file}, line {number}")
            for number, line in enumerate(text.split("\n"), start=1)
        ]
        values = [_parse(_json(line, where), where) for line, where in lines if line.strip()]
    errors = sum(value is None for value in values)
    read = [
        ScoredRow(*value[:3], place, value[3])
        for place, value in enumerate(values)
        if value is not None
    ]
    rows = [row for row in read if all(map(math.isfinite, (row.scores | row.components).values()))]
    found = ScoreFile(file, rows, len(values), errors, len(read) - len(rows))
    if not rows:
        raise ValueError(
            f"scores: expected a row with scores in {file}, found none{f': {found.left_out()}' if values else ''}"
        )
    return found


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"scores: {where}: expected a JSON object, got {error}") from error


def _samples(text: str, file: Path) -> list[Any]:
    """The entries of a samples.json of `figures.save_samples` as rows of scores."""
    content = _json(text, str(file))
    try:
        stages, samples = content["stages"], content["samples"]
        named = [
            sample["scores"] and dict(zip(stages, sample["scores"], strict=True))
            for sample in samples
        ]
        whats = [{"rewards": scores} if scores else {"error": "no scores"} for scores in named]
        return [
            {"video": sample["video"], "prompt": sample["prompt"], **what}
            for sample, what in zip(samples, whats, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"scores: {file}: expected .jsonl, or the samples.json of saved samples, got {text[:60]!r} ({error!r})"
        ) from error


def _parse(
    row: Any, where: str
) -> tuple[str | None, str | None, dict[str, float], dict[str, float]] | None:
    """Video, prompt, scores and components (null as NaN) of a row; None of one with an error."""
    shown = json.dumps(row, ensure_ascii=False)[:80]
    texts = [row.get(key) for key in ("video", "prompt")] if isinstance(row, dict) else []
    if not any(texts) or not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError(
            f"scores: {where}: expected a JSON object with the text video or prompt, got {shown}"
        )
    if row.get("error"):
        return None
    scores = (
        row["rewards"] if "rewards" in row else {"score": row["score"]} if "score" in row else None
    )
    found = [scores, row.get("components", {})]
    if not scores or not all(
        isinstance(v, dict) and all(value is None or _is_number(value) for value in v.values())
        for v in found
    ):
        raise ValueError(
            f"scores: {where}: expected rewards, numbers by stage, or score, a number, or error, got {shown}"
        )
    numbers = [
        {name: math.nan if value is None else float(value) for name, value in values.items()}
        for values in found
    ]
    return texts[0], texts[1], numbers[0], numbers[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def pick(file: ScoreFile, rows: Sequence[ScoredRow], score: str) -> list[float]:
    """One number of each of a file's rows: the stage, or else the component, of that name, or the
    mean of all stages.

    ValueError: a row that has none of that name.
    """
    if score == MEAN:
        return [sum(row.scores.values()) / len(row.scores) for row in rows]
    tables = [row.components | row.scores for row in rows]
    for table in tables:
        if score not in table:
            raise ValueError(
                f"score: expected {MEAN} or one of {', '.join(table)} in {file.path}, got {score}"
            )
    return [table[score] for table in tables]


def match_rows(files: Sequence[ScoreFile]) -> list[list[ScoredRow]]:
    """For each video that all files have, sorted by its name, its row in each of them.

    Videos are told apart by the name of their file; where one has a name twice, by the whole
    path; where one has a path twice, by path and prompt; and by the prompt alone where a row has
    no video.

    Raises:
        ValueError: a file has a video, or a prompt, twice; or no video is in all of them.
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
        key, times = Counter(keys).most_common(1)[0]
        if not all(keys) or key == ("",):
            raise ValueError(
                f"scores: expected a video or a prompt in every row of all files, got a row without in {file.path}"
            )
        if times > 1:
            raise ValueError(
                f"scores: expected each video once in {file.path}, got {' with the prompt '.join(key)} {times} times"
            )
    common = sorted(set(keyed[0]).intersection(*keyed[1:]))
    if not common:
        examples = " and ".join(
            f"{keys[0][0]} in {file.path}" for file, keys in zip(files, keyed, strict=True)
        )
        raise ValueError(f"scores: expected a video that all files have, got none: {examples}")
    tables = [
        dict(zip(keys, file.rows, strict=True)) for file, keys in zip(files, keyed, strict=True)
    ]
    return [[table[key] for table in tables] for key in common]


def name_files(paths: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """A name for each file: the given ones, or its name without ending, or its folder's, or its
    path, whichever first tells all apart.

    ValueError: not one name for each, or two alike.
    """
    if names is not None:
        if len(names) != len(paths) or len(set(names)) < len(names):
            raise ValueError(
                f"names: expected one for each of {len(paths)} files of scores, all different, got {', '.join(names)}"
            )
        return list(names)
    absolute = [path.absolute() for path in paths]
    for found in (
        [path.stem for path in paths],
        [path.parent.name for path in absolute],
        [str(path) for path in absolute],
    ):
        if len(set(found)) == len(found):
            return found
    raise ValueError(f"scores: expected different files, got {', '.join(map(str, paths))}")


def left_out_lines(names: Sequence[str], files: Sequence[ScoreFile], matched: int) -> list[str]:
    """For each judge whose file has more rows than were used, how many and why."""
    lines = []
    for name, file in zip(names, files, strict=True):
        if file.left_out():
            lines.append(f"{name}: left out {file.left_out()} rows")
        if len(file.rows) > matched:
            lines.append(
                f"{name}: left out {len(file.rows) - matched} videos that another judge has no score for"
            )
    return lines
