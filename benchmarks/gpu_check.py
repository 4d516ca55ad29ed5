"""Everything that needs a GPU, ordered by worth, for a lease of 15 minutes in commands of at most
ten: whether the training forward has the rollout's bits, the kernels under sanitizers, then speed.

    python benchmarks/gpu_check.py                   # on the GPU machine, in the repository's root
    python benchmarks/gpu_check.py --budget 200      # the same again: what is left, in so many s
    python benchmarks/gpu_check.py --only g0 ops     # some parts, whatever was done before
    python benchmarks/gpu_check.py --dry-run         # anywhere: what it would run, in its order
    python benchmarks/gpu_check.py --tiny            # a CPU: the same order at tiny sizes

A part begins only where the budget holds the least that it needs, is ended at its own limit, and a
part that fails does not stop the others. What was done stands in build/gpu_check/state.json,
written as it goes beside the log and the CSV files (rows that name GPU, versions and commit); a
copy of all goes to $OUT where that is set. The next start leaves out what was right, begins with
what has not been run yet, and runs last what failed or was cut off; --fresh forgets all of it. On
the same machine the folder is still there. On a fresh one, carry it: copy what came back into
build/gpu_check and name that among the carried paths. --tiny has a folder of its own.

Made for a bare machine without a network: torch 2.11, triton 3.6, Python 3.12, nvcc. Nothing is
installed; the package is read where it lies, in kernels/, and built there at every start. The
tests need pytest and hypothesis; those that compare with diffusers' blocks, qk_norm_rope's among
them, diffusers. What is missing there is carried as wheels. Here:
    pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl diffusers==0.42.1
    importlib_metadata zipp
and there, in front of this command:
    python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl && export
    PYTHONPATH=/tmp/site
(likewise pytest hypothesis pluggy iniconfig packaging pygments sortedcontainers). Without pytest
no test runs, and so no number of an operation is printed. The generators need diffusers with
transformers, accelerate, safetensors, matplotlib and PyYAML, and jsonargparse docstring_parser
typeshed_client av (the last one with its platform, --platform manylinux_2_28_x86_64). Where the
tree is carried without its history, say FASTGRPO_COMMIT=<git describe --always --dirty> in the
command. SGLang, FlashInfer and QuACK are peers of the operations where they are installed.

Exit code: 0 all was right, 1 something failed, 3 nothing failed but something is left. A short
table comes last. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # for `python benchmarks/gpu_check.py`

from benchmarks.common import rows
from benchmarks.common.verdicts import ROOT, environment

BUDGET = 570.0
"""Seconds in all: half a minute below the ten minutes after which the machine ends the command."""
FOLDER = ROOT / "build" / "gpu_check"
PYTHON = sys.executable
HERE = str(Path(__file__).resolve())
LOG, STATE = "gpu_check.log", "state.json"
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
RIGHT, FAILED, CUT, LEFT = "right", "FAILED", "cut off", "left out"


@dataclass(frozen=True)
class Part:
    """One command of the plan."""

    name: str
    command: tuple[str, ...]
    seconds: float
    """Its own limit; the whole budget's remainder is another."""
    least: float
    """With fewer seconds left it is not begun."""
    missing: str = ""
    """Why it cannot run here; nothing if it can."""
    variables: tuple[tuple[str, str], ...] = ()
    is_kept: bool = True
    """Whether what it did is still there at the next start."""


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    name: str
    state: str
    """One of RIGHT, FAILED, CUT (at its limit, or with this script) and LEFT."""
    seconds: float
    note: str
    commit: str = ""
    device: str = ""


