"""VBench's result files, and its quality, semantic and total scores.

Facts from https://github.com/Vchitect/VBench: scripts/constant.py and scripts/cal_final_score.py
(normalisation and weights), vbench/__init__.py (form of results). None of its data is copied here.
VBench itself need not be installed; it asks for libraries so old that it is best kept in an
environment of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastgrpo.errors import require
from fastgrpo.evaluation.json_rows import read_json


@dataclass(frozen=True)
class Dimension:
    """One of VBench's dimensions.

    Attributes:
        name: As VBench's files have it.
        group: The score that it enters.
        minimum: The fraction that is normalised to 0.
        maximum: The fraction that is normalised to 1.
        weight: Within its group.
        lowest: The least that VBench can give: -1 for a cosine of CLIP or ViCLIP, which VBench does
            not clip, and for the aesthetic predictor, which is a linear one.
    """

    name: str
    group: Literal["quality", "semantic"]
    minimum: float = 0.0
    maximum: float = 1.0
    weight: float = 1.0
    lowest: float = 0.0

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")


DIMENSIONS = (
    Dimension("subject_consistency", "quality", 0.1462),
    Dimension("background_consistency", "quality", 0.2615),
    Dimension("temporal_flickering", "quality", 0.6293),
    Dimension("motion_smoothness", "quality", 0.706, 0.9975),
    Dimension("dynamic_degree", "quality", weight=0.5),
    Dimension("aesthetic_quality", "quality", lowest=-1.0),
    Dimension("imaging_quality", "quality"),
    Dimension("object_class", "semantic"),
    Dimension("multiple_objects", "semantic"),
    Dimension("human_action", "semantic"),
    Dimension("color", "semantic"),
    Dimension("spatial_relationship", "semantic"),
    Dimension("scene", "semantic", 0.0, 0.8222),
    Dimension("appearance_style", "semantic", 0.0009, 0.2855, lowest=-1.0),
    Dimension("temporal_style", "semantic", 0.0, 0.364, lowest=-1.0),
    Dimension("overall_consistency", "semantic", 0.0, 0.364, lowest=-1.0),
)
"""The sixteen, in VBench's order."""
_ROUNDING = 1e-6  # of a mean in fp32
TOTALS = ("quality", "semantic", "total")
SUFFIX = "_eval_results.json"
"""Ending of the names of VBench's result files."""


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
        fractions: Scores up to 1 by name of the dimension; some may be missing.
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


def read_results(path: Path) -> dict[str, float]:
    """Read one result file of VBench, or all *_eval_results.json of a folder and the folders in it.

    Args:
        path: A file {dimension: [score, [per video]]} with scores in [0, 1], or [-1, 1] where
            VBench does not clip; or a folder of them.

    Returns:
        Scores by name of the dimension.

    Raises:
        FileNotFoundError, UserError: Nothing is there, or not such a file; a name is no dimension;
            a score is out of range or given twice.
    """
    files = sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(
            f"{path}: expected VBench's result files, *{SUFFIX}, found none in this folder"
        )
    found: dict[str, float] = {}
    for file in files:
        for name, score in _read_file(file).items():
            first = found.setdefault(name, score)
            require(first == score, str(file), f"one score of {name}, {first}", score)
    return found


def _read_file(file: Path) -> dict[str, float]:
    content = read_json(file, "results")
    expected = "VBench's {dimension: [score, [...]]}"
    require(isinstance(content, dict) and content, str(file), expected, content)
    known = {d.name: d for d in DIMENSIONS}
    for name, value in content.items():
        expected = f"VBench's dimensions, such as {DIMENSIONS[0].name}"
        require(name in known, str(file), expected, name)
        lowest = known[name].lowest
        ok = isinstance(value, list) and value and type(value[0]) in (int, float)
        ok = ok and lowest - _ROUNDING <= value[0] <= 1 + _ROUNDING
        require(ok, f"{file}: {name}", f"[a score in [{lowest:g}, 1], [...]]", value)
    return {name: float(value[0]) for name, value in content.items()}
