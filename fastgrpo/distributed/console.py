"""The console of a job: rank 0's log lines, above its progress bar. It is only a view: a terminal
that is gone, a pipe that nobody reads or a full disk behind it costs lines, never a run.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import suppress

logger = logging.getLogger("fastgrpo")


class _ConsoleHandler(logging.Handler):
    """Writes to the current `sys.stdout` without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0" and sys.stdout is not None:
            from tqdm import tqdm

            with suppress(OSError, ValueError):  # ValueError: it is closed
                tqdm.write(self.format(record), file=sys.stdout)
                sys.stdout.flush()


def log_to_console() -> None:
    """Print the package's log lines on stdout, from rank 0; a second call changes nothing.

    Commands call this. A program that uses the package as a library sets up logging as it likes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console without UTF-8
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
