"""How fast each operation of fastgrpo_kernels is, at the sizes of the real models, forward and
backward.

    python benchmarks/ops.py                          # this GPU, or a CPU at small sizes
    python benchmarks/ops.py --device cpu --compile   # Inductor as a second peer on a CPU too
    python benchmarks/ops.py --ops ln_modulate --sizes wan_1.3b_480p
    python benchmarks/ops.py --dancegrpo PATH --flow_grpo PATH --flow_factory PATH --unirl PATH

Prints microseconds, GB/s (the fewest bytes that must move, over the time), that as a share of the
copy bandwidth measured in the same run, and the ratio to the eager peer (common/peers.py) and to
torch.compile of it, with goals G7 and G8 beside them on an H100 or an H200, C3 on a CPU. The fourth
line has the other trainers' own functions too, from checkouts that it names (docs/performance.md
has the commits; peers/operations.py says what is restated); on a GPU the kernels of SGLang,
FlashInfer and QuACK are peers where they are installed. A peer that fails, or that computes
something else, gets no number, and neither does an operation whose tests are red
(common/verdicts.py). Rows go to benchmarks/data/<GPU or cpu>_ops.csv with device, versions and
commit.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python benchmarks/ops.py`

from benchmarks.common.verdicts import ROOT, Verdict, verdict

sys.path.insert(0, str(ROOT / "kernels"))  # where the package is not installed

from fastgrpo_kernels import dispatch

from benchmarks.common import rows, timing
from benchmarks.common.cases import SIZES, Case, Draw, Outputs, cases, probe
from benchmarks.common.peers import Inputs
from benchmarks.common.rows import Measurement, number

Compute = Callable[[Inputs], Outputs]
DEFAULT_SIZES = {
    "cuda": ("wan_1.3b_480p", "wan_14b_240p", "hunyuan_240p"),
    "cpu": ("shapes_16", "shapes_64"),
}
BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("cpp", "reference")}
TURNS = {"cuda": 1, "cpu": 5}
"""The implementations are timed in turns on a CPU, whose speed others change meanwhile."""
SDE_OPS = ("sde_step", "sde_log_prob", "clipped_ratio_loss", "grpo_loss", "branch_gradient")
"""Held against G8; the others, the transformer's pointwise work, against G7."""
PEERS = ("eager", "compile")
TRAINERS = ("dancegrpo", "flow_grpo", "flow_factory", "unirl")
FASTEST_PEERS = ("sglang", "flashinfer")
"""Of the libraries, those with the whole operation: G7 asks to be no slower."""


@dataclass(frozen=True, kw_only=True)
class OpMeasurement(Measurement):
    """One implementation of one operation at one size, in one direction."""

    KEY: ClassVar = ("device", "op", "size", "direction", "implementation", "dtype")

    op: str
    size: str
    direction: str
    """"forward", "backward" or "forward+backward"."""
    implementation: str
    """A backend of fastgrpo_kernels, or a peer: "eager", "compile" (Inductor), a project's name."""
    dtype: str
    us: float
    host_us: float
    method: str
    bytes: int
    gb_per_s: float
    copy_percent: float
    """Share of the copy bandwidth measured in the same run."""
    speedup_eager: float | None
    """Time of the peer over this time: above 1 is faster than the peer."""
    speedup_compile: float | None
    peers: str
    """Time of each other peer over this time, such as "dancegrpo 1.83, unirl 2.10"."""
    log_prob_error: float | None
    """Largest distance from the float64 reference, for operations that return log-probabilities."""


COLUMNS: list[rows.Column] = [
    ("operation", "<26", lambda row: row.op),
    ("size", "<15", lambda row: row.size),
    ("direction", "<18", lambda row: row.direction),
    ("by", "<11", lambda row: row.implementation),
    ("us", ">9", lambda row: number(row.us, 1)),
    ("host us", ">9", lambda row: number(row.host_us, 1)),
    ("GB/s", ">8", lambda row: number(row.gb_per_s, 1)),
    ("% copy", ">8", lambda row: number(row.copy_percent, 1)),
    ("×eager", ">8", lambda row: number(row.speedup_eager, 2)),
    ("×compile", ">9", lambda row: number(row.speedup_compile, 2)),
    ("peers, goals", "", lambda row: "; ".join(filter(None, [row.peers, row.goals]))),
]


