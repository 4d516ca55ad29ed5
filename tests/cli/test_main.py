"""`python -m fastgrpo`: commands are found by file, listed without being imported, and run with
what follows their name.
"""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fastgrpo import __main__ as entry


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


@pytest.mark.parametrize("name", ["two_words", "two-words"])
def test_a_command_gets_the_rest_and_gives_the_exit_code(
    one_command: list[list[str]], name: str
) -> None:
    assert entry.main([name, "--a", "b", "--help"]) == 3
    assert one_command == [["--a", "b", "--help"]]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(
    one_command: Any, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "two_words    Says two words." in out


@pytest.mark.parametrize("name", ["nonsense", "__init__", "page", "../two_words", "--config"])
def test_anything_else_is_an_error_with_the_list(
    one_command: list[list[str]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main([name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: there is no command {name!r}\n")
    assert "Says two words." in err
    assert one_command == []


def test_the_real_commands_are_listed_at_once() -> None:
    """Without torch, which takes seconds."""
    script = "import sys; sys.argv = ['x']; from fastgrpo.__main__ import main; code = main([]); sys.exit(code or 10 * ('torch' in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("train", "calibrate", "sample", "report"):
        assert f"\n  {name} " in done.stdout


def test_the_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastgrpo", "nonsense"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr
