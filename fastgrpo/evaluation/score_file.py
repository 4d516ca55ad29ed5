"""The file of scores that `python -m fastgrpo score` writes: one JSON object per video, one per
line, all by one judge.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastgrpo.errors import UserError, require
from fastgrpo.files import atomic_write, unless_unsupported

Row = dict[str, Any]
Key = tuple[str, str]
"""Video and prompt."""
_BEGIN = b'{"video": '  # of every row


def judge_hash(judge: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that stand for everything that decides a judge's scores.

    Where its servers are, and how many answered at the start, does not count; what they say of
    themselves does.
    """
    engine = judge.get("engine")
    if isinstance(engine, Mapping) and isinstance(engine.get("servers"), Mapping):
        told = sorted({json.dumps(one, sort_keys=True) for one in engine["servers"].values()})
        others = {key: value for key, value in engine.items() if key != "endpoints"}
        judge = {**judge, "engine": {**others, "servers": told}}
    text = json.dumps(judge, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def describe_beside(path: Path) -> Path:
    """The file that describes the judge: scores.judge.json beside scores.jsonl."""
    return path.with_suffix(".judge.json")


def replaced_beside(path: Path) -> Path:
    """The file that keeps the rows of videos that have changed since: scores.replaced.jsonl."""
    return path.with_suffix(".replaced.jsonl")


def identify(video: str, max_bytes: int) -> Row:
    """What tells a video file from another of the same name: its "bytes" and their "sha256"; both
    are None for a file that cannot be read or is larger than `max_bytes`.
    """
    try:
        size = Path(video).stat().st_size
        if Path(video).is_file() and size <= max_bytes:  # a pipe would never end
            with open(video, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": size, "sha256": digest}
    except (OSError, ValueError):  # ValueError: a name with NUL
        pass
    return {"bytes": None, "sha256": None}


@contextmanager
def open_scores(
    path: Path,
    judge: Mapping[str, Any],
    retry_failed: bool = False,
    is_stale: Callable[[Row], bool] = lambda row: False,
) -> Iterator[tuple[dict[Key, Row], Callable[[Row], None]]]:
    """Open a file of scores to add to it, for one process at a time.

    A last line that was half written is dropped. The judge is described in `describe_beside`.

    Args:
        path: The file; it may not exist yet.
        judge: Everything that decides the judge's scores, as JSON.
        retry_failed: Drop the rows with an error.
        is_stale: True for a row of a video that has changed since; it goes to `replaced_beside`.

    Yields:
        The rows that are there, by video and prompt; and a function that writes one more, with this
        judge's hash, and flushes it.

    Raises:
        UserError: Rows of another judge, a line that is no row, a video and prompt twice, or
            another process that writes the file.
    """
    name = judge_hash(judge)
    path.parent.mkdir(parents=True, exist_ok=True)
    file: BinaryIO = path.open("a+b")
    try:
        _lock(file, path)
        # Between the two lines above another process may have replaced the file, and ended.
        is_there = os.path.samestat(os.fstat(file.fileno()), path.stat())
        require(is_there, "output", "one process to write it", f"another that writes {path}")
        rows = _read(file, path, name)
        stale = {key: row for key, row in rows.items() if is_stale(row)}
        kept = {
            key: row
            for key, row in rows.items()
            if key not in stale and not (retry_failed and "error" in row)
        }
        if stale:
            with replaced_beside(path).open("ab") as replaced:
                replaced.writelines(_line(row) for row in stale.values())
        if len(kept) < len(rows):
            file, rows = _replace(file, path, kept), kept
        with atomic_write(describe_beside(path)) as partial:
            text = json.dumps({"judge": name, **judge}, indent=1, ensure_ascii=False)
            partial.write_text(text + "\n", encoding="utf-8")

        def add(row: Row) -> None:
            file.write(_line({**row, "judge": name}))
            file.flush()

        yield rows, add
    finally:
        file.close()


def _lock(file: BinaryIO, path: Path) -> None:
    with unless_unsupported():  # then the user has to see to it that only one writes
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"output: another process is writing {path}") from error


def _read(file: BinaryIO, path: Path, judge: str) -> dict[Key, Row]:
    file.seek(0)
    *lines, tail = file.read().split(b"\n")
    is_whole = not _is_half(tail)  # only its newline is missing
    rows: dict[Key, Row] = {}
    for number, line in enumerate([*lines, tail] if tail and is_whole else lines, start=1):
        row: Any = _parse(line)
        where = f"output: {path}, line {number}"
        require(row is not None, where, "a row of scores", line[:80].decode(errors="replace"))
        if row["judge"] != judge:
            raise UserError(
                f"{where} is by another judge, {row['judge']}, described in "
                f"{describe_beside(path)}; this one is {judge}: name another file, or take the same"
                " settings"
            )
        key = row["video"], row["prompt"]
        require(key not in rows, where, "one row per video and prompt", key)
        rows[key] = row
    # Not before all lines were found to be ours: another file is left as it is.
    if tail and is_whole:
        file.write(b"\n")
    elif tail:
        file.truncate(file.tell() - len(tail))
    return rows


def _is_half(line: bytes) -> bool:
    """Whether a line is the begin of a row that was not written to its end."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        written = line.rstrip(b"\0")  # which a power cut may leave
        return written.startswith(_BEGIN) or _BEGIN.startswith(written)
    return False


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    texts = [row.get(key) for key in ("video", "prompt", "judge")] if isinstance(row, dict) else [0]
    return row if all(isinstance(text, str) for text in texts) else None


def _line(row: Row) -> bytes:
    # A file name that is not UTF-8 holds lone surrogates; they become escapes, which JSON has too.
    text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def _replace(file: BinaryIO, path: Path, rows: dict[Key, Row]) -> BinaryIO:
    """Replace the file by one with only these rows; both are locked until that has happened."""
    with atomic_write(path) as partial:
        fresh = partial.open("wb")
        _lock(fresh, path)
        fresh.writelines(_line(row) for row in rows.values())
        fresh.flush()
    file.close()
    return fresh
