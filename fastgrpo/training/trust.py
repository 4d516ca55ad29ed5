"""Run folders that somebody else may have made: nothing outside of one is read, written or deleted
on its word, and no code that it names runs unasked.

A run signs its config.yaml with a key of the user (`sign`). A folder without a valid signature may
still be used if its configuration names only classes of fastgrpo and no place outside; for anything
else a command asks for `--trust`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import is_dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from fastgrpo.config import TrainConfig
from fastgrpo.errors import UserError, require
from fastgrpo.files import atomic_write_text

logger = logging.getLogger("fastgrpo")

MARK = ".made_here"
"""The signature of a run folder's config.yaml."""
RECORD = ("config.yaml", "config.until_*.yaml", "judge.json", "metrics.jsonl", MARK)
"""The files of a run folder that commands read."""
ASKS = ("endpoints", "api_key_env")
"""Arguments of a judge that send videos, and the value of a variable, to a server."""
OPTION = (
    "use a run folder that was not made here although its config.yaml names classes that are not "
    "of fastgrpo, or files or servers elsewhere, or although links lead out of it"
)
"""What `--trust` does, for the commands that have it."""
_KEY_BYTES = 32
_MOST_NODES = 10_000
_CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def sign(folder: Path) -> None:
    """Write the signature of `folder`/config.yaml, if this user can have a key."""
    try:
        atomic_write_text(folder / MARK, _signature(folder / "config.yaml") + "\n")
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        logger.debug(f"{folder}: not marked as made here: {error}")


def is_made_here(folder: Path) -> bool:
    """Whether a run of this user wrote the folder's config.yaml as it is."""
    try:
        mark = (folder / MARK).read_bytes().strip()
        return hmac.compare_digest(mark, _signature(folder / "config.yaml").encode())
    except (OSError, RuntimeError):
        return False


def check_trusted(folder: Path, values: Mapping[str, Any], built: Collection[str]) -> None:
    """Check what a configuration names, before any of it is imported or read.

    Args:
        folder: The run folder that it comes from.
        values: Its config.yaml.
        built: The sections whose classes are built and whose files are read.

    Raises:
        UserError: It was not made here, and names a class that is not of fastgrpo, or a file or a
            server elsewhere.
    """
    for found in _foreign(values, built):
        if not is_made_here(folder):
            raise UserError(
                f"{folder / 'config.yaml'}: expected a run that was made here, or only parts of "
                f"fastgrpo, got {found}; add --trust if you trust whoever made this folder"
            )


def check_links(folder: Path, *patterns: str) -> None:
    """Check that no link leads out of a folder.

    Args:
        folder: A run folder, or what else may come from somebody else.
        patterns: Names of its entries; those in them are checked too.

    Raises:
        UserError: A link leads out of the folder, or an entry is a pipe or a device.
    """
    root, seen = folder.resolve(), set[Path]()
    waiting = [
        root / name
        for name in (sorted(os.listdir(root)) if root.is_dir() else ())
        if any(fnmatch(name, pattern) for pattern in patterns)
    ]
    while waiting:
        path = waiting.pop()
        target = inside(root, path.relative_to(root)) if path.is_symlink() else path
        if target not in seen and target.is_dir():
            waiting += target.iterdir()
        elif target.exists() and not (target.is_file() or target.is_dir()):
            raise UserError(f"{path}: expected a file or a folder, got a pipe or a device")
        seen.add(target)


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a .yaml or .json file of a run folder.

    Raises:
        UserError: It cannot be read, or holds something else, or grows beyond all measure by
            references to itself.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise UserError(f"{path}: cannot be read as {kind}: {error}") from error
    require(isinstance(values, dict), str(path), "keys and their values", values)
    waiting: list[Any] = [values]
    for _ in range(_MOST_NODES):
        if not waiting:
            return dict(values)
        value = waiting.pop()
        inner = value.values() if isinstance(value, dict) else value
        waiting += [one for one in inner if isinstance(one, dict | list)]
    raise UserError(f"{path}: expected at most {_MOST_NODES} nested values, got more")


def inside(folder: Path, name: str | Path) -> Path:
    """The path of `name` in a folder, with links followed.

    Raises:
        UserError: It leads out of the folder.
    """
    root = folder.resolve()
    try:
        path = (root / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # NUL, too long, links in a circle
        raise UserError(f"{folder}: expected the name of a file in it, got {name!r}") from error
    if path == root or not path.is_relative_to(root):
        raise UserError(
            f"{folder / name}: expected a file in {folder}, got one outside of it, {path}; if the "
            "link is your own, copy the folder with `cp -rL`, or add --trust to sample, evaluate "
            "and export (a run's own user is known by a key in ~/.local/state/fastgrpo: where the "
            "home folder does not last, as in a container, set XDG_STATE_HOME to one that does)"
        )
    return path


def _foreign(values: Mapping[str, Any], built: Collection[str]) -> Iterator[str]:
    """What in a configuration names code, a server, or a place outside the working directory."""
    kinds = get_type_hints(TrainConfig)
    for section, value in values.items():
        if section not in kinds:  # such as policy.class_path, with a dot
            yield f"the key {section}"
        elif isinstance(value, str) and is_dataclass(kinds[section]):
            yield f"{section}: {value}"  # a file that holds the section
        if section == "reward" and section not in built:
            continue
        for key, text in _texts(value, str(section)):
            name, path = key.rpartition(".")[2], Path(text)
            is_class = bool(_CLASS.fullmatch(text))
            is_foreign = name == "class_path" or "class_path" in text
            if section in built:
                leads_out = path.is_absolute() or ".." in path.parts or text.startswith("~")
                is_foreign |= leads_out or name in ASKS
            if section == "prompts" and section in built:
                # Any other text would be shown beside the samples, such as one of the user's.
                is_foreign |= not text.startswith(("fastgrpo/", "hub:"))
            if section in built and section != "prompts":
                # A text stands for a class where one is expected, and so does YAML in a text.
                is_foreign |= is_class or not set("{}\"'\n").isdisjoint(text)
            if is_foreign and not (is_class and text.startswith("fastgrpo.")):
                yield f"{key}: {text}"


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """All texts of a section, with their dotted keys."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _texts(one, f"{key}.{name}")
    elif isinstance(value, list | tuple | set):
        for one in value:
            yield from _texts(one, key)
    elif isinstance(value, str):
        yield key, value.strip()


def _signature(config: Path) -> str:
    return hmac.new(_key(), config.read_bytes(), hashlib.sha256).hexdigest()


def _key() -> bytes:
    """This user's key, made at the first call.

    Raises:
        OSError, RuntimeError: There is no place for it.
    """
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "fastgrpo" / "key"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = path.with_name(f".key-{secrets.token_hex(8)}")
        with open(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        try:
            os.link(fresh, path)  # whole, and only by the first of several processes
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise OSError(f"{path}: expected a key of {_KEY_BYTES} bytes, got {len(key)}")
    return key
