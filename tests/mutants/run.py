"""Break the code on purpose, one mutant at a time, and see that a test notices.

    python tests/mutants/run.py [--only WORD] [--list]

`mutants.yaml` holds the mutants: a file, a text that occurs once in it, its replacement, and the
tests that have to fail. They run on a copy of the checkout, never on the working tree. Not part of
`make test`: a run takes about a quarter of a minute for each mutant.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
TIMEOUT = 600
"""Seconds for the tests of one mutant; one that hangs them is noticed too."""


def copy_checkout(folder: Path) -> None:
    """Copy what git tracks, as it is in the working tree, and the compiled extension."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    extensions = ROOT.glob("kernels/fastgrpo_kernels/_C.*")
    for path in [*map(Path, filter(None, listed.split("\0"))), *extensions]:
        source, target = (
            ROOT / path,
            folder / (path.relative_to(ROOT) if path.is_absolute() else path),
        )
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())


def passes(folder: Path, tests: str) -> bool:
    """True if the tests pass in the copy, False if one fails or they hang.

    Raises:
        ValueError: No test ran.
    """
    path = os.pathsep.join([str(folder), str(folder / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [*PYTEST, *shlex.split(tests)]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode > 1:
        raise ValueError(f"pytest ended with {done.returncode}: {done.stdout.decode()[-300:]}")
    return done.returncode == 0


def notices(folder: Path, mutant: dict[str, str]) -> bool:
    """True if the mutant's tests fail in the copy, which is left as it was.

    Raises:
        ValueError: The text is not in the file exactly once: the code has changed.
    """
    file = folder / mutant["file"]
    text = file.read_text(encoding="utf-8")
    if text.count(mutant["old"]) != 1:
        raise ValueError(f"{mutant['file']}: expected once, found {text.count(mutant['old'])}")
    file.write_text(text.replace(mutant["old"], mutant["new"]), encoding="utf-8")
    try:
        return not passes(folder, mutant["tests"])
    finally:
        file.write_text(text, encoding="utf-8")


def main() -> int:
    """Run the mutants; exit code 1 if one survives or cannot be applied."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutants whose file or text has this word")
    parser.add_argument("--list", action="store_true", help="only list them")
    options = parser.parse_args()
    mutants = yaml.safe_load((Path(__file__).parent / "mutants.yaml").read_text(encoding="utf-8"))
    chosen = [mutant for mutant in mutants if options.only in " ".join(mutant.values())]
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not options.list:
            copy_checkout(folder)
            for tests in dict.fromkeys(mutant["tests"] for mutant in chosen):
                if not passes(folder, tests):
                    raise SystemExit(f"{tests}: fails without a mutant")
        for number, mutant in enumerate(chosen, start=1):
            verdict = ""
            if not options.list:
                try:
                    verdict = "noticed" if notices(folder, mutant) else "SURVIVES"
                except ValueError as error:
                    verdict = f"CANNOT BE JUDGED: {error}"
            bad += verdict not in ("", "noticed")
            change = f"{mutant['old'].strip()!r} -> {mutant['new'].strip()!r}"
            print(f"{number:3}/{len(chosen)} {verdict:9} {mutant['file']}: {change}", flush=True)
    print(f"{len(chosen)} mutants, {bad} not noticed")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
