"""The prompts of a run, and which of them an iteration takes.

The 50,000 prompts that the paper trains on are those that DanceGRPO publishes for text-to-video:
the file `assets/video_prompts.txt` of its repository, https://github.com/XueZeyue/DanceGRPO, one
prompt per line, filtered by its authors from VidProM (CC BY-NC 4.0). It is not shipped here; a
recipe names where it lies: `prompts.train: video_prompts.txt`. (`assets/prompts.txt` there is
for images, from HPDv2.)
"""

from __future__ import annotations

import functools
import html
import json
import random
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastgrpo.algorithm.seeds import derive_seed
from fastgrpo.errors import UserError, require
from fastgrpo.files import find_file

HUB = "hub:"
"""What a data set of the Hugging Face hub begins with."""
COLUMNS = ("prompt", "caption")
"""The columns that hold prompts; the first that a table has is taken."""
_UNSEEN = ("Zs", "Zl", "Zp", "Cc", "Cf")
"""Unicode categories of white space, control characters and characters without width."""
_INSTALL = 'pip install "fastgrpo[prompts]"'


def read_prompts(path: str, key: str, in_order: bool = False) -> list[str]:
    """The prompts of a file or a data set, without blank ones; as `checked_text` gives them.

    Args:
        path: A table with the column `prompt`, or else `caption`, in .jsonl (an object per line) or
            .parquet (read by pyarrow); or any other file: UTF-8 text, a prompt per line. Or
            `hub:OWNER/NAME[/CONFIGURATION][:SPLIT]`, a data set with such a column, read by the
            `datasets` library; the split is `train` by default.
        key: Of the configuration, for the messages.
        in_order: They belong to other things in the same order, so a blank one before the last is
            refused: nobody can tell whether it counts.

    Raises:
        FileNotFoundError, ValueError: There is no such file or data set, it cannot be read, or it
            has no prompt; names `key`, the file or data set, and if one row is at fault, the line
            or row and the column.
    """
    if path.startswith(HUB):
        prompts, source = _read_hub(path, key), path
    else:
        file = find_file(path, key)
        suffix, source = file.suffix.lower(), str(file)
        # As text these would give prompts full of braces and commas.
        is_other_table = suffix in (".json", ".csv", ".tsv")
        require(not is_other_table, key, "a text file, .jsonl or .parquet", source)
        reader = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(suffix, _read_text)
        prompts = reader(file, key)
    if in_order:
        last = max((i for i, prompt in enumerate(prompts) if prompt), default=0)
        number = next((i for i, prompt in enumerate(prompts[:last], start=1) if not prompt), None)
        expected = "a prompt in every line or row, as their order counts"
        require(number is None, f"{key}: {source}", expected, f"none in number {number}")
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"{key}: expected at least one prompt in {source}, got none")
    return prompts


def draw_prompts(
    prompts: list[str], position: int, count: int, seed: int, shuffle: bool = True
) -> list[str]:
    """Draw from an endless walk over the list, every epoch in an order of its own.

    A function of its arguments, so `position` is all that a checkpoint has to keep.

    Args:
        prompts: The list.
        position: How many have been drawn before.
        count: How many to draw.
        seed: The run's seed.
        shuffle: False keeps the list's order in every epoch.
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


def checked_text(text: str, where: str) -> str:
    """The text, stripped of white space at its ends; "" if nothing of it can be seen: characters
    without width, or what the pipelines' cleaning makes white space of, such as `&nbsp;`.

    Raises:
        UserError: It is no valid text, so that no tokenizer takes it; names `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a pair of surrogates
        raise UserError(f"{where}: expected valid text, got {text[:80]!r}") from error
    require("\0" not in text, where, "text without NUL", text[:80])
    cleaned = html.unescape(html.unescape(text))
    is_seen = any(unicodedata.category(c) not in _UNSEEN for c in cleaned)
    return text.strip() if is_seen else ""


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `json.loads`, which by itself takes the last of two values of a key.

    Raises:
        ValueError: A key is there twice, with different values.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found


def _read_text(file: Path, key: str) -> list[str]:
    return [
        checked_text(line, f"{key}: {file}, line {number}")
        for number, line in enumerate(_read_lines(file, key), start=1)
    ]


def _read_lines(file: Path, key: str) -> list[str]:
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{key}: {file}, line {line}: expected UTF-8 text, got {error}") from error
    except OSError as error:
        raise UserError(f"{key}: cannot read {file}: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _read_jsonl(file: Path, key: str) -> list[str]:
    column, prompts = "", []
    for number, line in enumerate(_read_lines(file, key), start=1):
        if not line.strip():  # of a table, no row
            continue
        where = f"{key}: {file}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected a JSON object, got {error}") from error
        require(isinstance(row, dict), where, "a JSON object", line[:80])
        column = column or _column(row, where)
        require(column in row, where, f"the column {column!r} as in the lines before", list(row))
        prompts.append(_prompt(row[column], where, column))
    return prompts


def _read_parquet(file: Path, key: str) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{key}: {file} needs pyarrow to be read ({error}): {_INSTALL}") from error
    where = f"{key}: {file}"
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            column = _column(table.schema_arrow.names, where)
            values = table.read(columns=[column]).column(column)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{key}: cannot read {file} as parquet: {error}") from error
    return _rows(values, where, column)


def _read_hub(path: str, key: str) -> list[str]:
    name, _, split = path.removeprefix(HUB).partition(":")
    parts = name.split("/")
    is_name = len(parts) in (2, 3) and all(parts)
    require(is_name, key, f"{HUB}OWNER/NAME[/CONFIGURATION][:SPLIT]", path)
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{key}: {path} needs the datasets library to be read ({error}): {_INSTALL}"
        ) from error
    try:
        table = datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{key}: cannot load {path}: {error}") from error
    column = _column(table.column_names, f"{key}: {path}")
    return _rows(table[column], f"{key}: {path}", column)


def _column(names: Iterable[str], where: str) -> str:
    names = list(names)
    found = [column for column in COLUMNS if column in names]
    require(found, where, f"a column {' or '.join(map(repr, COLUMNS))}", names)
    return found[0]


def _rows(values: Iterable[Any], where: str, column: str) -> list[str]:
    return [
        _prompt(value, f"{where}, row {row}", column) for row, value in enumerate(values, start=1)
    ]


def _prompt(value: Any, where: str, column: str) -> str:
    where = f"{where}, column {column!r}"
    if hasattr(value, "as_py"):  # of pyarrow, which does not look whether a text is one
        try:
            value = value.as_py()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: expected valid text, got {error}") from error
    require(isinstance(value, str), where, "a text", value)
    return checked_text(value, where)
