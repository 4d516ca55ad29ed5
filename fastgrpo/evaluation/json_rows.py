"""JSON and JSON lines that a user gives, with one wording for a file that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastgrpo.errors import UserError
from fastgrpo.files import find_file
from fastgrpo.training.prompts import unique_keys


def read_json(path: Path | str, key: str) -> Any:
    """The content of a .json file; of any other file the list of its lines' values.

    Args:
        path: The file, UTF-8.
        key: The option that named it, for the messages.

    Raises:
        FileNotFoundError, UserError: There is no such file, or it cannot be read.
    """
    file = find_file(str(path), key)
    where, rows = str(file), []
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".json":
            return json.loads(text, object_pairs_hook=unique_keys)
        for number, line in enumerate(text.split("\n"), start=1):
            where = f"{file}, line {number}"
            if line.strip():
                rows.append(json.loads(line, object_pairs_hook=unique_keys))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{key}: cannot read {where} as JSON in UTF-8: {error}") from error
    return rows
