"""`python -m fastgrpo COMMAND ...` runs fastgrpo/cli/COMMAND.py."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from pathlib import Path

from fastgrpo.distributed.console import log_to_console

# As in train.py, before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
FOLDER = Path(__file__).parent / "cli"


def commands() -> dict[str, str]:
    """Name and first docstring line of each command, read without importing it."""
    files = sorted(FOLDER.glob("[!_]*.py"))
    docstrings = {
        f.stem: ast.get_docstring(ast.parse(f.read_text(encoding="utf-8"))) for f in files
    }
    return {name: (text or "").split("\n")[0] for name, text in docstrings.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names, with the rest.

    Returns:
        Its exit code; 0 for help, 2 for an unknown name.
    """
    argv = sys.argv[1:] if argv is None else argv
    log_to_console()
    known = commands()
    if argv and argv[0] in known:
        code: int = importlib.import_module(f"fastgrpo.cli.{argv[0]}").main(argv[1:])
        return code
    lines = "\n".join(f"  {name:<12} {line}" for name, line in known.items())
    usage = f"usage: python -m fastgrpo COMMAND [--help]\n\n{lines}"
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0
    print(f"error: there is no command {argv[0]!r}\n\n{usage}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