def goals(row: OpMeasurement) -> str:
    """Goals G7, G8 and C3 of docs/performance.md that this row is held against."""
    if row.implementation not in ("triton", "cuda", "cpp"):
        return ""
    asked: list[tuple[str, bool]] = []
    others = {
        name: float(ratio) for name, ratio in map(str.split, filter(None, row.peers.split(", ")))
    }
    if row.implementation == "cpp":
        asked = [(f"C3 {name} 2x", ratio >= 2.0) for name, ratio in others.items()]
        if row.speedup_compile is not None:
            asked.append(("C3 compile 1x", row.speedup_compile >= 1.0))
        return rows.met(asked)
    if not rows.has_goals(row.device):
        return ""
    if row.op not in SDE_OPS:
        asked += [
            (f"G7 {name} 1x", others[name] >= 1.0) for name in FASTEST_PEERS if name in others
        ]
        asked.append(("G7 copy 85 %", row.copy_percent >= 85.0))
        if row.speedup_eager is not None:
            asked.append(("G7 eager 5x", row.speedup_eager >= 5.0))
        least = 0.97 if row.direction == "forward" else 1.1
        if row.speedup_compile is not None:
            asked.append((f"G7 compile {least}x", row.speedup_compile >= least))
    limits = {("sde_step", "forward"): 9.0, ("grpo_loss", "forward+backward"): 20.0}
    limit = limits.get((row.op, row.direction))
    if limit is not None and "480p" in row.size:
        asked.append((f"G8 {limit:g} us", row.us <= limit))
        if row.speedup_eager is not None:
            asked.append(("G8 eager 12x", row.speedup_eager >= 12.0))
    if row.log_prob_error is not None:
        asked.append(("G8 error 1e-6", row.log_prob_error < 1e-6))
    return rows.met(asked)


def main(arguments: Sequence[str] | None = None, tests: Path = ROOT / "tests" / "ops") -> int:
    """Check, measure, print, write. 1 if an operation had red tests or failed."""
    chosen = _parse(arguments)
    device = torch.device(chosen.device)
    started, bandwidth = time.monotonic(), timing.copy_bandwidth(device)
    others = _other_peers(chosen, device)
    about = rows.provenance(device)
    chosen_cases = [
        case
        for size in chosen.sizes
        for case in cases(size)
        if not chosen.ops or case.op in chosen.ops
    ]
    files = sorted({case.tests for case in chosen_cases})
    with ThreadPoolExecutor(chosen.jobs) as pool:  # GPU figures are taken after all of them
        verdicts = dict(
            zip(files, pool.map(lambda name: verdict(tests / name), files), strict=True)
        )
    print("  ".join(f"{name} {value}" for name, value in about.items()))
    print(f"copy {bandwidth:.1f} GB/s, bytes read and written\n")
    found: list[OpMeasurement] = []
    path = rows.csv_path(chosen.csv, device, "ops")
    trouble = _report_red(chosen_cases, verdicts)
    for case in chosen_cases:
        label = f"{case.op} {case.size}"
        if not verdicts[case.tests].green:
            continue
        if time.monotonic() - started > chosen.budget:
            print(f"{label}: left out, the budget of {chosen.budget:.0f} s is spent")
            continue
        try:
            of_case = measure_case(
                case,
                device,
                verdicts[case.tests].backends,
                chosen.compile,
                chosen.seconds,
                [peer for peer in others if peer.op == case.op],
            )
        # one operation that fails must not cost the figures of the others; the exit code tells
        except Exception as error:
            print(f"{label}: FAILED, no number: {type(error).__name__}: {error}", flush=True)
            trouble = True
            continue
        measured = [_row(case, *one, bandwidth, about) for one in of_case]
        print(rows.table(measured, COLUMNS, head=not found), flush=True)
        found += measured
        rows.write_csv(path, found)  # what is ended at a limit leaves what it had
    if found:
        print(f"\n{path}")
    return 1 if trouble else 0


