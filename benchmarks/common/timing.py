"""Time on a GPU by events (host-launched, and as replays of a CUDA graph), on a CPU by the wall;
medians.

A list of calls is one round: each call has its own inputs, so that together they outgrow the L2
cache, and a graph keeps the outputs of all of them apart. A figure is microseconds a call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
Prepare = Callable[[], Sequence[Call]]
"""Makes the round. On a GPU it is called under the stream that is timed: a backward pass runs on
the stream of its forward pass.
"""


@dataclass(frozen=True)
class Timing:
    """Medians, in microseconds a call."""

    us: float
    """On a GPU the graph's replays (host-launched where no graph could be captured); on a CPU the
    wall.
    """
    host_us: float
    """Launched from Python, launch gaps included; on a CPU the same as `us`."""
    method: str
    """"graph", "events" or "wall"."""


def middle(timings: Sequence[Timing]) -> Timing:
    """The median of several, by `us`."""
    return sorted(timings, key=lambda timing: timing.us)[len(timings) // 2]


def measure(prepare: Prepare, device: torch.device, seconds: float = 0.2) -> Timing:
    """Time one round of calls again and again for about so many seconds (and five rounds at the
    least), after a warm-up.
    """
    if device.type != "cuda":
        calls = prepare()
        us = _rounds(lambda: _wall(calls), seconds) / len(calls)
        return Timing(us, us, "wall")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = prepare()
        host_us = _rounds(lambda: _events(lambda: [call() for call in calls]), seconds / 2) / len(
            calls
        )
        captured = _capture(calls, stream)
        us = (
            host_us
            if captured is None
            else _rounds(lambda: _events(captured.replay), seconds / 2) / len(calls)
        )
    torch.cuda.current_stream().wait_stream(stream)
    return Timing(us, host_us, "events" if captured is None else "graph")


def copy_bandwidth(device: torch.device, numel: int | None = None) -> float:
    """GB/s of a large copy on the device, bytes read and bytes written both counted.

    numel: of fp32; default: 1 GiB on a GPU, 128 MiB on a CPU.
    """
    count = numel or (1 << 28 if device.type == "cuda" else 1 << 25)
    source, target = torch.randn(count, device=device), torch.empty(count, device=device)
    # Four times there: one copy a graph would also time the gap between two graphs.
    us = measure(
        lambda: [lambda: target.copy_(source)] * (4 if device.type == "cuda" else 1),
        device,
        seconds=0.5,
    ).us
    return 2 * source.nbytes / us / 1e3


@dataclass
class Usage:
    """Seconds, and on a GPU the allocator's peak in bytes (0 elsewhere)."""

    seconds: float = 0.0
    peak: float = 0.0


@contextmanager
def spending(usage: Usage, device: torch.device) -> Iterator[None]:
    """Add what happens in the meantime to `usage`, the device's queued work waited for."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    yield
    synchronize(device)
    usage.seconds += time.perf_counter() - begin
    if device.type == "cuda":
        usage.peak = max(usage.peak, torch.cuda.max_memory_allocated(device))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(call: Callable[[], Any], device: torch.device, repeats: int) -> Usage:
    """The median seconds and the largest peak of so many calls, after one that is not counted."""
    call()
    runs = [Usage() for _ in range(repeats)]
    for run in runs:
        with spending(run, device):
            call()
    return Usage(statistics.median(run.seconds for run in runs), max(run.peak for run in runs))


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a product of square matrices: bf16 of 8192 on a GPU, fp32 of 1024 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / measure(lambda: [lambda: left @ right], device, seconds=0.5).us * 1e6


def _rounds(once: Callable[[], float], seconds: float) -> float:
    """The median of rounds, in microseconds, after three that are not counted."""
    for _ in range(3):
        once()
    end = time.perf_counter() + seconds
    times: list[float] = []
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 2000):
        times.append(once())
    return statistics.median(times)


def _wall(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e6


def _events(work: Call) -> float:
    # A first event that the device meets while the host is still launching would time the host, so
    # one piece of work goes ahead of it.
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    work()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _capture(calls: Sequence[Call], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
    """A graph of one round on `stream`, where these calls have been warmed up; None, and a word, if
    it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            kept = [call() for call in calls]
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(
            f"    no CUDA graph, host-launched figures instead: {str(error).splitlines()[0]}",
            flush=True,
        )
        return None
    # Alive until the last call is captured, or the allocator would hand every call the same output;
    # the graph owns the memory from here.
    del kept
    return graph
