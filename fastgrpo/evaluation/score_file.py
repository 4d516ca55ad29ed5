"""The file of scores that `python -m fastgrpo score` writes: a JSON object a line, one line a
video, all by one judge.
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

Row = dict[str, Any]
Key = tuple[str, str]
"""Video and prompt."""


def judge_hash(judge: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that stand for all that decides a judge's scores.

    Where its servers are, and how many of them answered at the start, does not; what they say of
    themselves does.
    """
    engine = judge.get("engine")
    if isinstance(engine, Mapping) and isinstance(engine.get("servers"), Mapping):
        said = sorted({json.dumps(one, sort_keys=True) for one in engine["servers"].values()})
        judge = {
            **judge,
            "engine": {key: value for key, value in engine.items() if key != "endpoints"}
            | {"servers": said},
        }
    return hashlib.sha256(
        json.dumps(judge, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()[:12]


def describe_beside(path: Path) -> Path:
    """Where the judge of a file of scores is described: scores.judge.json beside scores.jsonl."""
    return path.with_suffix(".judge.json")


@contextmanager
def open_scores(
    path: Path, judge: Mapping[str, Any], retry_failed: bool = False
) -> Iterator[tuple[dict[Key, Row], Callable[[Row], None]]]:
    """The rows that are there, by video and prompt, and a function that adds one, with this judge's
    hash, and flushes it.

    A last line that was written by half is dropped. The judge is described in the file
    `describe_beside`. One process at a time.

    Args:
        judge: all that decides its scores, as JSON. retry_failed: drop the rows with an error.

    Raises:
        ValueError: rows of another judge, a line that is no row, a video and prompt twice, or
            another process that writes the file.
    """
    name = judge_hash(judge)
    path.parent.mkdir(parents=True, exist_ok=True)
    file: BinaryIO = path.open("a+b")
    try:
        _lock(file, path)
        rows = _read(file, path, name)
        if retry_failed and any("error" in row for row in rows.values()):
            rows = {key: row for key, row in rows.items() if "error" not in row}
            file = _replace(file, path, rows)
        beside = describe_beside(path)
        _write_whole(
            beside, json.dumps({"judge": name, **judge}, indent=1, ensure_ascii=False) + "\n"
        )

        def add(row: Row) -> None:
            file.write(_line({**row, "judge": name}))
            file.flush()

        yield rows, add
    finally:
        file.close()


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"out: another process is writing {path}") from error


def _read(file: BinaryIO, path: Path, judge: str) -> dict[Key, Row]:
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        if _parse(data[whole:]) is None:
            file.truncate(whole)
            data = data[:whole]
        else:  # only its newline is missing
            file.write(b"\n")
            data += b"\n"
    rows: dict[Key, Row] = {}
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        row = _parse(line)
        if row is None:
            raise ValueError(
                f"out: {path}, line {number}: expected a row of scores, got {line[:80].decode(errors='replace')!r}"
            )
        if row["judge"] != judge:
            raise ValueError(
                f"out: {path}, line {number} is by another judge, {row['judge']}, described in {describe_beside(path)}; this one is "
                f"{judge}: name another file, or take the same settings"
            )
        key = row["video"], row["prompt"]
        if key in rows:
            raise ValueError(
                f"out: {path}, line {number}: expected one row a video and prompt, got a second one of {key[0]}"
            )
        rows[key] = row
    return rows


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return (
        row
        if isinstance(row, dict)
        and all(isinstance(row.get(key), str) for key in ("video", "prompt", "judge"))
        else None
    )


def _line(row: Row) -> bytes:
    # The name of a file that is not UTF-8 holds lone surrogates, which become escapes, as JSON has
    # them too.
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def _replace(file: BinaryIO, path: Path, rows: dict[Key, Row]) -> BinaryIO:
    """The file with these rows alone, at once or not at all; both the old and the new one are
    locked until it has happened.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    fresh = temporary.open("wb")
    _lock(fresh, path)
    fresh.writelines(_line(row) for row in rows.values())
    fresh.flush()
    os.fsync(fresh.fileno())
    os.replace(temporary, path)
    file.close()
    return fresh


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
