"""Files of the package and of its users: where a path is looked for, and how a file is replaced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGED = Path(__file__).resolve().parent.parent
"""The folder that holds the package. Relative paths are looked for here if the working directory
does not have them.
"""


def find_file(path: str, key: str) -> Path:
    """Find an existing file.

    Args:
        path: Absolute, or relative to the working directory or to the folder that holds the
            installed package.
        key: The configuration key or option that named it, for the message.

    Raises:
        FileNotFoundError: The file is in neither place; names `key` and both.
    """
    candidates = dict.fromkeys([Path(path).absolute(), PACKAGED / path])
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{key}: expected a file, found none at {' or '.join(map(str, candidates))}"
    )


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all, whenever the process is killed. One writer at a time.

    Yields a hidden path beside `path` to write to. At the end of the block its bytes are synced to
    the disk and it is renamed to `path`; after an error it is removed and `path` stays as it was.
    """
    partial = path.with_name(f".partial-{path.name}")
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors makes files that only their owner can read
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write` of a text in UTF-8."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
