"""VBench's text-to-video suite: its prompts as it wants them sampled, its result files, and its
quality, semantic and total scores.

Facts from https://github.com/Vchitect/VBench: scripts/constant.py and scripts/cal_final_score.py
(normalisation and weights), prompts/README.md (numbers of samples), vbench/__init__.py (names of
files, form of results). None of its data is copied here. VBench itself need not be installed; it
asks for libraries so old that it is best kept in an environment of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastgrpo.files import find_file
from fastgrpo.training.prompts import read_prompts


@dataclass(frozen=True)
class Dimension:
    """One of VBench's dimensions: what a score (a fraction) is normalised with, and its weight
    inside its group.
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
TOTAL_WEIGHTS = {"quality": 4.0, "semantic": 1.0}
"""Of the two groups in the total score."""
SAMPLES, FLICKERING_SAMPLES = 5, 25
"""Videos a prompt; more where temporal flickering is judged, of which VBench's static filter then
picks five that are still.
"""
SUFFIX = "_eval_results.json"
"""What the names of VBench's result files end with."""
Scale = Literal["auto", "fraction", "percent"]
_LONGEST_NAME = 240  # bytes; most file systems take 255, and the index and the ending come on top


# --- scores
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """VBench's scores of one set of videos, in points (percent); None where a dimension that is
    needed is missing.
    """

    raw: dict[str, float]
    """As VBench measures them, by dimension; what papers print."""
    normalized: dict[str, float]
    """(score - minimum) / (maximum - minimum)."""
    quality: float | None
    semantic: float | None
    total: float | None

    @property
    def missing(self) -> list[str]:
        return [d.name for d in DIMENSIONS if d.name not in self.raw]


def vbench_scores(fractions: Mapping[str, float]) -> Scores:
    """Normalise, and average with VBench's weights: 4/5 quality (dynamic degree counts half), 1/5
    semantic.

    fractions: score by dimension name, in [0, 1]; dimensions may be missing. As in VBench
    nothing is clipped: motion smoother than the published maximum comes to more than 100 points.
    """
    known = [d for d in DIMENSIONS if d.name in fractions]
    normalized = {
        d.name: 100 * (fractions[d.name] - d.minimum) / (d.maximum - d.minimum) for d in known
    }
    groups = {group: _group_score(group, normalized) for group in TOTAL_WEIGHTS}
    parts = [
        weight * score
        for group, weight in TOTAL_WEIGHTS.items()
        if (score := groups[group]) is not None
    ]
    total = sum(parts) / sum(TOTAL_WEIGHTS.values()) if len(parts) == len(TOTAL_WEIGHTS) else None
    return Scores(
        {d.name: 100 * fractions[d.name] for d in known},
        normalized,
        groups["quality"],
        groups["semantic"],
        total,
    )


def _group_score(group: str, normalized: Mapping[str, float]) -> float | None:
    members = [d for d in DIMENSIONS if d.group == group]
    if any(d.name not in normalized for d in members):
        return None
    return sum(d.weight * normalized[d.name] for d in members) / sum(d.weight for d in members)


# --- result files
# --------------------------------------------------------------------------------------------------------


def read_results(path: Path, scale: Scale = "auto") -> dict[str, float]:
    """Scores by dimension, as fractions, of one file or of all *_eval_results.json of a folder and
    the folders in it.

    A file is what VBench writes, {dimension: [score, [of each video]]}, always in fractions; or
    plain, {dimension: score}.

    scale: of plain files. auto: fractions where no score is above 1, percent where all are (a 0
    is a 0 either way). What could be either
        is refused: scores above 1 beside some in (0, 1], or none above 1 and none of the four
            dimensions that never come below 1 %.

    Raises:
        FileNotFoundError, ValueError: nothing there, not such a file, a name that is no
            dimension, a score out of range or given twice.
    """
    if not path.is_dir():
        return _read_file(path, scale)
    files = sorted(path.rglob(f"*{SUFFIX}"))
    if not files:
        raise FileNotFoundError(
            f"{path}: expected VBench's result files, *{SUFFIX}, found none in this folder"
        )
    scores: dict[str, float] = {}
    source: dict[str, Path] = {}
    for file in files:
        for name, score in _read_file(file, scale).items():
            if scores.setdefault(name, score) != score:
                raise ValueError(
                    f"{path}: expected one score of {name}, got {scores[name]} in {source[name].name} and {score} in {file.name}"
                )
            source.setdefault(name, file)
    return scores


