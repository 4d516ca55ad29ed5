"""Files of the package and of its users: where a path is looked for, and how a file is replaced."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGED = Path(__file__).resolve().parent.parent
"""The folder that holds the package. Relative paths are looked for here if the working directory
does not have them.
"""

UNSUPPORTED = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EBADF,
    errno.EPERM,
    errno.ENOLCK,
    errno.EACCES,
    errno.EISDIR,
)
"""errno of what a file system cannot do or does not allow: links, locks, modes, fsync of a folder
(or to open one for it).
"""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""errno of a write for which there is no space."""


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

    Raises:
        OSError: Names a file.
    """
    partial = path.with_name(f".partial-{path.name}")
    with naming(path):
        remove(partial)  # it may be a link, which a write would follow
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        try:
            yield partial
            with unless_unsupported():
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


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """As `atomic_write`, of a folder, which the block makes. An earlier one is replaced.

    Raises:
        OSError: Names a file.
    """
    partial, old = (path.with_name(f".{kind}-{path.name}") for kind in ("partial", "discarded"))
    with naming(path):
        remove(partial)
        remove(old)
        try:
            yield partial
            if path.exists():
                os.replace(path, old)
            os.replace(partial, path)
        except Exception as error:
            # safetensors has an error of its own around the system's.
            if not isinstance(error, OSError) and (
                code := re.search(r"Os \{ code: (\d+)", str(error))
            ):
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
            raise
        finally:
            remove(partial)
        remove(old)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk, where the file system can
    do that.
    """
    with naming(path), unless_unsupported():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, and nothing that a link leads to; it may be missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def keep_copy(path: Path, name: str) -> Path:
    """Copy a file beside itself under `name`, or, if that is taken by another content, under one
    with a number. Returns the copy.
    """
    content, wanted = path.read_bytes(), path.with_name(name)
    copy, count = wanted, 1
    while copy.exists() and copy.read_bytes() != content:
        count += 1
        copy = wanted.with_name(f"{wanted.stem}.{count}{wanted.suffix}")
    with atomic_write(copy) as partial:
        partial.write_bytes(content)
    return copy


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError of the block that names no file, as one of a write does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def unless_unsupported() -> Iterator[None]:
    """Ignore that the file system cannot do what the block asks for."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
