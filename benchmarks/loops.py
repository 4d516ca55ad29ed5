"""How fast an iteration of this trainer is next to other trainers' own code on the same network.

    python benchmarks/loops.py --dancegrpo PATH --flow_grpo PATH --flow_factory PATH --unirl PATH
    python benchmarks/loops.py --rollout.num_prompts 8         # options of `train` over the recipe

Each PATH is a checkout of that project (docs/performance.md names the commits); those that are not
given are left out. Without any, it is this trainer alone at the micro-batches.

Every loop samples and trains the same work on the embedded world's network on a CPU
(benchmarks/peers/embedded.py): 4 prompts x 16 videos of 16 steps, then 32 videos x 9 steps in one
optimizer step, without guidance, judge or decoding. Ours computes the first step once for all
passes of a group, which no peer does: 3 % fewer forwards at 8 a pass, 6 % at one, none at 16 and
32. What of a peer is run as it is and what is restated stands at the top of its file in
benchmarks/peers. All are measured

    at equal micro-batch   8, 16 and 32 videos (transitions) a pass, also where a peer has 1
    as they ship           this trainer: its recipe; DanceGRPO and Flow-Factory: one video a pass;
                           UniRL: 4 sampled and 1 trained a pass, old log-probabilities again. Only
                           these: the work is the same, where Flow-Factory's recipe trains one step
                           of a video and UniRL's 7 of 14
    this trainer at one video a pass too, which is the setting of the real models

in turns in one process, a round after the other in changing order. A ratio is the median over the
rounds of the peer's seconds over ours in the same round: above 1, this trainer is faster. Seconds
are of the CPU (all threads of the process); walls are beside them. Peak memory is that of a process
of its own for each loop (Linux). The first round is not counted: there it is checked that each peer
sends as many videos through its network as the work has, and that its weights move; one that does
not gets no number. Rows go to benchmarks/data/cpu_loops.csv. Exit code: 1 where a loop failed or
the ratio of our first update is not exactly 1, 2 for options that cannot be.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

# Where the packages are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from benchmarks.common import rows
from benchmarks.common.rows import Measurement, number
from benchmarks.peers import checkout, dancegrpo, flow_factory, flow_grpo, unirl
from benchmarks.peers.embedded import Loop, Ours, World, load_world

OURS = "fastgrpo"
PEERS = ("dancegrpo", "flow_grpo", "flow_factory", "unirl")
SHIPPED = "as shipped"
PHASES = ("rollout", "update")
GOAL = 1.5
"""C2 of docs/performance.md, at equal micro-batch."""


@dataclass(frozen=True, kw_only=True)
class LoopMeasurement(Measurement):
    """One trainer in one setting, over ours in the same or another one."""

    KEY: ClassVar = ("device", "trainer", "setting", "against")

    trainer: str
    trainer_commit: str
    setting: str
    """ "16 a pass", or "as shipped"."""
    against: str
    """Our setting that the ratios are to."""
    rounds: int
    rollout_cpu_s: float
    update_cpu_s: float
    rollout_ratio: float
    """The trainer's CPU seconds over ours: above 1, ours is faster."""
    update_ratio: float
    both_ratio: float
    wall_ratio: float
    """Of both, by the wall clock."""
    wall_s: float
    peak_mb: float | None
    """Of a process that runs this loop alone, its imports included; None where not measured."""
    drift: float | None
    """Ours: the largest |ratio - 1| before the update. Peers do not say."""
    threads: int
    load: float
    """Load average of the machine at the end."""


COLUMNS: list[rows.Column] = [
    ("trainer", "<13", lambda row: row.trainer),
    ("setting", "<11", lambda row: row.setting),
    ("against", "<11", lambda row: row.against),
    ("rounds", ">6", lambda row: str(row.rounds)),
    ("rollout s", ">9", lambda row: number(row.rollout_cpu_s, 3)),
    ("update s", ">8", lambda row: number(row.update_cpu_s, 3)),
    ("×rollout", ">8", lambda row: number(row.rollout_ratio, 2)),
    ("×update", ">7", lambda row: number(row.update_ratio, 2)),
    ("×both", ">6", lambda row: number(row.both_ratio, 2)),
    ("×wall", ">6", lambda row: number(row.wall_ratio, 2)),
    ("MB", ">6", lambda row: number(row.peak_mb, 0)),
    ("notes", "", lambda row: row.goals),
]


