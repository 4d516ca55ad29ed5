"""Errors that a user can mend: "expected ..., got ...", and the one way to end a command."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, NoReturn


class UserError(ValueError):
    """A wrong value in a configuration, a file, an answer from the network or a command line."""


INPUT_ERRORS = (ValueError, OSError)
"""What a command ends with in one line: a wrong value, or what the file system refuses."""

_LONGEST = 4000
"""Characters of a message that are shown."""

_HEAD_START = 5.0
"""Seconds that a silent rank waits before it ends. torchrun ends all ranks when the first one has
ended: that is to be the one that prints, and then the others wait no longer.
"""


def require(ok: object, key: str, expected: str, got: object) -> None:
    """Check one value that came from outside the program.

    Args:
        ok: What has to hold.
        key: The configuration key, file or option that has the value.
        expected: The accepted values, in words.
        got: The value, shown by its repr.

    Raises:
        UserError: `ok` is false.
    """
    if not ok:
        raise UserError(f"{key}: expected {expected}, got {got!r}")


def one_line(error: object) -> str:
    """The message of an error on one line; of a failed file operation as `reason: path`. A very
    long one is cut, and one that cannot be made is said to be so.
    """
    try:
        text = str(error)
    except Exception as second:
        return f"(its message cannot be shown: {type(second).__name__})"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        reason = error.strerror
        text = f"{reason[:1].lower()}{reason[1:]}: {os.fsdecode(error.filename)}"
    text = " ".join(text[: 10 * _LONGEST].split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def fail(error: object) -> NoReturn:
    """End the process as a wrong command line does: one line on stderr, exit code 2.

    Before the ranks have joined, all of them find the same error, and one rank per node prints it.
    Afterwards an error may concern one rank only, so every rank prints its own.
    """
    rank = os.environ.get("RANK", "0")
    distributed: Any = sys.modules.get("torch.distributed")  # only loaded ranks can have joined
    has_joined = distributed is not None and distributed.is_initialized()
    if os.environ.get("LOCAL_RANK", rank) == "0" or has_joined:
        prefix = "error:" if rank == "0" else f"error on rank {rank}:"
        print(prefix, one_line(error), file=sys.stderr)
    else:
        time.sleep(_HEAD_START)
    raise SystemExit(2)
