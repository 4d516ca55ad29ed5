"""JSON files of a user: one value, or one value per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastgrpo.evaluation.json_rows import read_json


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None]}, [], "ü"])
def test_a_json_file_is_one_value(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "a.JSON"
    path.write_text(json.dumps(value, indent=2), encoding="utf-8-sig")  # with a byte order mark
    assert read_json(path, "key") == value


def test_any_other_file_is_a_value_per_line(tmp_path: Path) -> None:
    """Blank lines are no values; U+2028 inside a text ends no line."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\r\n\n  \n"one\u2028line"\n[2]', encoding="utf-8")
    assert read_json(str(path), "key") == [{"a": 1}, "one\u2028line", [2]]


def test_a_key_twice_with_the_same_value(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1, "a": 1, "b": NaN}')
    assert read_json(path, "key")["a"] == 1


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.json", b"{", "a.json as"),
        ("a.json", b'"\xff"', "a.json as"),
        ("a.jsonl", b"1\n\n{\n", "a.jsonl, line 3 as"),
        ("a.jsonl", b'1\n{"a": 1, "a": 2}\n', "a.jsonl, line 2 as"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, where: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"key: cannot read .*{where} JSON in UTF-8"):
        read_json(tmp_path / name, "key")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"key: expected a file.*none\.json"):
        read_json(tmp_path / "none.json", "key")
