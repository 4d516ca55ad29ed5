"""Which videos a path stands for, and the prompt of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgrpo.errors import UserError
from fastgrpo.files import find_file
from fastgrpo.training.prompts import HUB, read_prompts

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
        names = sorted(str(file) for file in files if file.is_file())
    elif path.suffix.lower() == ".txt":
        lines = find_file(videos, "videos").read_text(encoding="utf-8-sig").split("\n")
        names = [line.strip() for line in lines if line.strip()]
    elif path.is_file():
        names = [videos]
    else:
        raise FileNotFoundError(
            "videos: expected a folder, a .txt file with a path a line, or a video, found none at "
            f"{videos}"
        )
    if not names:
        raise UserError(f"videos: expected at least one, got none in {videos} (by name: {ENDINGS})")
    return names


def match_prompts(names: Sequence[str], prompts: str) -> list[str]:
    """The prompt of each video: by name if the file has names (see `named_prompts`), else in order.

    Raises:
        FileNotFoundError, UserError: There is no such file, or it has not one prompt per video.
    """
    by_name = named_prompts(prompts)
    if by_name is not None:
        return look_up(names, by_name, prompts)
    found = read_prompts(prompts, "prompts")
    if len(found) != len(names):
        raise UserError(
            f"prompts: expected one for each of {len(names)} videos, got {len(found)} in {prompts}"
        )
    return found


def look_up(names: Sequence[str], by_name: dict[str, str], source: str) -> list[str]:
    """The prompt of each video by its path, or else by the name of its file."""
    missing = [name for name in names if not {name, Path(name).name} & by_name.keys()]
    if missing:
        raise UserError(
            f"prompts: expected one for each of {len(names)} videos, got {len(by_name)} in "
            f"{source}, none for {len(missing)} such as {missing[0]}"
        )
    return [by_name[name if name in by_name else Path(name).name] for name in names]


def named_prompts(prompts: str) -> dict[str, str] | None:
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
    try:
        text = find_file(prompts, "prompts").read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]
        values: Any = json.loads(text) if suffix == ".json" else list(map(json.loads, lines))
    except ValueError as error:
        raise UserError(f"prompts: cannot read {prompts} as JSON in UTF-8: {error}") from error
    if suffix == ".jsonl" and not any(isinstance(one, dict) and "video" in one for one in values):
        return None
    if isinstance(values, dict):
        pairs = [{"video": name, "prompt": text} for name, text in values.items()]
        values = values.get("samples", pairs)
    found: dict[str, str] = {}
    for number, value in enumerate(values if isinstance(values, list) else [values], start=1):
        keys = ("video", "prompt")
        video, prompt = map(value.get, keys) if isinstance(value, dict) else (None, None)
        if not (isinstance(video, str) and isinstance(prompt, str)):
            where, got = f"prompts: {prompts}, entry {number}", str(value)[:80]
            raise UserError(f"{where}: expected the texts video and prompt, got {got}")
        if found.setdefault(video, prompt.strip()) != prompt.strip():
            raise UserError(f"prompts: {prompts}: expected one for {video}, got two")
    return found