def measure_case(
    case: Case,
    device: torch.device,
    shown: Sequence[str],
    compile_peer: bool,
    seconds: float,
    others: Sequence[Any] = (),
) -> list[tuple[str, str, dict[str, timing.Timing], float | None]]:
    """Time one operation at one size: each backend that can serve it, and the peers.

    Args:
        shown: backends that the operation's tests have shown; another gets no number.
        others: peers.operations.PeerOperation of this operation.

    Returns:
        Direction, implementation, the timings of all implementations in that direction, and the
        error of the log-probability (forward of a backend that has one).
    """
    inputs = [case.make(draw_on(device, seed)) for seed in range(_sets(case, device))]
    computes: dict[str, Compute] = {}
    for backend in BACKENDS[device.type]:
        if dispatch.unsupported_reason(backend, case.op, probe(inputs[0])):
            continue
        if backend != "reference" and backend not in shown:
            print(f"{case.op} {case.size}: no test of the backend {backend} ran: no number")
            continue
        computes[backend] = lambda i, backend=backend: case.fused(i, backend)  # type: ignore[misc]
    computes["eager"] = case.eager
    if compile_peer:
        torch._dynamo.reset()
        computes["compile"] = torch.compile(case.eager, fullgraph=True, dynamic=False)
    computes |= {peer.name: peer.compute for peer in others if _works(case, peer, inputs[0])}
    lacking = {(peer.name, d) for peer in others for d in {*case.bytes} - {*peer.directions}}
    found = []
    for direction in case.bytes:
        turns: dict[str, list[timing.Timing]] = {
            name: [] for name in computes if (name, direction) not in lacking
        }
        num_turns = TURNS[device.type]
        for _ in range(num_turns):
            for name, of_name in turns.items():
                one = time_direction(
                    case, computes[name], inputs, direction, device, seconds / num_turns
                )
                of_name.append(one)
        timings = {name: timing.middle(of_name) for name, of_name in turns.items()}
        for name in timings:
            has_error = direction == "forward" and name in BACKENDS[device.type]
            error = _log_prob_error(case, computes[name], inputs[0]) if has_error else None
            found.append((direction, name, timings, error))
    del inputs, computes
    gc.collect()
    return found


def _other_peers(chosen: argparse.Namespace, device: torch.device) -> list[Any]:
    """Those of the checkouts that are named, and on a GPU those of libraries."""
    roots = {name: getattr(chosen, name) for name in TRAINERS}
    if device.type != "cuda" and not any(roots.values()):
        return []
    # They need diffusers, which a machine that has only the kernels lacks.
    from benchmarks.peers import operations

    libraries = operations.of_libraries() if device.type == "cuda" else []
    return [*operations.of_checkouts(roots), *libraries]


def _works(case: Case, peer: Any, inputs: Inputs) -> bool:
    """Whether a peer computes finite values, and of a whole operation those of the eager peer."""
    try:
        with torch.no_grad():
            got, expected = peer.compute(inputs), case.eager(inputs)
            if not all(tensor.isfinite().all() for tensor in got):
                raise ValueError("expected finite values, got others")
            for one, other in zip(got, expected, strict=True) if peer.is_whole else ():
                torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=6e-2)
    # one peer that fails must not cost the figures of the others
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        print(f"{case.op} {case.size}: {peer.name}: no number: {type(error).__name__}: {reason}")
        return False
    return True


def _row(
    case: Case,
    direction: str,
    name: str,
    timings: dict[str, timing.Timing],
    error: float | None,
    bandwidth: float,
    about: dict[str, str],
) -> OpMeasurement:
    taken, rate = timings[name], case.bytes[direction] / timings[name].us / 1e3
    eager, compiled = (
        timings[peer].us / taken.us if peer in timings and peer != name else None for peer in PEERS
    )
    known = {*PEERS, *(backend for names in BACKENDS.values() for backend in names)}
    others = [
        f"{other} {t.us / taken.us:.2f}" for other, t in timings.items() if other not in known
    ]
    row = OpMeasurement(
        op=case.op,
        size=case.size,
        direction=direction,
        implementation=name,
        dtype=str(SIZES[case.size].dtype).removeprefix("torch."),
        us=taken.us,
        host_us=taken.host_us,
        method=taken.method,
        bytes=case.bytes[direction],
        gb_per_s=rate,
        copy_percent=100.0 * rate / bandwidth,
        speedup_eager=eager,
        speedup_compile=compiled,
        peers=", ".join(others) if name in known - {*PEERS} else "",
        log_prob_error=error,
        **about,
    )
    return replace(row, goals=goals(row))