def plan(out: Path, tiny: bool = False) -> list[Part]:
    """The parts by their worth.

    Args:
        out: Folder of the CSV files.
        tiny: The same at tiny sizes on a CPU: whether all of it runs, not how fast.
    """
    device = "cpu" if tiny else "cuda"
    found = [shutil.which("compute-sanitizer", path=path) for path in (None, "/usr/local/cuda/bin")]
    sanitizer = next(filter(None, found), "compute-sanitizer")
    no_sanitizer = "" if any(found) else "compute-sanitizer is not on this machine"
    no_sanitizer = "there is no GPU" if tiny else no_sanitizer
    no_tests, no_trainer = _missing("pytest", "hypothesis"), _missing(*TRAINER_NEEDS)
    under = f"{sanitizer} --error-exitcode 9 --target-processes application-only --tool"
    touch = f"{PYTHON} {HERE} --touch {device}"
    # Every tensor its own allocation: an access beyond its end is then seen.
    apart = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)

    def model(name: str, options: str, seconds: float, least: float) -> Part:
        # Ended by itself, with its table, before its limit.
        known = {"14b": "wan2.1_t2v_14b", "hunyuan": "hunyuanvideo"}
        given = f"--model {known.get(name, 'wan2.1_t2v_1.3b')} --random-weights --csv {out}"
        given += f" --device {device} --budget {seconds - 30:.0f} {options}"
        given += " --scale tiny --repeats 1" if tiny else ""
        return Part(name, _script("iteration.py", given), seconds, least, no_trainer)

    def ops(name: str, sizes: str, options: str, seconds: float, least: float) -> Part:
        sizes = "tiny tiny_per_head --seconds 0.001" if tiny else sizes
        given = f"--device {device} --csv {out} --sizes {sizes} --jobs 6 {options}"
        given += f" --budget {seconds - 50:.0f}"
        return Part(name, _script("ops.py", given), seconds, least, no_tests)

    fused = "--implementations fused"
    deep = "" if tiny else " --layers 20"
    scale = " --scale tiny" if tiny else ""
    judging = _script("judge.py", f"--device {device} --rounds 2 --csv {out}{scale}")
    others = "wan_14b_240p hunyuan_240p"
    build = PYTHON, "setup.py", "build_ext", "--inplace"
    return [
        # The extension lies in the tree, which a fresh machine has without it.
        Part("build", build, 150, 30, "there is no GPU" if tiny else "", is_kept=False),
        Part("serves", (PYTHON, "-m", "fastgrpo_kernels"), 60, 10),
        model("g0", f"{fused} --parts g0", 120, 40),
        # What the sanitizers run is warmed up first, so that they see no compiler.
        Part("touch", tuple(touch.split()), 120, 20),
        Part("memcheck", tuple(f"{under} memcheck {touch}".split()), 90, 30, no_sanitizer, apart),
        Part("racecheck", tuple(f"{under} racecheck {touch}".split()), 90, 30, no_sanitizer),
        ops("ops", "wan_1.3b_480p", "" if tiny else "--compile", 200, 90),
        model("forward", "--parts g0 forward", 160, 60),
        model("train", f"{fused} --parts g0 train", 130, 60),
        model("decode", f"{fused} --parts decode", 90, 40),
        Part("judge", judging, 200, 90, _missing("transformers")),
        model("iteration", f"{fused} --parts g0 iteration", 260, 120),
        ops("ops_others", others, "--no-compile", 110, 70),
        model("14b", f"--implementations eager fused --parts g0 forward train{deep}", 110, 60),
        model("hunyuan", f"--implementations eager fused --parts g0 forward train{deep}", 110, 60),
        # Each operation's own tests have run before its figures: these are all of them.
        Part("tests", _script("common/verdicts.py", "--jobs 6 --timeout 200"), 210, 90, no_tests),
    ]


def _script(name: str, options: str) -> tuple[str, ...]:
    return PYTHON, str(ROOT / "benchmarks" / name), *options.split()


def _missing(*packages: str) -> str:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} missing: {CARRY}" if absent else ""


def read_state(out: Path) -> dict[str, Outcome]:
    """What earlier starts did, by part; nothing where none has written, or it cannot be read."""
    try:
        entries = json.loads((out / STATE).read_text(encoding="utf-8"))
        return {entry["name"]: Outcome(**entry) for entry in entries}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def in_order(parts: Sequence[Part], before: dict[str, Outcome]) -> list[Part]:
    """What is to be run: what every start needs, what has not been run, then what failed or was cut
    off. Without the parts that were right; nothing at all where those are all.
    """
    tried = {name for name, outcome in before.items() if outcome.state in (FAILED, CUT)}
    done = {name for name, outcome in before.items() if outcome.state == RIGHT}
    left = [part for part in parts if part.is_kept and part.name not in done]
    if not left:
        return []
    again = [part for part in left if part.name in tried]
    return [*(p for p in parts if not p.is_kept), *(p for p in left if p not in again), *again]


def run_plan(
    parts: Sequence[Part],
    out: Path,
    budget: float = BUDGET,
    before: dict[str, Outcome] | None = None,
    about: tuple[str, str] = ("", ""),
) -> list[Outcome]:
    """Run the parts one after the other, each if the budget holds what it needs.

    Args:
        parts: In the order of running.
        out: Folder of state and log.
        budget: Seconds in all.
        before: Outcomes of earlier starts, which stay in the state.
        about: Commit and device, for the state.

    Returns:
        What became of these parts.
    """
    started, known = time.monotonic(), dict(before or {})
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for part in parts:
        left = budget - (time.monotonic() - started)
        if part.missing:
            outcome = Outcome(part.name, LEFT, 0.0, part.missing)
        elif left < part.least:
            outcome = Outcome(part.name, LEFT, 0.0, f"{left:.0f} of {part.least:.0f} s are left")
        else:
            # Should the machine end this script with it: not the next start's first again.
            known[part.name] = Outcome(part.name, CUT, 0.0, "ended with gpu_check.py", *about)
            _write_state(out, known)
            print(f"\n=== {part.name}: {' '.join(part.command)}", flush=True)
            outcome = dataclasses.replace(
                _run(part, out, min(part.seconds, left)), commit=about[0], device=about[1]
            )
        outcomes.append(outcome)
        if outcome.state != LEFT or part.name not in known:
            known[part.name] = outcome
        _write_state(out, known)
    return outcomes