@dataclass
class Variant:
    """A trainer in a setting, and what its rounds took: CPU and wall seconds by phase."""

    trainer: str
    setting: str
    make: Callable[[World], Loop]
    passes: tuple[int, int] = (1, 1)
    """How often the work goes through a peer's network, in the rollout and in the update."""
    is_single: bool = True
    """Of those as shipped: whether it has one video a pass, as one of ours has."""
    loop: Any = None
    cpu: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})
    wall: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})

    @property
    def name(self) -> str:
        """As messages and --alone have it."""
        return f"{self.trainer}, {self.setting}"

    def both(self, clock: str) -> list[float]:
        """Seconds of both phases, round by round. clock: "cpu" or "wall"."""
        spent = getattr(self, clock)
        return [sum(pair) for pair in zip(*(spent[name] for name in PHASES), strict=True)]


def variants(options: argparse.Namespace, world: World) -> list[list[Variant]]:
    """Those that take turns: each equal micro-batch, then the settings of small passes."""
    roots: dict[str, Path] = {name: getattr(options, name) for name in PEERS}
    loops: dict[str, Callable[[Path, World, int], Loop]] = {
        "dancegrpo": dancegrpo.DanceGRPOBatched,
        "flow_grpo": flow_grpo.FlowGRPO,
        "flow_factory": flow_factory.FlowFactory,
        "unirl": unirl.UniRL,
    }

    def ours(videos: int, setting: str = "") -> Variant:
        return Variant(OURS, setting or f"{videos} a pass", lambda w: Ours(w, videos))

    def equal(name: str, videos: int) -> Variant:
        make = loops[name]
        return Variant(name, f"{videos} a pass", lambda w: make(roots[name], w, videos))

    given = [name for name in PEERS if roots[name]]
    groups = [[ours(b), *(equal(name, b) for name in given)] for b in options.micro_batches]
    if not options.slow_rounds:
        return groups
    shipped = {
        "dancegrpo": Variant(
            "dancegrpo", SHIPPED, lambda w: dancegrpo.DanceGRPO(roots["dancegrpo"], w)
        ),
        "flow_factory": Variant(
            "flow_factory", SHIPPED, lambda w: flow_factory.FlowFactory(roots["flow_factory"], w, 1)
        ),
        "unirl": Variant(
            "unirl", SHIPPED, lambda w: unirl.UniRL(roots["unirl"], w, 4, 1, True), (1, 2), False
        ),
    }
    ships = ours(world.config.rollout.micro_batch_size, SHIPPED)
    return [*groups, [ships, ours(1), *(shipped[name] for name in given if name in shipped)]]


def run_once(variant: Variant) -> None:
    """One round of a variant."""
    for name in PHASES:
        wall, cpu = time.perf_counter(), time.process_time()
        getattr(variant.loop, name)()
        variant.cpu[name].append(time.process_time() - cpu)
        variant.wall[name].append(time.perf_counter() - wall)


def check(variant: Variant, world: World) -> None:
    """The first round, which is not counted.

    Raises:
        ValueError: A peer does other work than it is said to.
    """
    network = getattr(variant.loop, "network", None)  # ours counts for itself
    if network is None:
        for name in PHASES:
            getattr(variant.loop, name)()
        return

    def sums() -> list[float]:  # of copies the peer's peak would have more
        return [float(p.detach().double().sum()) for p in network.parameters()]

    before = sums()
    work = {
        "rollout": world.num_videos * world.num_steps,
        "update": len(world.chosen) * world.trained_steps,
    }
    for name, times in zip(PHASES, variant.passes, strict=True):
        seen = network.videos
        getattr(variant.loop, name)()
        if (got := network.videos - seen) != times * work[name]:
            raise ValueError(
                f"{name}: expected {times * work[name]} forwards of a video, got {got}"
            )
    if before == sums():
        raise ValueError("update: expected other weights, got the same")


def measure(group: list[Variant], world: World, rounds: int, deadline: float) -> list[Variant]:
    """Run a group in turns; those of it that work. A round that begins is ended, one at least."""
    good = []
    for variant in group:
        try:
            variant.loop = variant.make(world)
            check(variant, world)
        except Exception as error:  # must not cost the other trainers; the exit code tells
            print(f"{variant.name}: FAILED, no number: {type(error).__name__}: {error}", flush=True)
        else:
            good.append(variant)
    for i in range(rounds):
        if i and time.monotonic() > deadline:
            print(f"{group[0].setting}: {i} of {rounds} rounds, the budget is spent", flush=True)
            break
        for variant in good if i % 2 else good[::-1]:
            run_once(variant)
    return good


