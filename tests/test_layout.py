"""The layout of design.md: names that would break other libraries, sizes, docstrings, and a test
for every public name.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import fastgrpo_kernels
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (ROOT / "fastgrpo", ROOT / "kernels" / "fastgrpo_kernels")
MODULES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
SOURCES = sorted(
    path
    for folder in ("fastgrpo", "kernels", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def public_definitions(path: Path) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {
        node.name: node
        for node in body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }


def test_there_is_something_to_look_at() -> None:
    assert {"fastgrpo/training/step.py", "kernels/fastgrpo_kernels/sde/reference.py"} <= {
        name_of(path) for path in MODULES
    }
    assert {"start_rollout", "sample_groups"} <= public_definitions(
        ROOT / "fastgrpo" / "rollout.py"
    ).keys()


# -------- names


def test_nothing_can_be_imported_as_kernels() -> None:
    """Hugging Face publishes a package of that name, which transformers and diffusers probe for."""
    assert not [*(ROOT / "kernels").glob("*.py")]
    for folder in ("fastgrpo", "benchmarks", "tests"):
        assert not [*(ROOT / folder).rglob("kernels"), *(ROOT / folder).rglob("kernels.py")]
    assert "fastgrpo" not in importlib.metadata.packages_distributions().get("kernels", [])


def test_no_module_of_the_package_shadows_another() -> None:
    """`torchrun fastgrpo/train.py` puts fastgrpo/ first on sys.path."""
    own = {path.stem for path in (ROOT / "fastgrpo").glob("*.py")} | {
        path.name for path in (ROOT / "fastgrpo").iterdir() if path.is_dir()
    }
    installed = set(importlib.metadata.packages_distributions()) - {"fastgrpo"}
    assert {"torch", "diffusers"} <= installed
    taken = (
        set(sys.stdlib_module_names)
        | installed
        | {"profiling", "data", "utils", "trainer", "models"}
    )
    assert {name for name in own & taken if not name.startswith("__")} == set()


def test_transformers_and_diffusers_import_from_here() -> None:
    """With the repository and the package first on sys.path, as `python -m` and torchrun put them."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]; import transformers, diffusers; from diffusers import WanTransformer3DModel; "
        "from transformers import UMT5EncoderModel; from transformers.utils import is_kernels_available; "
        "import importlib.metadata as m; assert is_kernels_available() == ('kernels' in m.packages_distributions())"
    )
    command = [sys.executable, "-c", script, str(ROOT / "fastgrpo"), str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -------- sizes


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_longer_than_500_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_the_entry_stays_small() -> None:
    path = ROOT / "fastgrpo" / "train.py"
    assert len(path.read_text().splitlines()) <= 80
    assert not [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
    ]


# -------- docstrings, commands


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_public_function_and_class_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    silent = [
        name for name, node in public_definitions(path).items() if not ast.get_docstring(node)
    ]
    assert silent == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "fastgrpo" / "commands").glob("[!_]*.py")), ids=name_of
)
def test_every_command_has_a_main(path: Path) -> None:
    imported = {
        alias.asname or alias.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert "main" in public_definitions(path).keys() | imported


def promised(path: Path) -> set[str]:
    """The public names that a test must mention: not those of the commands, which tests reach
    through the command line, and of the kernels' files those that the package exports (the
    others are what its files share), with the whole of dispatch.py and philox.py.
    """
    names = set(public_definitions(path))
    if path.parent.name == "commands":
        return set()
    if path.parent.name == "fastgrpo_kernels" and path.stem not in ("dispatch", "philox"):
        return names & set(fastgrpo_kernels.__all__)
    return names


def test_every_public_name_occurs_in_a_test() -> None:
    texts = [
        path.read_text(encoding="utf-8")
        for path in (ROOT / "tests").rglob("*.py")
        if path != Path(__file__)
    ]
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    untested = [
        f"{name_of(path)}: {name}"
        for path in MODULES
        for name in promised(path)
        if name not in words
    ]
    assert untested == []
