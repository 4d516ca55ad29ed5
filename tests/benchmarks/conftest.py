"""The benchmarks as scripts see them: the repository on sys.path, one thread."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], list[dict[str, str]]]:
    """read(name): the rows that a script wrote into tmp_path."""

    def rows(name: str) -> list[dict[str, str]]:
        with open(tmp_path / name, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return rows
