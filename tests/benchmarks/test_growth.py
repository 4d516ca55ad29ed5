"""growth.py: its powers, its rows, and a part that is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth
from benchmarks.common.rows import provenance


def test_powers_are_those_of_the_size_before() -> None:
    def part() -> growth.Found:
        yield "line", 10, 1.0, None
        yield "line", 20, 2.0, None
        yield "square", 10, 1.0, 5.0
        yield "square", 40, 16.0, None

    rows = [*growth.rows_of(part, provenance(growth.CPU))]
    assert [row.power for row in rows] == [None, pytest.approx(1), None, pytest.approx(2)]
    assert [row.megabytes for row in rows] == [None, None, 5.0, None]


def test_a_part_as_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails costs no rows of those before it."""

    def broken() -> growth.Found:
        raise OSError("no processes")

    monkeypatch.setitem(growth.PARTS, "ranks", broken)
    with pytest.raises(OSError, match="no processes"):
        growth.main(["--only", "prompts", "ranks", "--csv", str(tmp_path)])
    rows = read("cpu_growth.csv")
    assert [int(row["size"]) for row in rows] == [5000, 50_000, 500_000]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert capsys.readouterr().out.count("start, prompts") == 3
