"""`python -m fastgrpo NAME ...` runs fastgrpo/cli/NAME.py."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from fastgrpo.distributed.console import log_to_console

FOLDER = Path(__file__).parent / "cli"


def commands() -> dict[str, str]:
    """Name and first docstring line of each command, read without importing it."""
    files = sorted(f for f in FOLDER.glob("*.py") if f.stem != "__init__")
    return {
        f.stem: (ast.get_docstring(ast.parse(f.read_text(encoding="utf-8"))) or "").split("\n")[0]
        for f in files
    }


def main(argv: list[str]) -> int:
    """Run the command that the first argument names with the rest; its exit code, 0 for help, 2 for
    a name that is none.
    """
    log_to_console()
    known = commands()
    name = argv[0].replace("-", "_") if argv else ""
    if name in known:
        code: int = importlib.import_module(f"fastgrpo.cli.{name}").main(argv[1:])
        return code
    wanted = not argv or argv[0] in ("-h", "--help")
    text = "usage: python -m fastgrpo COMMAND [--help]\n\n" + "\n".join(
        f"  {n:<12} {d}" for n, d in known.items()
    )
    print(
        text if wanted else f"error: there is no command {argv[0]!r}\n\n{text}",
        file=sys.stdout if wanted else sys.stderr,
    )
    return 0 if wanted else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