def _read_file(file: Path, scale: Scale) -> dict[str, float]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{file}: expected a result file of VBench or a folder of them, found none"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON in UTF-8: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{file}: expected {{dimension: score}} or VBench's {{dimension: [score, [...]]}}, got {str(content)[:60]}"
        )
    known = {d.name for d in DIMENSIONS}
    vbench: dict[str, float] = {}
    plain: dict[str, float] = {}
    for key, value in content.items():
        name = re.sub(r"[\s_-]+", "_", key.strip().lower())
        if name not in known:
            raise ValueError(
                f"{file}: expected VBench's dimensions, such as {DIMENSIONS[0].name}, got {key!r}"
            )
        if name in vbench | plain:
            raise ValueError(f"{file}: expected one score of {name}, got two")
        whole = isinstance(value, list) and bool(value)
        (vbench if whole else plain)[name] = _number(value[0] if whole else value, f"{file}: {key}")
    return _as_fractions(vbench, "fraction", file) | _as_fractions(
        plain, scale if scale != "auto" else _guess_scale(plain, file), file
    )


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, got {str(value)[:60]}")
    return float(value)


def _guess_scale(scores: Mapping[str, float], file: Path) -> Scale:
    above = [name for name, score in scores.items() if score > 1]
    up_to_one = [name for name, score in scores.items() if 0 < score <= 1]
    if above and up_to_one:
        raise ValueError(
            f"{file}: expected fractions or percent, got {above[0]} {scores[above[0]]} beside {up_to_one[0]} {scores[up_to_one[0]]}; "
            "--scale says which"
        )
    never_small = [d.name for d in DIMENSIONS if d.minimum > 0.01]
    if up_to_one and not any(name in scores for name in never_small):
        raise ValueError(
            f"{file}: whether {up_to_one[0]} {scores[up_to_one[0]]} is a fraction or percent cannot be told without "
            f"{', '.join(never_small)}; --scale says which"
        )
    return "percent" if above else "fraction"


def _as_fractions(scores: Mapping[str, float], scale: Scale, file: Path) -> dict[str, float]:
    most = 100 if scale == "percent" else 1
    for name, score in scores.items():
        if not 0 <= score <= most:
            raise ValueError(
                f"{file}: {name}: expected {'percent' if most == 100 else 'a fraction'} in [0, {most}], got {score}"
            )
    return {name: score / most for name, score in scores.items()}


# --- prompts and names
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationPrompt:
    """A caption, and how many videos of it an evaluation takes."""

    text: str
    num_videos: int


def read_evaluation_prompts(prompts: str) -> list[EvaluationPrompt]:
    """The captions to sample, each once.

    Args:
        prompts: `vbench`, the list of the installed package; the path of such a list
            (VBench_full_info.json, or any .json like it); or captions of one's own, as
            `fastgrpo.training.prompts.read_prompts` takes them.

    Raises:
        FileNotFoundError, ValueError: no such file or package, or nothing in it that can be
            read.
    """
    if prompts == "vbench" or prompts.lower().endswith(".json"):
        return _read_info(
            _packaged_info() if prompts == "vbench" else find_file(prompts, "prompts")
        )
    return [
        EvaluationPrompt(text, SAMPLES) for text in dict.fromkeys(read_prompts(prompts, "prompts"))
    ]


def _packaged_info() -> Path:
    spec = importlib.util.find_spec(
        "vbench"
    )  # found, not imported: it asks for more than this needs
    for folder in (spec.submodule_search_locations if spec else None) or []:
        if (info := Path(folder) / "VBench_full_info.json").is_file():
            return info
    raise FileNotFoundError(
        "prompts: vbench needs the prompt list of the package vbench, which is not installed here; give the path of its "
        "VBench_full_info.json (in the package's folder, or https://github.com/Vchitect/VBench/blob/master/vbench/VBench_full_info.json)"
    )


def _read_info(file: Path) -> list[EvaluationPrompt]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"prompts: cannot read {file} as JSON in UTF-8: {error}") from error
    counts: dict[str, int] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], start=1):
        text, dimensions = (
            (entry.get("prompt_en"), entry.get("dimension"))
            if isinstance(entry, dict)
            else (None, None)
        )
        if not (isinstance(text, str) and text.strip() and isinstance(dimensions, list)):
            raise ValueError(
                f"prompts: {file}, entry {number}: expected prompt_en (a text) and dimension (a list), as in VBench_full_info.json, "
                f"got {str(entry)[:60]}"
            )
        flickers = "temporal_flickering" in dimensions
        counts[text] = max(counts.get(text, 0), FLICKERING_SAMPLES if flickers else SAMPLES)
    if not counts:
        raise ValueError(f"prompts: expected at least one prompt in {file}, found none")
    return [EvaluationPrompt(text, count) for text, count in counts.items()]


def video_name(prompt: str, index: int) -> str:
    """`{prompt}-{index}.mp4`, which VBench looks for.

    All of VBench's own prompts can be names. In one that cannot (a slash or NUL in it, or too
    long), these become underscores, it is cut, and a hash of the whole prompt is added, so that
    two prompts never share a name.
    """
    name = re.sub(r"[/\0]", "_", prompt)
    encoded = name.encode()
    if name != prompt or len(encoded) > _LONGEST_NAME:
        name = (
            encoded[: _LONGEST_NAME - 9].decode(errors="ignore")
            + "_"
            + hashlib.sha256(prompt.encode()).hexdigest()[:8]
        )
    return f"{name}-{index}.mp4"
