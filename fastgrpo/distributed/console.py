"""The console of a job: rank 0's log lines, above its progress bar."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("fastgrpo")


class _ConsoleHandler(logging.Handler):
    """Writes to the current `sys.stdout` without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if os.environ.get("RANK", "0") == "0":
            from tqdm import tqdm

            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


def log_to_console() -> None:
    """Print the package's log lines on stdout, from rank 0; a second call changes nothing.

    Commands call this. A program that uses the package as a library sets up logging as it likes.
    """
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
