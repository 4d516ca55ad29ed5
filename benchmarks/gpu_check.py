"""Everything that needs a GPU, in commands of at most ten minutes each: build, tests, sanitizers;
speed of kernels, generators and judge.

    python benchmarks/gpu_check.py --only kernels    # on the GPU machine, in the repository's root
    python benchmarks/gpu_check.py --only iteration  # iteration.py: G0, forward, train unit, ...
    python benchmarks/gpu_check.py --only judge      # judge.py: shared prefix against generate
    python benchmarks/gpu_check.py --dry-run         # anywhere: what it would run

Without --only all are run, one after the other, as far as the ten minutes reach: more time needs
a larger --budget.

Made for a bare machine without a network: torch 2.11, triton 3.6, Python 3.12, nvcc. Nothing is
installed; the package is read where it lies, in kernels/. The tests need pytest and hypothesis;
those that compare with diffusers' blocks, qk_norm_rope's among them, diffusers. What is missing
there is carried as wheels. Here:
    pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl diffusers==0.42.1
    importlib_metadata zipp
and there, in front of this command:
    python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl && export
    PYTHONPATH=/tmp/site
(likewise pytest hypothesis pluggy iniconfig packaging pygments sortedcontainers). Without pytest
no test runs, and so no number is printed. The second command needs diffusers with transformers,
accelerate, safetensors, matplotlib and PyYAML, and jsonargparse docstring_parser typeshed_client
av (the last one with its platform, --platform manylinux_2_28_x86_64). Where the tree is carried
without its history, say FASTGRPO_COMMIT=<git describe --always --dirty> in the command, for the
CSV.

A log and the CSV file go to $OUT where it is set, else to build/gpu_check. Exit code: 0 all was
right, 1 something failed, 3 nothing failed but something could not run. A short table comes
last.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # for `python benchmarks/gpu_check.py`

from benchmarks.common.verdicts import ROOT, environment

BUDGET = 570.0
"""Seconds in all: half a minute below the ten minutes after which the machine ends the command."""
PYTHON = sys.executable
HERE = str(Path(__file__).resolve())
LOG = "gpu_check.log"
CARRY = "carry the wheels (see the top of gpu_check.py)"
TOUCH_SIZES = ("tiny", "tiny_per_head")
TRAINER_NEEDS = (
    "accelerate",
    "av",
    "diffusers",
    "docstring_parser",
    "jsonargparse",
    "matplotlib",
    "safetensors",
    "transformers",
    "yaml",
)
"""Packages without which iteration.py does not start."""


@dataclass(frozen=True)
class Part:
    """One command of the plan."""

    name: str
    command: tuple[str, ...]
    seconds: float
    """Its own limit; the whole budget's remainder is another."""
    missing: str = ""
    """Why it cannot run here; nothing if it can."""
    variables: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    name: str
    state: str
    """"right", "FAILED" or "left out"."""
    seconds: float
    note: str


def plan(out: Path, only: str = "") -> list[Part]:
    """The parts in their order. only: one of CHOICES; all need the build."""
    chosen = [parts(out) for name, parts in CHOICES.items() if only in ("", name)]
    return [
        Part("build", (PYTHON, "setup.py", "build_ext", "--inplace"), 120),
        *itertools.chain.from_iterable(chosen),
    ]


