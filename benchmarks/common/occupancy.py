"""What of a compiled kernel decides its speed and can be read without a GPU: how many of its warps
an H100's multiprocessor (SM) holds, and how many instructions it issues for a byte of its tensors.

A kernel that moves every byte once is as fast as the memory if enough of its loads are under way,
for which it needs warps, and if the four schedulers of an SM can issue its instructions meanwhile,
one a cycle each at best.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

SMS, SCHEDULERS, CLOCK = 132, 4, 1.755e9
"""Of an H100 SXM; Hz under load."""
BANDWIDTH = 3.0e12
"""Bytes a second of a large copy on it, measured (docs/performance.md)."""
WARPS, BLOCKS, REGISTERS, SHARED = 64, 32, 64 * 1024, 228 * 1024
"""What an SM holds at most: warps, blocks, registers, bytes of shared memory."""
RESERVED, REGISTER_UNIT = 1024, 8
"""Bytes of shared memory that a block takes besides its own; a thread's registers are given out in
multiples.
"""


class Instructions(NamedTuple):
    """Of one warp, as assembled: outside the loop, and in one turn of it."""

    straight: int
    loop: int


def warps_per_sm(registers: int, num_warps: int, shared: int) -> int:
    """Warps of a kernel that an H100's SM holds at a time (compute capability 9.0).

    Args:
        registers: Of a thread.
        num_warps: Of a block.
        shared: Bytes of a block.
    """
    given = REGISTER_UNIT * math.ceil(registers / REGISTER_UNIT)
    blocks = min(
        BLOCKS,
        WARPS // num_warps,
        REGISTERS // (given * 32 * num_warps),
        SHARED // (RESERVED + shared),
    )
    return blocks * num_warps


def instructions(sass: str) -> Instructions:
    """Count a kernel's instructions, up to its first unconditional EXIT: what follows are slow
    paths of divisions and square roots, which normal numbers do not take.

    Args:
        sass: Of `nvdisasm -c`.

    Returns:
        The loop is the longest that has none inside; a program without one has 0.
    """
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    count = 0
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        if not (found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line)):
            continue
        count += 1
        if jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", found[1]):
            jumps.append((count, jump[1]))
        if found[1].startswith("EXIT"):
            break
    loops = [(labels[label], end) for end, label in jumps if labels.get(label, count) < end]
    inner = [
        (start, end)
        for start, end in loops
        if not any(
            (start, end) != other and start <= other[0] <= other[1] <= end for other in loops
        )
    ]
    longest = max((end - start for start, end in inner), default=0)
    return Instructions(count - sum(end - start for start, end in inner), longest)


def need(warp_instructions: float, size: int) -> float:
    """Instructions that each scheduler must issue a cycle to move these bytes at full bandwidth.
    Above 1 it cannot; near 1 it does not.

    Args:
        warp_instructions: Of all warps of a launch.
        size: Bytes that the launch has to move.
    """
    cycles = size / BANDWIDTH * CLOCK
    return warp_instructions / (cycles * SMS * SCHEDULERS)
