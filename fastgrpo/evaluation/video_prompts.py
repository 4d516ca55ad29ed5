"""Which videos a path stands for, and the prompt of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgrpo.errors import UserError, require
from fastgrpo.evaluation.json_rows import read_json
from fastgrpo.files import find_file
from fastgrpo.training.prompts import HUB, checked_text, read_prompts

ENDINGS = "mp4|m4v|mov|mkv|webm|avi|gif|mpg|mpeg|ts|flv|wmv|ogv|apng"
"""Of the names of the videos in a folder."""


def list_videos(videos: str) -> list[str]:
    """Paths of the videos that `videos` stands for.

    Args:
        videos: A folder (its video files by name, without those in its folders), a .txt file with
            one path per line, or one video.

    Raises:
        FileNotFoundError, UserError: There is none.
    """
    path = Path(videos)
    if path.is_dir():
        files = (file for file in path.iterdir() if file.suffix.lower()[1:] in ENDINGS.split("|"))
        # A link to nothing is a video that is missing, and gets a row that says so.
        names = sorted(str(file) for file in files if not file.is_dir())
    elif path.suffix.lower() == ".txt":
        try:
            lines = find_file(videos, "videos").read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"videos: {videos}: expected paths in UTF-8, got {error}") from error
        names = [line.strip() for line in lines if line.strip()]
    elif path.is_file():
        names = [videos]
    else:
        raise FileNotFoundError(
            "videos: expected a folder, a .txt file with a path a line, or a video, found none at "
            f"{videos}"
        )
    require(names, "videos", f"at least one in {videos} (by name: {ENDINGS})", names)
    return names


def match_prompts(names: Sequence[str], prompts: str, sorted_by_name: bool = False) -> list[str]:
    """The prompt of each video: by name if the file has names, else in order.

    Args:
        names: The videos.
        prompts: The file of prompts.
        sorted_by_name: The order of the videos is that of their names, which nobody wrote down.

    Raises:
        FileNotFoundError, UserError: There is no such file, or it has not one prompt per video, or
            the videos have more than one order.
    """
    by_name = _named_prompts(prompts)
    if by_name is not None:
        short = [name if name in by_name else Path(name).name for name in names]
        missing = [name for name in short if name not in by_name]
        expected = f"one for each of {len(names)} videos in {prompts}"
        require(not missing, "prompts", expected, f"none for {len(missing)}: {missing[:1]}")
        return [by_name[name] for name in short]
    found = read_prompts(prompts, "prompts", in_order=True)
    expected = f"one for each of {len(names)} videos in {prompts}"
    require(len(found) == len(names), "prompts", expected, len(found))
    counted = sorted(names, key=_as_people_count)
    if sorted_by_name and counted != list(names):
        one, other = next(pair for pair in zip(names, counted, strict=True) if pair[0] != pair[1])
        raise UserError(
            f"prompts: {prompts} has them in order, but the videos have two orders, in which "
            f"{Path(one).name} or {Path(other).name} comes first: give the prompts with the "
            'videos\' names, {"video": ..., "prompt": ...} in .jsonl, or as --videos a .txt file '
            "of paths in the order of the prompts"
        )
    return found


def _as_people_count(name: str) -> tuple[list[str | int], str]:
    """Orders clip, clip-2, clip-10, Dog, as sorted bytes do not."""
    parts = re.split(r"(\d+)", Path(name).stem.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _named_prompts(prompts: str) -> dict[str, str] | None:
    """Prompts by video name; None for a file without names.

    Files with names are .json or .jsonl of {"video": name, "prompt": text}, .json of {name: text},
    and the samples.json of saved samples.

    Raises:
        FileNotFoundError, UserError: The file is missing, damaged, or names a video twice with
            different prompts.
    """
    suffix = Path(prompts).suffix.lower()
    if prompts.startswith(HUB) or suffix not in (".json", ".jsonl"):
        return None
    values = read_json(prompts, "prompts")
    if suffix == ".jsonl" and not any(isinstance(one, dict) and "video" in one for one in values):
        return None
    if isinstance(values, dict):
        pairs = [{"video": name, "prompt": text} for name, text in values.items()]
        values = values.get("samples", pairs)
    found: dict[str, str] = {}
    for number, value in enumerate(values if isinstance(values, list) else [values], start=1):
        row: Any = value if isinstance(value, dict) else {}
        video, prompt = row.get("video"), row.get("prompt")
        ok = isinstance(video, str) and isinstance(prompt, str)
        key = f"prompts: {prompts}, entry {number}"
        require(ok, key, "the texts video and prompt", value)
        prompt = checked_text(prompt, key)
        first = found.setdefault(video, prompt)
        require(first == prompt, key, f"one prompt for {video}, {first!r}", prompt)
    return found
