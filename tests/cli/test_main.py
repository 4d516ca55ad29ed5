"""`python -m fastgrpo`: commands are found by file, listed without being imported, and run with
what follows their name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fastgrpo import __main__ as entry

ROOT = Path(__file__).parents[2]


@pytest.fixture
def one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A command folder with `two_words` alone, whose main returns 3; what it was called with."""
    (tmp_path / "__init__.py").write_text('"""Not a command."""')
    (tmp_path / "two_words.py").write_text(
        '"""Says two words.\n\nAnd more."""\nraise AssertionError("was imported")\n'
    )
    (tmp_path / "silent.py").write_text("")
    (tmp_path / "page.html").write_text("")
    calls: list[list[str]] = []

    def main(argv: list[str]) -> int:
        calls.append(argv)
        return 3

    module: Any = types.ModuleType("fastgrpo.cli.two_words")
    module.main = main
    monkeypatch.setitem(sys.modules, "fastgrpo.cli.two_words", module)
    monkeypatch.setattr(entry, "FOLDER", tmp_path)
    return calls


def test_commands_are_files_and_their_first_lines(one_command: Any) -> None:
    assert entry.commands() == {"silent": "", "two_words": "Says two words."}


def test_a_command_gets_the_rest_and_gives_the_exit_code(one_command: list[list[str]]) -> None:
    assert entry.main(["two_words", "--a", "b", "--help"]) == 3
    assert one_command == [["--a", "b", "--help"]]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(
    one_command: Any, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "two_words    Says two words." in out


@pytest.mark.parametrize(
    "name", ["nonsense", "two-words", "__init__", "page", "../two_words", "--config"]
)
def test_anything_else_is_an_error_with_the_list(
    one_command: list[list[str]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main([name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: there is no command {name!r}\n")
    assert "Says two words." in err
    assert one_command == []


def test_help_lists_the_real_commands_without_importing_torch(tmp_path: Path) -> None:
    """In a process of its own, as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fastgrpo"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:2] == "  ")
    assert {"train", "calibrate", "sample", "report"} <= lines.keys()
    assert all(len(words) > 20 for words in lines.values())
    assert "fastgrpo" in done.stderr
    assert " torch" not in done.stderr


HELPED = """
import contextlib, io, json, sys
from fastgrpo.__main__ import commands, main

heavy, found = {"torch", "diffusers", "transformers", "matplotlib", "sklearn"}, {}
calls = [[name, "--help"] for name in commands()]
calls += [["evaluate", action, "--help"] for action in ("sample", "vbench")]
calls += [[*words, "nowhere"] for words in (["report"], ["sample"], ["export"], ["stages"])]
calls += [["evaluate", action, "nowhere"] for action in ("sample", "vbench")]
for words in calls:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    loaded = heavy & {*sys.modules}
    heavy -= loaded  # the next command is not blamed
    found[" ".join(words)] = [code, said.getvalue(), sorted(loaded)]
print(json.dumps(found))
"""


def test_help_and_a_folder_that_is_not_there_import_nothing_heavy(tmp_path: Path) -> None:
    """Of all commands in one process, after which none has loaded torch or what takes as long."""
    done = subprocess.run(
        [sys.executable, "-c", HELPED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert {"train --help", "score --help", "evaluate sample --help"} <= found.keys()
    for words, (code, said, heavy) in found.items():
        assert heavy == [], words
        if words.endswith("--help"):
            assert code == 0, words
            assert len(said) > 200, words
        else:
            assert code == 2, words
            assert said.startswith("error: "), words
            assert "nowhere" in said, words
