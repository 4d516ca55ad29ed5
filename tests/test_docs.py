"""The documents: what they and the source name exists, and the commands in them are commands."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from fastgrpo.__main__ import commands

ROOT = Path(__file__).resolve().parent.parent
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
).stdout.split()
FILES = [ROOT / name for name in TRACKED if (ROOT / name).is_file()]
SOURCES = [p for p in FILES if p.suffix in (".py", ".cpp", ".cu", ".h", ".cuh", ".yaml", ".toml")]
PAGES = [p for p in FILES if p.suffix == ".md"]
ELSEWHERE = {"table.md", "README.md", "prompts/README.md"}
"""Documents that a command writes beside its results (README.md: a model card), and VBench's."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 100
    assert ROOT / "README.md" in PAGES
    assert ROOT / "docs" / "method.md" in PAGES


def test_every_document_that_the_source_names_exists() -> None:
    known = {name_of(page) for page in PAGES}
    missing = [
        f"{name_of(path)}: {document}"
        for path in SOURCES
        for document in re.findall(r"[\w./-]+\.md\b", path.read_text(encoding="utf-8"))
        if not (document in ELSEWHERE or any(document == k for k in known))
        and path.parent.name not in ("docs", "cli")
        and "tests" not in path.parts
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) + re.findall(
        r"```\{(?:image|literalinclude|include)\} (\S+)", text
    )
    generated = {"configuration.md", "commands.md"}
    missing = [
        link
        for link in links
        if not link.startswith(("http", "mailto:"))
        and Path(link).name not in generated
        and not (page.parent / link).exists()
    ]
    assert missing == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readmes_reward_is_the_example() -> None:
    example = (ROOT / "examples" / "my_reward.py").read_text().split('"""', 2)[2].strip()
    assert example in (ROOT / "README.md").read_text()


@cache
def help_of(command: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        name, *subcommand = command.split()
        importlib.import_module(f"fastgrpo.cli.{name}").main([*subcommand, "--help"])
    return output.getvalue()


def shell_commands(page: Path) -> list[list[str]]:
    """The words of each `python -m fastgrpo ...` and `torchrun ... fastgrpo/train.py ...`."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        match = re.search(r"(?:-m fastgrpo|fastgrpo/train\.py) (.*)", line)
        if not (match and line.startswith(("    ", "\t"))):
            continue
        entry = "train " if "train.py" in match.group(0) else ""
        with contextlib.suppress(ValueError):
            found.append(shlex.split(entry + match.group(1), comments=True))
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if shell_commands(p)], ids=name_of)
def test_the_commands_and_options_in_a_page_exist(page: Path) -> None:
    for words in shell_commands(page):
        command, *options = words
        assert command in commands(), f"{command} in {words}"
        if command == "evaluate":
            command = f"evaluate {options[0]}"
        for option in options:
            if option.startswith("--") and ".init_args" not in option:
                key = option.split("=")[0]
                # `policy.model` and other arguments of a class appear in that class's own help.
                known = re.search(rf"{re.escape(key)}\b", help_of(command))
                assert known or key.startswith(("--policy.", "--reward.")), f"{key} in {words}"


def test_python_m_fastgrpo_lists_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastgrpo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert all(name in done.stdout for name in commands())


def test_every_metric_is_explained() -> None:
    """The glossary names each metric that the trainer writes, by its row key or its prefix."""
    glossary = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    folder = ROOT / "fastgrpo" / "training"
    source = "".join((folder / name).read_text() for name in ("step.py", "metrics.py", "loop.py"))
    keys = set(re.findall(r'f?"((?:rewards|weights|hoyer|competence|eval|time)/)', source))
    names = "num|frac|approx|clip|grad|ratio|reward|loss|kl|step|learning"
    keys |= set(re.findall(rf'"((?:{names})\w*)":', source))
    assert len(keys) >= 15
    assert [key for key in sorted(keys) if key not in glossary] == []


README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_readmes_python_blocks_run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