def time_direction(
    case: Case,
    compute: Compute,
    inputs: Sequence[Inputs],
    direction: str,
    device: torch.device,
    seconds: float,
) -> timing.Timing:
    """One direction of one backend, over all sets of inputs in turn."""

    def prepare() -> list[timing.Call]:
        calls = [_call(case, compute, one, direction) for one in inputs]
        return calls * math.ceil(_calls(case) / len(calls)) if device.type == "cuda" else calls

    return timing.measure(prepare, device, seconds)


def _call(case: Case, compute: Compute, inputs: Inputs, direction: str) -> timing.Call:
    if direction == "forward":
        return torch.no_grad()(lambda: compute(inputs))
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.wrt}
    ready: Inputs = {**inputs, **leaves}
    # The gradients that arrive are drawn, except that of a loss, which is 1.
    first = [out for out in compute(ready) if out.requires_grad]
    arriving = [torch.randn_like(out) if out.dim() else torch.ones_like(out) for out in first]

    def both() -> Outputs:
        outputs = [out for out in compute(ready) if out.requires_grad]
        return torch.autograd.grad(outputs, list(leaves.values()), arriving)

    if direction == "forward+backward":
        return both
    return lambda: torch.autograd.grad(first, list(leaves.values()), arriving, retain_graph=True)


def draw_on(device: torch.device, seed: int) -> Draw:
    """Standard normal inputs on a device; never zeros, which hide what is unwritten and can run
    faster.
    """
    generator = torch.Generator(device).manual_seed(seed)
    return lambda shape, dtype: torch.randn(shape, generator=generator, device=device).to(dtype)


def _calls(case: Case) -> int:
    """Of one operation in a CUDA graph, so that the gap between two graphs hardly counts: 20 of a
    few microseconds, 4 of longer ones.
    """
    return 20 if case.bytes["forward"] < 5e7 else 4


def _sets(case: Case, device: torch.device) -> int:
    """As many sets of inputs as outgrow the L2 cache four times, but two at the least and no more
    than there are calls.
    """
    if device.type != "cuda":
        return 4
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(_calls(case), math.ceil(4 * cache / case.bytes["forward"])))


@torch.no_grad()
def _log_prob_error(case: Case, compute: Compute, inputs: Inputs) -> float | None:
    if case.log_prob is None:
        return None
    got, exact = case.log_prob(inputs, compute(inputs))
    return float((got.double() - exact).abs().max())


def _report_red(chosen: Sequence[Case], verdicts: dict[str, Verdict]) -> bool:
    """Name the operations that get no number, with the tests' own words; whether there are any."""
    red = [
        case
        for case in {case.op: case for case in chosen}.values()
        if not verdicts[case.tests].green
    ]
    for name in sorted({case.tests for case in red}):
        print(verdicts[name].output[-3000:])
    for case in red:
        print(f"{case.op}: tests red: no number ({case.tests}: {verdicts[case.tests].note})")
    return bool(red)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--ops", nargs="+", default=[], help="names of operations (default: all)")
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=list(SIZES),
        help="default: the three models on a GPU, the embedded world on a CPU",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Inductor as a peer (default: on a GPU)",
    )
    parser.add_argument(
        "--csv", type=Path, help="folder of the CSV file (default: benchmarks/data)"
    )
    for name in TRAINERS:
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help="a checkout of it: a peer")
    parser.add_argument("--seconds", type=float, default=0.2, help="of measuring for one figure")
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        help="seconds after which no further operation is begun",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="test files run at a time, before anything is measured"
    )
    chosen = parser.parse_args(arguments)
    chosen.sizes = chosen.sizes or list(DEFAULT_SIZES[chosen.device])
    chosen.compile = chosen.device == "cuda" if chosen.compile is None else chosen.compile
    known = {case.op for name in SIZES for case in cases(name)}
    if unknown := sorted(set(chosen.ops) - known):
        parser.error(
            f"--ops: expected names of {', '.join(sorted(known))}, got {', '.join(unknown)}"
        )
    return chosen


if __name__ == "__main__":
    sys.exit(main())