def kernel_parts(out: Path) -> list[Part]:
    """Tests and figures of fastgrpo_kernels. What the sanitizers run is warmed up first, so that
    they see no compiler.
    """
    found = [shutil.which("compute-sanitizer", path=path) for path in (None, "/usr/local/cuda/bin")]
    sanitizer = next(filter(None, found), "compute-sanitizer")
    no_sanitizer = "" if any(found) else "compute-sanitizer is not on this machine"
    no_tests = _missing("pytest", "hypothesis")
    under = f"{sanitizer} --error-exitcode 9 --target-processes application-only --tool"
    touch = f"{PYTHON} {HERE} --touch cuda"
    # Every tensor its own allocation: an access beyond its end is then seen.
    apart = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    tests = _script("common/verdicts.py", "--jobs 6 --timeout 200")
    first = _script("ops.py", f"--device cuda --csv {out} --sizes wan_1.3b_480p --budget 150")
    others = _script(
        "ops.py",
        f"--device cuda --csv {out} --sizes wan_14b_240p hunyuan_240p --no-compile --budget 60",
    )
    return [
        Part("what serves", (PYTHON, "-m", "fastgrpo_kernels"), 60),
        Part("every op once", tuple(touch.split()), 120),
        Part("tests", tests, 210, no_tests),
        Part("memcheck", tuple(f"{under} memcheck {touch}".split()), 90, no_sanitizer, apart),
        Part("racecheck", tuple(f"{under} racecheck {touch}".split()), 90, no_sanitizer),
        Part("figures", first, 200, no_tests),
        Part("figures, others", others, 100, no_tests),
    ]


def iteration_parts(out: Path) -> list[Part]:
    """Speed and memory of the real generators with random weights. Each process checks G0 of what
    it measures; --budget lets it end by itself, with its table, before its limit.
    """
    missing = _missing(*TRAINER_NEEDS)

    def part(name: str, model: str, seconds: int, options: str) -> Part:
        given = f"--model {model} --random-weights --csv {out} --budget {seconds - 30} {options}"
        return Part(name, _script("iteration.py", given), seconds, missing)

    wan, short = "wan2.1_t2v_1.3b", "--layers 20 --implementations eager fused"
    fused = "--implementations fused --parts g0"
    return [
        part("1.3B, forward", wan, 160, "--parts g0 forward"),
        part("1.3B, units", wan, 150, f"{fused} train decode"),
        part("1.3B, iteration", wan, 220, f"{fused} iteration"),
        part("14B", "wan2.1_t2v_14b", 110, f"{short} --parts g0 forward train"),
        part("HunyuanVideo", "hunyuanvideo", 110, f"{short} --parts g0 forward train"),
    ]


def judge_parts(out: Path) -> list[Part]:
    """The judge at its true size with random weights, against `generate`; no number where a token
    differs.
    """
    command = _script("judge.py", f"--device cuda --rounds 2 --csv {out}")
    return [Part("judge", command, 240, _missing("transformers"))]


def _script(name: str, options: str) -> tuple[str, ...]:
    return PYTHON, str(ROOT / "benchmarks" / name), *options.split()


def _missing(*packages: str) -> str:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} missing: {CARRY}" if absent else ""


CHOICES: dict[str, Callable[[Path], list[Part]]] = {
    "kernels": kernel_parts,
    "iteration": iteration_parts,
    "judge": judge_parts,
}
"""What `--only` takes; the first two fill ten minutes each."""


