"""How operands and rows lie, so that the compiled code never depends on a sample's neighbours.

Triton compiles a kernel anew for other alignments, and the order of a row's sums follows the
compiled code. An operand is therefore read where it lies only if its address and its strides are
multiples of 16, which holds for every sample or for none; otherwise it is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import triton

PREFETCH_BYTES = 24 * 1024
"""Shared memory for each warp of a backward program, at most. At the models' sizes it is half of
that or less, so that 16 warps or more live on an H100's SM at a time.
"""


def aligned(x: Tensor) -> Tensor:
    """x contiguous and at an address that is a multiple of 16 bytes; a copy only if it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def strided(value: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A tensor [B, L, C] with the strides of its samples and tokens, in elements.

    A stride along an axis of size 1 is 0. None passes through.
    """
    if value is None:
        return None, 0, 0
    B, L, C = value.shape
    steps = [step if size > 1 else 0 for size, step in zip((B, L), value.stride()[:2], strict=True)]
    multiples = (C, *steps, value.data_ptr())
    if value.stride(2) == 1 and not any(number % 16 for number in multiples):
        return value, steps[0], steps[1]
    return aligned(value), L * C, C if L > 1 else 0


def modulations(x: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gate, scale and shift as views of one dtype of at most 32 bits: [B, 1, C], or [B, L, C] if
    one is per token.

    Autograd sums over what is expanded here. It does so in fp32: 16-bit values are widened first.
    """
    row = (x.shape[0], 1, x.shape[2])
    if all(_is_row(value, row, x) for value in given.values()):  # what blocks give: soon known
        return given
    views = {name: checks.modulation(name, value, x) for name, value in given.items()}
    tokens = x.shape[1] if any(view.shape[1] != 1 for view in views.values()) else 1
    size = x.shape[0] * tokens * x.shape[2]
    summed = any(
        value.requires_grad and value.element_size() == 2 and value.numel() < size
        for value in given.values()
    )
    dtypes = {value.dtype for value in given.values()}
    if summed or len(dtypes) > 1 or torch.float64 in dtypes:
        views = {name: checks.modulation(name, value.float(), x) for name, value in given.items()}
    return {
        name: view if view.shape[1] == tokens else view.expand(-1, tokens, -1)
        for name, view in views.items()
    }


def _is_row(value: Any, shape: tuple[int, ...], x: Tensor) -> bool:
    """True for fp32 [B, 1, C] where x is."""
    return (
        isinstance(value, Tensor)
        and value.dtype == torch.float32
        and value.shape == shape
        and value.device == x.device
    )


def row_constants(x: Tensor, values: int) -> dict[str, Any]:
    """How a kernel holds a row: C, its two pieces, the channels that a thread loads at once, and
    the fewest warps (at most 16) with `values` per thread.

    The pieces are those of triton_rows.py. WIDTH, 16 bytes of x, holds for every operand: the
    compiler lays a row out by the widest load of the kernel, the order of the row's sums follows
    the layout, and no other operand's dtype may change it.
    """
    C = x.shape[2]
    num_warps = min(triton.next_power_of_2(triton.cdiv(C, 32 * values)), 16)
    threads = 32 * num_warps
    head = max(1 << C.bit_length() - 1, threads)
    tail = max(triton.next_power_of_2(C - head), threads) if head < C else 0
    return {
        "C": C,
        "HEAD": head,
        "TAIL": tail,
        "WIDTH": 16 // x.element_size(),
        "THREADS": threads,
        "num_warps": num_warps,
        "enable_fp_fusion": False,
    }


def stages(x: Tensor, constants: dict[str, Any], read: list[Tensor]) -> int:
    """Rows under way in a backward loop that reads a row of each of these tensors: at most 3, as
    many as fit into shared memory.
    """
    space = 227 * 1024  # an H100's, for the compiler that has no GPU
    if x.is_cuda:
        properties = torch.cuda.get_device_properties(x.device)
        space = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)
    row_bytes = (constants["HEAD"] + constants["TAIL"]) * sum(
        tensor.element_size() for tensor in read
    )
    prefetched = min(constants["num_warps"] * PREFETCH_BYTES, space - 8 * 1024) // row_bytes
    return 1 + min(prefetched, 2)
