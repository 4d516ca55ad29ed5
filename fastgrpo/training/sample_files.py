"""Sample videos on disk: a folder of mp4 files, stills and scores that a run leaves behind."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastgrpo.errors import UserError, require
from fastgrpo.files import atomic_write
from fastgrpo.training.prompts import checked_text
from fastgrpo.training.trust import inside

if TYPE_CHECKING:  # a report reads samples without torch
    from torch import Tensor


def save_samples(
    folder: Path,
    videos: Tensor,
    prompts: Sequence[str],
    fps: float,
    scores: Sequence[Sequence[float]] | Tensor | None = None,
    stages: Sequence[str] | None = None,
) -> None:
    """Write N videos into `folder`: NN_<prompt>.mp4, NN_<prompt>.png and, last, samples.json.

    A folder that has samples.json is therefore complete. The mp4 is H.264, yuv420p: a video whose
    shorter side is below 256 pixels is enlarged by a whole factor, and an odd side repeats its
    last line, since the codec needs even sides. The png is lossless at the video's own size: up to
    8 frames, evenly spaced, from left to right. samples.json is {"fps", "stages" or null,
    "samples": [{"prompt", "scores" or null, "video", "still", "still_frames"}]}; a score that is
    not finite is null.

    Args:
        folder: Made if missing.
        videos: [N, T, 3, H, W], uint8 or float in [0, 1] (clamped), on any device.
        prompts: N prompts.
        fps: Frames per second.
        scores: [N, K] from the judge.
        stages: The K names of the scores.

    Raises:
        ValueError: Shapes, lengths or dtype do not fit, or a video is not finite.
    """
    import torch

    frames = _to_uint8(videos)
    table = None if scores is None else torch.as_tensor(scores, dtype=torch.float64).tolist()
    require(len(prompts) == len(frames), "samples", f"{len(frames)} prompts", len(prompts))
    if table is not None:
        shape = len(frames), len(stages or ())
        fits = len(table) == shape[0] and all(len(row) == shape[1] for row in table)
        require(fits, "samples", f"scores {list(shape)} [videos, stages]", [len(r) for r in table])
    folder.mkdir(parents=True, exist_ok=True)
    digits = max(2, len(str(len(frames) - 1)))
    entries = []
    for index, (video, prompt) in enumerate(zip(frames, prompts, strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-")
        name = f"{index:0{digits}d}_{slug or 'sample'}"
        write_video(folder / f"{name}.mp4", video, fps)
        # The still shows evenly spaced frames, the first and the last among them.
        chosen = np.linspace(0, len(video) - 1, min(len(video), 8)).round().astype(int)
        Image.fromarray(np.concatenate(list(video[chosen]), axis=1)).save(folder / f"{name}.png")
        entry: dict[str, Any] = {
            "prompt": prompt,
            "scores": None,
            "video": f"{name}.mp4",
            "still": f"{name}.png",
        }
        if table is not None:
            entry["scores"] = [value if math.isfinite(value) else None for value in table[index]]
        entries.append(entry | {"still_frames": len(chosen)})
    summary = {"fps": fps, "stages": None if stages is None else list(stages), "samples": entries}
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_write(folder / "samples.json") as path:
        path.write_text(text + "\n", encoding="utf-8")


def read_samples(folder: Path) -> dict[str, Any]:
    """samples.json of a folder that `save_samples` completed.

    Raises:
        FileNotFoundError: The folder is not complete.
        UserError: samples.json is broken, or names a file outside the folder.
    """
    path = inside(folder, "samples.json")
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from error
    is_object = isinstance(summary, dict) and isinstance(summary.get("samples"), list)
    require(is_object, str(path), "an object with the list samples", summary)
    stages = summary.setdefault("stages", None)
    are_names = isinstance(stages, list) and all(
        isinstance(stage, str) and stage.isprintable() for stage in stages
    )
    require(stages is None or are_names, f"{path}: stages", "a list of names, or null", stages)
    for number, entry in enumerate(summary["samples"], start=1):
        _check_entry(entry, stages, f"{path}: entry {number}")
        for key in ("video", "still"):
            inside(folder, entry[key])
    return summary


def _check_entry(entry: Any, stages: Sequence[str] | None, where: str) -> None:
    require(isinstance(entry, dict), where, "an object", entry)
    for key in ("prompt", "video", "still"):
        require(isinstance(entry.get(key), str), f"{where}: {key}", "a text", entry.get(key))
    checked_text(entry["prompt"], f"{where}: prompt")
    count = entry.get("still_frames")
    ok = type(count) is int and count >= 1
    require(ok, f"{where}: still_frames", "an integer of at least 1", count)
    scores = entry.setdefault("scores", None)
    are_numbers = isinstance(scores, list) and all(
        score is None or (type(score) in (int, float) and math.isfinite(score)) for score in scores
    )
    fits = are_numbers and len(scores) == len(stages or ())
    require(scores is None or fits, f"{where}: scores", "a number for each of stages", scores)


def write_video(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    """Write frames [T, H, W, 3] as H.264 yuv420p, enlarged and padded as `save_samples` says."""
    # Loaded here, not at the start of a training. imageio would be one call, but it runs the
    # garbage collector twice per file: 0.2 s each, 4 s for an evaluation.
    import av

    height, width = frames.shape[1:3]
    scale = max(1, math.ceil(256 / min(height, width)))
    if scale > 1 and (height * scale % 2 or width * scale % 2):
        scale += 1
    frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    odd = ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0))
    frames = np.pad(frames, odd, mode="edge")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())


def match_samples(summaries: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any] | None]]:
    """Find the samples of the same prompts in several samples.json.

    Returns:
        A row for each sample of the first summary, in its order: that entry, and from each other
        summary the entry with the same prompt, or None. The n-th of a repeated prompt is matched
        with the n-th.
    """
    tables = []
    for summary in summaries:
        times, table = Counter[str](), dict[tuple[str, int], dict[str, Any]]()
        for entry in summary["samples"]:
            times[entry["prompt"]] += 1
            table[entry["prompt"], times[entry["prompt"]]] = entry
        tables.append(table)
    return [[table.get(key) for table in tables] for key in tables[0]]


def format_scores(scores: Sequence[float | None] | None) -> str:
    """'0.71  0.65  –': a missing score is a dash; "" if there are no scores at all."""
    return "  ".join("–" if score is None else f"{score:.2f}" for score in scores or ())


def _to_uint8(videos: Tensor) -> NDArray[np.uint8]:
    """[N, T, 3, H, W] -> [N, T, H, W, 3] uint8 on the host; floats are rounded to 256 levels."""
    import torch

    ok = videos.ndim == 5 and videos.shape[2] == 3 and 0 not in videos.shape[1:]
    require(ok, "samples", "videos [N, T, 3, H, W]", list(videos.shape))
    if videos.is_floating_point():
        if not torch.isfinite(videos).all():
            raise UserError("samples: expected finite videos, got NaN or infinity")
        videos = videos.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    require(videos.dtype == torch.uint8, "samples", "uint8 or float videos", videos.dtype)
    return videos.movedim(2, -1).contiguous().cpu().numpy()
