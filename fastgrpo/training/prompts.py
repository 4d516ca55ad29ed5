"""Stage 1: the captions of a run, and which of them an iteration takes.

The 50,000 prompts that the paper trains on are those that DanceGRPO publishes for text-to-video:
the file `assets/video_prompts.txt` of its repository, https://github.com/XueZeyue/DanceGRPO, one
prompt a line, filtered by its authors from VidProM (CC BY-NC 4.0). It is not shipped here; a
recipe names where it lies: `prompts.train: video_prompts.txt`. (`assets/prompts.txt` there is
for images, from HPDv2.)
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.files import find_file

HUB = "hub:"
"""What a data set of the Hugging Face hub begins with, where a file is expected."""
COLUMNS = ("prompt", "caption")
"""The columns that hold captions; the first that a file has is taken."""
_INSTALL = 'pip install "fastgrpo[prompts]"'


def read_prompts(path: str, key: str) -> list[str]:
    """The captions of a file or a data set, stripped of white space at their ends; blank ones are
    left out.

    Args:
        path: by its ending a table with the column `prompt`, or else `caption`, in .jsonl (an
            object a line) or .parquet (read by pyarrow alone); or any other file: UTF-8 text, a
            caption a line. Or `hub:OWNER/NAME[/CONFIGURATION][:SPLIT]`, a data set with such a
            column, read by the `datasets` library, split `train` if none is named. key: of the
            configuration, for the messages.

    Raises:
        FileNotFoundError, ValueError: no such file or data set, one that cannot be read, or no
            caption in it; names `key`, the file or data set, and where it is one row's fault,
            the line or row, and the column.
    """
    if path.startswith(HUB):
        captions, source = _read_hub(path, key), path
    else:
        file = find_file(path, key)
        captions, source = _reader(file, key)(file, key), str(file)
    prompts = [caption for caption in captions if caption]
    if not prompts:
        raise ValueError(f"{key}: expected at least one caption in {source}, found none")
    return prompts


def draw_prompts(
    prompts: list[str], position: int, count: int, seed: int, shuffle: bool = True
) -> list[str]:
    """Captions number position ... position + count - 1 of an endless walk over the list, every
    epoch in an order of its own.

    A function of its arguments, so that `position` is all a checkpoint has to keep.
    """
    drawn = []
    for i in range(position, position + count):
        epoch, index = divmod(i, len(prompts))
        drawn.append(prompts[_order(len(prompts), epoch, seed)[index] if shuffle else index])
    return drawn


@functools.lru_cache(maxsize=2)
def _order(length: int, epoch: int, seed: int) -> list[int]:
    order = list(range(length))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return order


def _reader(file: Path, key: str) -> Callable[[Path, str], list[str]]:
    suffix = file.suffix.lower()
    if suffix in (
        ".json",
        ".csv",
        ".tsv",
    ):  # as text they would give captions full of braces and commas
        raise ValueError(f"{key}: expected a text file, .jsonl or .parquet, got {file}")
    return {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(suffix, _read_text)


def _read_text(file: Path, key: str) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}: cannot read {file} as UTF-8 text: {error}") from error


def _read_jsonl(file: Path, key: str) -> list[str]:
    column, captions = "", []
    for number, line in enumerate(_read_text(file, key), start=1):
        if not line:
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{key}: {where}: expected a JSON object, got {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{key}: {where}: expected a JSON object, got {line[:80]!r}")
        column = column or _column(row, key, where)
        if column not in row:
            raise ValueError(
                f"{key}: {where}: expected the column {column!r} as in the lines before, got {list(row)}"
            )
        captions.append(_caption(row[column], key, f"{where}, column {column!r}"))
    return captions


def _read_parquet(file: Path, key: str) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{key}: {file} needs pyarrow to be read ({error}): {_INSTALL}") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            column = _column(table.schema_arrow.names, key, str(file))
            values = table.read(columns=[column]).column(column).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{key}: cannot read {file} as parquet: {error}") from error
    return [
        _caption(value, key, f"{file}, row {row}, column {column!r}")
        for row, value in enumerate(values, start=1)
    ]


def _read_hub(path: str, key: str) -> list[str]:
    name, _, split = path.removeprefix(HUB).partition(":")
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"{key}: expected {HUB}OWNER/NAME[/CONFIGURATION][:SPLIT], got {path!r}")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{key}: {path} needs the datasets library to be read ({error}): {_INSTALL}"
        ) from error
    try:
        rows = datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{key}: cannot load {path}: {error}") from error
    column = _column(rows.column_names, key, path)
    return [
        _caption(value, key, f"{path}, row {row}, column {column!r}")
        for row, value in enumerate(rows[column], start=1)
    ]


def _column(names: Iterable[str], key: str, where: str) -> str:
    names = list(names)
    for column in COLUMNS:
        if column in names:
            return column
    raise ValueError(
        f"{key}: {where}: expected a column {' or '.join(map(repr, COLUMNS))}, got {names}"
    )


def _caption(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key}: {where}: expected a text, got {value!r}")
    return value.strip()
