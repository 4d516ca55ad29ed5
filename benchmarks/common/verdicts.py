"""No number for an operation whose tests are red: the verdict of its tests, in a process of its own
with the device's settings.

    python benchmarks/common/verdicts.py                        # every file under tests/ops
    python benchmarks/common/verdicts.py tests/ops/test_sde_step.py
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("cuda", "cpp", "triton", "reference")


@dataclass(frozen=True)
class Verdict:
    """What the tests of one file said."""

    green: bool
    note: str
    """Such as "41 passed, 12 skipped", or why there is no green."""
    backends: tuple[str, ...]
    """Those that are a parameter of more tests that passed than were skipped; another has no
    number, for little was shown of it.
    """
    seconds: float
    output: str = ""
    """The tests' own note, if they are red."""
    idle: bool = False
    """Not green, for every test was skipped."""


@functools.cache
def verdict(tests: Path, timeout: float = 600.0) -> Verdict:
    """The verdict on one file of tests; once a process."""
    if not tests.exists():
        return Verdict(False, f"no file {tests.name}", (), 0.0)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-rfE", "--tb=short", "--maxfail=10", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", str(tests), *options, "-m", "not slow"]
        try:
            done = subprocess.run(
                [*command, f"--junitxml={report}"],
                cwd=ROOT,
                env=environment(),
                timeout=timeout,
                check=False,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode(errors="replace")
            return Verdict(False, f"not done after {timeout:.0f} s", (), timeout, output)
        output, seconds = done.stdout.decode(errors="replace"), time.monotonic() - start
        if not report.exists():
            note = f"pytest did not run (exit code {done.returncode})"
            return Verdict(False, note, (), seconds, output)
        tests_run = list(ElementTree.parse(report).iter("testcase"))
    skipped = [test for test in tests_run if test.find("skipped") is not None]
    passed = [test for test in tests_run if not len(test.findall("*"))]
    bad = len(tests_run) - len(passed) - len(skipped)
    counts = {"passed": len(passed), "failed": bad, "skipped": len(skipped)}
    note = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    green, idle = done.returncode == 0 and bool(passed), bool(skipped) and not bad and not passed
    shown = (name for name in BACKENDS if _tests_of(name, passed) > _tests_of(name, skipped))
    output = "" if green or idle else output
    return Verdict(green, note or "no test", tuple(shown), seconds, output, idle)


def _tests_of(backend: str, cases: Sequence[ElementTree.Element]) -> int:
    """How many of these tests have the backend among the parameters in their name, such as
    test_it[triton-float32].
    """
    return sum(
        backend in re.findall(r"\w+", "".join(re.findall(r"\[.*\]", case.get("name", ""))))
        for case in cases
    )


def environment() -> dict[str, str]:
    """Of the tests' process: no backend forced; no interpreter on a GPU (tests/conftest.py turns it
    on where there is none).
    """
    values = {
        name: value
        for name, value in os.environ.items()
        if name not in ("FASTGRPO_KERNELS", "TRITON_INTERPRET")
    }
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [values.get("PYTHONPATH")])]
    return {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        **values,
        "PYTHONPATH": os.pathsep.join(paths),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the verdict on each file; 1 if one is red. A file whose tests were all skipped (no
    diffusers on this machine, say) is not.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tests", nargs="*", type=Path, help="files of tests (default: all of tests/ops)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, min(6, (os.cpu_count() or 1) // 2)),
        help="processes at a time",
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one file")
    chosen = parser.parse_args(arguments)
    files = chosen.tests or sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    with ThreadPoolExecutor(chosen.jobs) as pool:
        verdicts = list(pool.map(lambda path: verdict(path, chosen.timeout), files))
    for found in verdicts:
        print(found.output[-6000:], end="")
    for path, found in zip(files, verdicts, strict=True):
        of = f" ({', '.join(found.backends)})" if found.backends else ""
        state = "green" if found.green else "idle" if found.idle else "RED"
        print(f"{path.name:<28} {state:<6} {found.note}{of}, {found.seconds:.1f} s")
    return 0 if all(found.green or found.idle for found in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