def run_plan(parts: Sequence[Part], out: Path, budget: float = BUDGET) -> list[Outcome]:
    """Run the parts one after the other; a part that fails does not stop the others, the budget
    does.
    """
    started = time.monotonic()
    outcomes: list[Outcome] = []
    out.mkdir(parents=True, exist_ok=True)
    (out / LOG).write_text("")
    for part in parts:
        left = budget - (time.monotonic() - started)
        if part.missing:
            outcomes.append(Outcome(part.name, "left out", 0.0, part.missing))
        elif left < 5:
            outcomes.append(
                Outcome(part.name, "left out", 0.0, f"the budget of {budget:.0f} s is spent")
            )
        else:
            print(f"\n=== {part.name}: {' '.join(part.command)}", flush=True)
            outcomes.append(_run(part, out, min(part.seconds, left)))
    return outcomes


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 all right, 1 something failed, 3 something was left out."""
    states = {outcome.state for outcome in outcomes}
    return 1 if "FAILED" in states else 3 if "left out" in states else 0


def touch(device: str) -> int:
    """Call every operation of every backend once, forward and backward, on small sizes; 1 if a
    result is not finite or a call fails.
    """
    sys.path.insert(0, str(ROOT / "kernels"))
    from fastgrpo_kernels import dispatch

    from benchmarks.common.cases import cases
    from benchmarks.ops import draw_on

    failures, calls = 0, 0
    for case in [case for size in TOUCH_SIZES for case in cases(size)]:
        for backend in dispatch.BACKENDS:
            inputs = case.make(draw_on(torch.device(device), 0))
            if backend == "reference" or dispatch.unsupported_reason(
                backend, case.op, inputs["latents" if "latents" in inputs else "x"]
            ):
                continue
            calls += 1
            try:
                leaves = {name: inputs[name].requires_grad_() for name in case.wrt}
                results = list(case.fused({**inputs, **leaves}, backend))
                if roots := [out for out in results if out.requires_grad]:
                    results += torch.autograd.grad(
                        roots, list(leaves.values()), [torch.ones_like(out) for out in roots]
                    )
                wrong = [
                    f"result {index}"
                    for index, result in enumerate(results)
                    if not result.isfinite().all()
                ]
            except (
                Exception
            ) as error:  # every operation is to be called, whatever became of the one before
                wrong = [f"{type(error).__name__}: {error}"]
            failures += bool(wrong)
            if wrong:
                print(f"{case.op} {case.size} {backend}: {', '.join(wrong)}", flush=True)
    print(f"{calls} calls forward and backward, {failures} failed")
    return 1 if failures or not calls else 0


def _run(part: Part, out: Path, seconds: float) -> Outcome:
    """One part in a process group of its own; the end of its output on the screen, all of it in the
    log.
    """
    start, variables = (
        time.monotonic(),
        {**environment(), **dict(part.variables), "PYTHONUNBUFFERED": "1"},
    )
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        try:
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        except OSError as error:
            return Outcome(part.name, "FAILED", 0.0, str(error))
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(0)
        text = file.read()
    print(text[-3500:], flush=True)
    with open(
        out / LOG, "a", encoding="utf-8"
    ) as log:  # one file for all parts: what comes back from a lent machine is few files
        log.write(f"=== {part.name}: {' '.join(part.command)}\n{text}\n")
    note = (
        f"not done after {seconds:.0f} s"
        if code is None
        else ""
        if code == 0
        else f"exit code {code}, see {LOG}"
    )
    return Outcome(part.name, "right" if code == 0 else "FAILED", time.monotonic() - start, note)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan, print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands and their limits, run none"
    )
    parser.add_argument(
        "--only",
        choices=tuple(CHOICES),
        default="",
        help="a part of the plan, which fits into ten minutes",
    )
    parser.add_argument(
        "--touch",
        metavar="DEVICE",
        help="no plan: call every operation once on this device (what the sanitizers watch)",
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    chosen = parser.parse_args(arguments)
    if chosen.touch:
        return touch(chosen.touch)
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu_check")
    parts = plan(out, chosen.only)
    if chosen.dry_run:
        for part in parts:
            variables = "".join(f"{name}={value} " for name, value in part.variables)
            missing = f": left out, {part.missing}" if part.missing else ""
            print(f"{part.name} (at most {part.seconds:.0f} s){missing}")
            print(f"    {variables}{' '.join(part.command)}")
        return 0
    if not torch.cuda.is_available():
        print("expected a GPU, found none; --dry-run says what would be run")
        return 1
    if importlib.util.find_spec("diffusers") is None:
        print(f"diffusers missing: tests that compare with its blocks will be red; {CARRY}")
    outcomes = run_plan(parts, out, chosen.budget)
    python = sys.version.split()[0]
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {python}")
    for done in outcomes:
        print(f"{done.name:<16}{done.state:<10}{done.seconds:>6.0f} s  {done.note}".rstrip())
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
