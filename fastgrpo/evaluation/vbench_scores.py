"""VBench's result files, and its quality, semantic and total scores.

Facts from https://github.com/Vchitect/VBench: scripts/constant.py and scripts/cal_final_score.py
(normalisation and weights), vbench/__init__.py (form of results). None of its data is copied here.
VBench itself need not be installed; it asks for libraries so old that it is best kept in an
environment of its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastgrpo.errors import UserError, require


@dataclass(frozen=True)
class Dimension:
    """One of VBench's dimensions.

    Attributes:
        name: As VBench's files have it.
        group: The score that it enters.
        minimum: The fraction that is normalised to 0.
        maximum: The fraction that is normalised to 1.
        weight: Within its group.
    """

    name: str
    group: Literal["quality", "semantic"]
    minimum: float = 0.0
    maximum: float = 1.0
    weight: float = 1.0

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")


DIMENSIONS = (
    Dimension("subject_consistency", "quality", 0.1462),
    Dimension("background_consistency", "quality", 0.2615),
    Dimension("temporal_flickering", "quality", 0.6293),
    Dimension("motion_smoothness", "quality", 0.706, 0.9975),
    Dimension("dynamic_degree", "quality", weight=0.5),
    Dimension("aesthetic_quality", "quality"),
    Dimension("imaging_quality", "quality"),
    Dimension("object_class", "semantic"),
    Dimension("multiple_objects", "semantic"),
    Dimension("human_action", "semantic"),
    Dimension("color", "semantic"),
    Dimension("spatial_relationship", "semantic"),
    Dimension("scene", "semantic", 0.0, 0.8222),
    Dimension("appearance_style", "semantic", 0.0009, 0.2855),
    Dimension("temporal_style", "semantic", 0.0, 0.364),
    Dimension("overall_consistency", "semantic", 0.0, 0.364),
)
"""The sixteen, in VBench's order."""
TOTALS = ("quality", "semantic", "total")
SUFFIX = "_eval_results.json"
"""Ending of the names of VBench's result files."""
Scale = Literal["auto", "fraction", "percent"]


@dataclass(frozen=True)
class Scores:
    """VBench's scores of one set of videos, in points (percent).

    Attributes:
        raw: By dimension, as VBench measures them and papers print them.
        normalized: By dimension, (score - minimum) / (maximum - minimum).
        quality: Weighted mean of its seven normalised dimensions; None if one is missing.
        semantic: Mean of its nine; None if one is missing.
        total: (4 quality + semantic) / 5; None if either is.
    """

    raw: dict[str, float]
    normalized: dict[str, float]
    quality: float | None
    semantic: float | None
    total: float | None

    @property
    def missing(self) -> list[str]:
        return [d.name for d in DIMENSIONS if d.name not in self.raw]


def vbench_scores(fractions: Mapping[str, float]) -> Scores:
    """Normalise the dimensions and average them with VBench's weights.

    As in VBench nothing is clipped: motion smoother than the published maximum gives more than 100
    points.

    Args:
        fractions: Scores in [0, 1] by name of the dimension; some may be missing.
    """
    known = [d for d in DIMENSIONS if d.name in fractions]
    raw = {d.name: 100 * fractions[d.name] for d in known}
    normalized = {
        d.name: 100 * (fractions[d.name] - d.minimum) / (d.maximum - d.minimum) for d in known
    }
    quality, semantic = (_group_score(group, normalized) for group in ("quality", "semantic"))
    total = None
    if quality is not None and semantic is not None:
        total = (4 * quality + semantic) / 5
    return Scores(raw, normalized, quality, semantic, total)


def _group_score(group: str, normalized: Mapping[str, float]) -> float | None:
    members = [d for d in DIMENSIONS if d.group == group]
    if any(d.name not in normalized for d in members):
        return None
    return sum(d.weight * normalized[d.name] for d in members) / sum(d.weight for d in members)


def read_results(path: Path, scale: Scale = "auto") -> dict[str, float]:
    """Read one result file, or all *_eval_results.json of a folder and the folders in it.

    A file is either VBench's, {dimension: [score, [per video]]}, always in fractions; or plain,
    {dimension: score}.

    Args:
        path: A file or a folder.
        scale: Of plain files. auto: fractions if no score is above 1, percent if all are (a 0 is a
            0 either way). What could be either is refused: scores above 1 beside some in (0, 1], or
            none above 1 and none of the four dimensions that never come below 1 %.

    Returns:
        Fractions by name of the dimension.

    Raises:
        FileNotFoundError, UserError: Nothing is there, or not such a file; a name is no dimension;
            a score is out of range or given twice.
    """
    if not path.is_dir():
        return _read_file(path, scale)
    files = sorted(path.rglob(f"*{SUFFIX}"))
    if not files:
        raise FileNotFoundError(
            f"{path}: expected VBench's result files, *{SUFFIX}, found none in this folder"
        )
    source: dict[str, tuple[float, Path]] = {}
    for file in files:
        for name, score in _read_file(file, scale).items():
            first, where = source.setdefault(name, (score, file))
            if first != score:
                got = f"{first} in {where.name} and {score} in {file.name}"
                raise UserError(f"{path}: expected one score of {name}, got {got}")
    return {name: score for name, (score, _) in source.items()}


def _read_file(file: Path, scale: Scale) -> dict[str, float]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{file}: expected a result file of VBench or a folder of them, found none"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON in UTF-8: {error}") from error
    expected = "{dimension: score} or VBench's {dimension: [score, [...]]}"
    require(isinstance(content, dict) and content, str(file), expected, content)
    known = {d.name for d in DIMENSIONS}
    vbench: dict[str, float] = {}
    plain: dict[str, float] = {}
    for key, value in content.items():
        name = re.sub(r"[\s_-]+", "_", key.strip().lower())
        require(name in known, str(file), f"VBench's dimensions, such as {DIMENSIONS[0].name}", key)
        if name in vbench | plain:
            raise UserError(f"{file}: expected one score of {name}, got two")
        whole = isinstance(value, list) and bool(value)
        score = value[0] if whole else value
        is_number = isinstance(score, int | float) and not isinstance(score, bool)
        require(is_number and math.isfinite(score), f"{file}: {key}", "a finite number", score)
        (vbench if whole else plain)[name] = float(score)
    plain_scale = _guess_scale(plain, file) if scale == "auto" else scale
    return _as_fractions(vbench, "fraction", file) | _as_fractions(plain, plain_scale, file)


def _guess_scale(scores: Mapping[str, float], file: Path) -> Scale:
    above = [name for name, score in scores.items() if score > 1]
    up_to_one = [name for name, score in scores.items() if 0 < score <= 1]
    if above and up_to_one:
        got = " beside ".join(f"{name} {scores[name]}" for name in (above[0], up_to_one[0]))
        raise UserError(f"{file}: expected fractions or percent, got {got}; --scale says which")
    never_small = [d.name for d in DIMENSIONS if d.minimum > 0.01]
    if up_to_one and not any(name in scores for name in never_small):
        raise UserError(
            f"{file}: whether {up_to_one[0]} {scores[up_to_one[0]]} is a fraction or percent cannot"
            f" be told without {', '.join(never_small)}; --scale says which"
        )
    return "percent" if above else "fraction"


def _as_fractions(scores: Mapping[str, float], scale: Scale, file: Path) -> dict[str, float]:
    most, word = (100, "percent") if scale == "percent" else (1, "a fraction")
    for name, score in scores.items():
        require(0 <= score <= most, f"{file}: {name}", f"{word} in [0, {most}]", score)
    return {name: score / most for name, score in scores.items()}
