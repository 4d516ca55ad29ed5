"""The prompts that an evaluation samples, and the names of its videos, as VBench wants them.

Facts from https://github.com/Vchitect/VBench: prompts/README.md (numbers of samples) and
vbench/__init__.py (names of files). None of its data is copied here.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from fastgrpo.errors import require
from fastgrpo.evaluation.json_rows import read_json
from fastgrpo.training.prompts import checked_text, read_prompts

SAMPLES, FLICKERING_SAMPLES = 5, 25
"""Videos per prompt; more if temporal flickering is judged, of which VBench's static filter then
picks five that are still.
"""
_LONGEST_NAME = 240  # bytes; most file systems take 255, and the index and the ending are added


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt, and how many videos of it an evaluation takes."""

    text: str
    num_videos: int


def read_evaluation_prompts(prompts: str) -> list[EvaluationPrompt]:
    """The prompts to sample, each once.

    Args:
        prompts: VBench's VBench_full_info.json, or any .json like it; or prompts of one's own, as
            `fastgrpo.training.prompts.read_prompts` takes them.

    Raises:
        FileNotFoundError, UserError: There is no such file, or nothing in it that can
            be read.
    """
    if prompts.lower().endswith(".json"):
        return _read_info(prompts)
    texts = dict.fromkeys(read_prompts(prompts, "prompts"))
    return [EvaluationPrompt(text, SAMPLES) for text in texts]


def _read_info(file: str) -> list[EvaluationPrompt]:
    entries = read_json(file, "prompts")
    counts: dict[str, int] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], start=1):
        row: Any = entry if isinstance(entry, dict) else {}
        text, dimensions = row.get("prompt_en"), row.get("dimension")
        where = f"prompts: {file}, entry {number}"
        ok = isinstance(text, str) and checked_text(text, where) and isinstance(dimensions, list)
        expected = "prompt_en (a text) and dimension (a list), as in VBench_full_info.json"
        require(ok, where, expected, entry)
        samples = FLICKERING_SAMPLES if "temporal_flickering" in dimensions else SAMPLES
        counts[text] = max(counts.get(text, 0), samples)
    require(counts, f"prompts: {file}", "at least one prompt", entries)
    return [EvaluationPrompt(text, count) for text, count in counts.items()]


def video_name(prompt: str, index: int) -> str:
    """`{prompt}-{index}.mp4`, which VBench looks for.

    All of VBench's own prompts can be file names. In one that cannot (a slash or NUL in it, or too
    long) these become underscores, it is cut, and a hash of the whole prompt is added, so that two
    prompts never share a name.
    """
    name = re.sub(r"[/\0]", "_", prompt)
    encoded = name.encode()
    if name != prompt or len(encoded) > _LONGEST_NAME:
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
        name = encoded[: _LONGEST_NAME - 9].decode(errors="ignore") + "_" + digest
    return f"{name}-{index}.mp4"