def median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Of the rounds' pairs."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def row_of(
    variant: Variant, ours: Variant, about: dict[str, Any], **values: Any
) -> LoopMeasurement:
    """A variant's figures, and its ratios to ours in a setting of the same rounds."""
    row = LoopMeasurement(
        trainer=variant.trainer,
        setting=variant.setting,
        against=ours.setting,
        rounds=len(variant.cpu["rollout"]),
        rollout_cpu_s=statistics.median(variant.cpu["rollout"]),
        update_cpu_s=statistics.median(variant.cpu["update"]),
        rollout_ratio=median_ratio(variant.cpu["rollout"], ours.cpu["rollout"]),
        update_ratio=median_ratio(variant.cpu["update"], ours.cpu["update"]),
        both_ratio=median_ratio(variant.both("cpu"), ours.both("cpu")),
        wall_ratio=median_ratio(variant.both("wall"), ours.both("wall")),
        wall_s=statistics.median(variant.both("wall")),
        drift=getattr(variant.loop, "drift", None),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0],
        **(about | values),
    )
    if variant.trainer == OURS or variant.setting == SHIPPED:
        return row
    asked = [(f"C2 {name} {GOAL:g}x", getattr(row, f"{name}_ratio") >= GOAL) for name in PHASES]
    return dataclasses.replace(row, goals=rows.met(asked))


def peak_mb(variant: Variant, arguments: Sequence[str]) -> float | None:
    """The peak of a process that runs this variant alone, one round; None where Linux's /proc is
    not there.
    """
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--alone", variant.name]
    done = subprocess.run(command, cwd=rows.ROOT, capture_output=True, text=True, check=False)
    try:
        return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])
    except (IndexError, ValueError, KeyError, TypeError):
        print(f"{variant.name}: no peak: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return None


def run_alone(groups: list[list[Variant]], name: str, world: World) -> int:
    """Run one variant once and print its peak."""
    (variant,) = [v for group in groups for v in group if v.name == name]
    variant.loop = variant.make(world)
    check(variant, world)
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"peak_mb": float(peak) / 1024}))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. 1 if a loop failed or our ratio is not exactly 1."""
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    options, overrides = _parse(given)
    warnings.filterwarnings("ignore")  # of autocast for a GPU, in a peer's every step
    begun = time.monotonic()
    try:
        world = load_world(overrides)
        for b in options.micro_batches:
            if world.num_videos % b or len(world.chosen) % b:
                expected = f"divisors of {world.num_videos} and {len(world.chosen)} videos"
                raise ValueError(f"--micro_batches: expected {expected}, got {b}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    groups = variants(options, world)
    if options.alone:
        return run_alone(groups, options.alone, world)
    commits = {
        name: checkout.commit(getattr(options, name)) for name in PEERS if getattr(options, name)
    }
    about = rows.provenance(torch.device("cpu"))
    commits[OURS] = about["commit"]
    print("  ".join(f"{name} {value}" for name, value in (about | commits).items()), flush=True)
    path, measured, trouble = rows.csv_path(options.csv, torch.device("cpu"), "loops"), [], False
    for group in groups:
        slow = group[0].setting == SHIPPED
        rounds = options.slow_rounds if slow else options.rounds
        good = measure(group, world, rounds, begun + options.budget)
        trouble |= len(good) < len(group)
        bases = [variant for variant in good if variant.trainer == OURS]
        for variant in good:
            peak = None
            if options.memory and variant.setting in ("16 a pass", SHIPPED):
                peak = peak_mb(variant, given)
            others = bases if variant.is_single else bases[:1]
            for base in [variant] if variant in bases else others:
                values = {"trainer_commit": commits[variant.trainer], "peak_mb": peak}
                measured.append(row_of(variant, base, about, **values))
                trouble |= bool(measured[-1].drift)
                print(rows.table(measured[-1:], COLUMNS, head=len(measured) == 1), flush=True)
        if measured:
            rows.write_csv(path, measured)
        group.clear()  # the next group's networks need the memory
    print(f"\n{path}")
    return 1 if trouble else 0


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name in PEERS:
        parser.add_argument(f"--{name}", type=Path, metavar="PATH", help="a checkout of it")
    parser.add_argument(
        "--micro_batches", type=int, nargs="+", default=[8, 16, 32], help="videos a pass"
    )
    parser.add_argument("--rounds", type=int, default=9, help="at equal micro-batch")
    parser.add_argument(
        "--slow_rounds", type=int, default=3, help="as shipped and at one video a pass; 0: not"
    )
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="peaks too, in a process for each (of 16 a pass and as shipped)",
    )
    parser.add_argument(
        "--budget", type=float, default=300.0, help="seconds after which no further round is begun"
    )
    parser.add_argument(
        "--csv", type=Path, help="folder of the CSV file (default: benchmarks/data)"
    )
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args(arguments)
    for name in PEERS:
        root = getattr(options, name)
        if root is not None and not root.is_dir():
            parser.error(f"--{name}: expected the folder of a checkout, got {root}")
    return options, overrides


if __name__ == "__main__":
    sys.exit(main())
