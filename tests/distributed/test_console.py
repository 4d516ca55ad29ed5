"""The console is only a view: nothing that happens to it ends a run."""

from __future__ import annotations

import subprocess
import sys

import pytest

LINES = """
import logging, os, sys
from fastgrpo.distributed.console import log_to_console
log_to_console()
for i in range(3):
    logging.getLogger("fastgrpo").info(f"{i} é…")
print("whole", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("console", "shown"),
    [
        ("| cat", b"0 \\xe9\\u2026\n1 \\xe9\\u2026\n2 \\xe9\\u2026\n"),
        ("> /dev/full", b""),
        (">&-", b""),
        ("| head -c 0", b""),
    ],
)
def test_a_console_that_fails_costs_lines_alone(console: str, shown: bytes) -> None:
    """Without UTF-8, full, closed, and a pipe that nobody reads."""
    command = f'PYTHONIOENCODING=ascii "$0" -c "$1" {console}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, LINES], capture_output=True, check=False
    )
    assert done.stdout == shown
    assert done.stderr.startswith(b"whole\n")
    assert b"Traceback" not in done.stderr