def _write_state(out: Path, known: dict[str, Outcome]) -> None:
    """The state, whole at any time; and what there is so far to $OUT."""
    partial = out / f"{STATE}.partial"
    text = json.dumps([dataclasses.asdict(outcome) for outcome in known.values()], indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(out / STATE)
    target = os.environ.get("OUT")
    if target and Path(target).resolve() != out.resolve():
        for path in out.iterdir():
            if path.is_file():
                shutil.copy2(path, target)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 all right, 1 something failed, 3 something was left out or cut off."""
    states = {outcome.state for outcome in outcomes}
    return 1 if FAILED in states else 3 if states & {LEFT, CUT} else 0


def touch(device: str) -> int:
    """Call every operation of every backend once, forward and backward, on small sizes; 1 if a
    result is not finite or a call fails.
    """
    sys.path.insert(0, str(ROOT / "kernels"))
    from fastgrpo_kernels import dispatch

    from benchmarks.common.cases import cases, probe
    from benchmarks.ops import draw_on

    failures, calls = 0, 0
    for case in [case for size in TOUCH_SIZES for case in cases(size)]:
        for backend in dispatch.BACKENDS:
            inputs = case.make(draw_on(torch.device(device), 0))
            if backend == "reference" or dispatch.unsupported_reason(
                backend, case.op, probe(inputs)
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
            return Outcome(part.name, FAILED, 0.0, str(error))
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
    spent = time.monotonic() - start
    if code is None:
        return Outcome(part.name, CUT, spent, f"not done after {seconds:.0f} s")
    if code:
        return Outcome(part.name, FAILED, spent, f"exit code {code}, see {LOG}")
    return Outcome(part.name, RIGHT, spent, "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is left of the plan, print its table."""
    chosen = _parse(arguments)
    if chosen.touch:
        return touch(chosen.touch)
    # What a CPU did at tiny sizes is not done on a GPU.
    folder = FOLDER.with_name(f"{FOLDER.name}_tiny") if chosen.tiny else FOLDER
    parts = plan(folder, chosen.tiny)
    if unknown := sorted(set(chosen.only) - {part.name for part in parts}):
        names = ", ".join(part.name for part in parts)
        print(f"--only: expected names of {names}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    before = {} if chosen.fresh else read_state(folder)
    if chosen.only:
        pending = [part for part in parts if part.name in chosen.only or not part.is_kept]
    else:
        pending = in_order(parts, before)
    if chosen.dry_run:
        print("\n".join(map(_described, pending)) or "nothing is left")
        return 0
    if not chosen.tiny and not torch.cuda.is_available():
        print("expected a GPU, found none; --dry-run says what would be run", file=sys.stderr)
        return 1
    if importlib.util.find_spec("diffusers") is None:
        print(f"diffusers missing: tests that compare with its blocks will be red; {CARRY}")
    if chosen.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    name = rows.device_name(torch.device("cpu" if chosen.tiny else "cuda"))
    about = rows.revision(), name
    now = {o.name: o for o in run_plan(pending, folder, chosen.budget, before, about)}
    print(f"\n{name}, torch {torch.__version__}, Python {sys.version.split()[0]}, {about[0]}")
    table = [
        now.get(p.name) or before.get(p.name) for p in parts if p in pending or not chosen.only
    ]
    found = [outcome for outcome in table if outcome is not None]
    for done in found:
        earlier = f"earlier, at {done.commit}" if done.name not in now else ""
        notes = "; ".join(filter(None, [earlier, done.note]))
        print(f"{done.name:<12}{done.state:<10}{done.seconds:>6.0f} s  {notes}".rstrip())
    return exit_code(found)


def _described(part: Part) -> str:
    """Its limits and its command, as --dry-run prints them."""
    variables = "".join(f"{name}={value} " for name, value in part.variables)
    missing = f": left out, {part.missing}" if part.missing else ""
    limits = f"at most {part.seconds:.0f} s, from {part.least:.0f} s on"
    return f"{part.name} ({limits}){missing}\n    {variables}{' '.join(part.command)}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands and their limits, run none"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help="these, and the build"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget what earlier starts did, their rows too"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument(
        "--touch",
        metavar="DEVICE",
        help="no plan: call every operation once on this device (what the sanitizers watch)",
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
