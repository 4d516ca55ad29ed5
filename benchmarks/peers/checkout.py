"""Functions and loops of a peer, taken from a checkout that the user names.

What can be imported is imported, with stand-ins for packages that its modules name but that these
loops never call. A script that cannot be imported (it starts a process group, or needs a GPU) is
read: single functions of it, or one loop of a function, are compiled from its source as they are.
Nothing of a peer lies in this repository.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock


class Changed(Exception):
    """A checkout has not what is taken from it."""


def functions(
    path: Path, names: Sequence[str], namespace: dict[str, Any]
) -> tuple[SimpleNamespace, dict[str, Any]]:
    """Functions of a script, compiled from its source.

    Args:
        path: The script.
        names: Its functions and classes that are wanted.
        namespace: What they call: modules, and stand-ins for `dist`, `tqdm` and the like.

    Returns:
        The functions by name, and their globals, where a name can be put in place of another.

    Raises:
        Changed: There is no such file, or no such function in it.
    """
    tree = _parse(path)
    found = {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names
    }
    if missing := [name for name in names if name not in found]:
        raise Changed(f"{path}: expected functions {', '.join(missing)}, got none")
    scope = {"__name__": path.stem, **namespace}
    exec(compile(ast.Module([*found.values()], []), str(path), "exec"), scope)
    return SimpleNamespace(**{name: scope[name] for name in names}), scope


def loop(path: Path, function: str, variable: str) -> CodeType:
    """The first `for VARIABLE in ...` of a function, to be run with `exec` over its variables.

    Raises:
        Changed: There is no such file, function or loop.
    """
    for outer in _parse(path).body:
        if isinstance(outer, ast.FunctionDef) and outer.name == function:
            for node in ast.walk(outer):
                if isinstance(node, ast.For) and ast.unparse(node.target) == variable:
                    return compile(ast.Module([node], []), str(path), "exec")
    raise Changed(f"{path}: expected a loop over {variable} in {function}, got none")


def load(root: Path, names: Sequence[str], absent: Sequence[str] = ()) -> list[Any]:
    """Modules of a checkout.

    Args:
        root: What its packages are imported from.
        names: Dotted names of modules.
        absent: Modules that these import and that need not be installed: while they are imported,
            a stand-in that takes any call is there for each that is missing.

    Raises:
        Changed: One of them cannot be imported.
    """
    sys.path.insert(0, str(root))
    try:
        with _stand_ins(absent):
            return [importlib.import_module(name) for name in names]
    except (ImportError, AttributeError) as error:
        raise Changed(f"{root}: expected {', '.join(names)} to import, got {error}") from error
    finally:
        sys.path.remove(str(root))


def commit(root: Path) -> str:
    """The commit that a checkout is at; "unknown" for a folder that is none."""
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    top, _, revision = done.stdout.strip().partition("\n")
    # A folder inside another repository has that one's commit.
    return revision[:7] if top and Path(top) == root.resolve() else "unknown"


@contextmanager
def _stand_ins(names: Sequence[str]) -> Iterator[None]:
    """Modules that take any call, for those of `names` that are not installed."""
    made = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock(name=name)
            made.append(name)
    try:
        yield
    finally:
        # diffusers and transformers ask sys.modules what is installed.
        for name in made:
            del sys.modules[name]


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Changed(f"{path}: expected a script of the peer, got {error.strerror}") from error


def mapping(**values: Any) -> Any:
    """Settings as some peers pass them: read by attribute, and unpacked with `**`."""
    return _Settings(values)


class _Settings(Mapping[str, Any]):
    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)

    def __getitem__(self, key: str) -> Any:
        return self.__dict__[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)
