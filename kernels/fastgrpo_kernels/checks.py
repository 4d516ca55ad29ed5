"""Checks of arguments that several ops share. Each raises a ValueError, "expected ..., got ..."."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor

Coefficient = float | Tensor
"""A number, a scalar tensor, or a tensor [B] of any float dtype, rounded once to the arithmetic's.
"""

CFG_GRADS = ("both", "cond_only")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WORD = 0xFFFFFFFF


def describe(value: object) -> str:
    """A value for an error message: dtype and shape of a tensor, type and repr of anything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def fail(name: str, expected: str, got: str) -> NoReturn:
    """Refuse an argument. Called only in the failing branch: a good call formats nothing."""
    raise ValueError(f"{name}: expected {expected}, got {got}")


def is_float(value: object) -> bool:
    """True for a tensor of one of the four float dtypes."""
    return isinstance(value, Tensor) and value.dtype in _FLOATS


def compute_dtype(samples: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64 samples, float32 for all others."""
    return torch.float64 if samples.dtype == torch.float64 else torch.float32


def check_samples(name: str, samples: Tensor) -> None:
    """A float tensor [B, ...] with at least one element per sample."""
    if not is_float(samples) or samples.dim() < 1:
        fail(name, "a float tensor with the batch first", describe(samples))
    if 0 in samples.shape[1:]:
        fail(name, "at least one element per sample", f"shape {list(samples.shape)}")


def check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """A float tensor with the shape and the device of another."""
    if not is_float(tensor) or tensor.shape != like.shape:
        fail(name, f"a float tensor {list(like.shape)}", describe(tensor))
    check_device(name, tensor, like)


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """A tensor on the device of another."""
    if tensor.device != like.device:
        fail(name, f"it on {like.device}", f"on {tensor.device}")


def check_vector(name: str, tensor: Tensor, batch: int) -> None:
    """A float tensor [B], on any device."""
    if not is_float(tensor) or tensor.shape != (batch,):
        fail(name, f"a float tensor [{batch}]", describe(tensor))


def check_number(name: str, value: float, expected: str, valid: Callable[[float], bool]) -> None:
    """A number for which `valid` holds."""
    if not _is_number(value) or not valid(value):
        fail(name, f"a number {expected}", describe(value))


def check_sizes(shape: Sequence[int]) -> None:
    """Sizes of one sample, without the batch."""
    if any(not isinstance(size, int) or size < 1 for size in shape):
        fail("shape", "positive sizes of one sample", str(tuple(shape)))


def coefficient(name: str, value: Coefficient, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A coefficient as a tensor [B] in `dtype`, with the batch size and the device of `like`.

    Values are checked on the host only: reading a GPU tensor would make the host wait, and
    torch.compile cannot trace it.
    """
    batch = like.shape[0]
    if isinstance(value, Tensor):
        if not is_float(value) or value.shape not in ((), (batch,)):
            fail(name, f"a number or a float tensor [{batch}]", describe(value))
        if _is_readable(value):
            _check_values(name, value.reshape(-1).tolist())
        return value.detach().to(like.device, dtype, non_blocking=True).expand(batch).contiguous()
    if not _is_number(value):
        fail(name, f"a number or a float tensor [{batch}]", describe(value))
    _check_values(name, [value])
    return torch.full((batch,), float(value), dtype=dtype, device=like.device)


def seed_vector(seeds: Tensor, batch: int | None, device: torch.device | str | None) -> Tensor:
    """Noise seeds as int64 [B] on `device`. batch None: any length; device None: where they are."""
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.dim() != 1:
        fail("seeds", "an int64 tensor [B]", describe(seeds))
    if batch is not None and seeds.shape[0] != batch:
        fail("seeds", f"one per sample, [{batch}]", describe(seeds))
    return seeds.to(seeds.device if device is None else device, non_blocking=True).contiguous()


def step_vector(step: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """Step numbers as int64 [B] on `device`. Values are checked as those of `coefficient`."""
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or step.shape != (batch,):
            fail("step", f"an int or an int64 tensor [{batch}]", describe(step))
        if _is_readable(step) and not all(0 <= value <= _WORD for value in step.tolist()):
            fail("step", "values in [0, 2^32)", str(step.tolist()))
        return step.to(device, non_blocking=True).contiguous()
    if not isinstance(step, int) or isinstance(step, bool):
        fail("step", f"an int or an int64 tensor [{batch}]", describe(step))
    if not 0 <= step <= _WORD:
        fail("step", "a value in [0, 2^32)", str(step))
    return torch.full((batch,), step, dtype=torch.int64, device=device)


def check_qk(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> None:
    """Queries and keys [B, L, H, D] and their RMSNorm weights, both [H * D] or both [D]."""
    for name, x in (("q", q), ("k", k)):
        if not is_float(x) or x.dim() != 4 or 0 in x.shape[2:] or x.shape[3] % 2:
            fail(name, "a float tensor [B, L, H, D] with an even D", describe(x))
    (batch, _, *heads), (k_batch, _, *k_heads) = q.shape, k.shape
    if (batch, heads, q.dtype, q.device) != (k_batch, k_heads, k.dtype, k.device):
        expected = f"the batch, heads, channels, dtype and device of q, {describe(q)} on {q.device}"
        fail("k", expected, f"{describe(k)} on {k.device}")
    channels, head_dim = heads[0] * heads[1], heads[1]
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if not is_float(weight) or weight.shape not in ((channels,), (head_dim,)):
            expected = f"a float tensor [{channels}] (across heads) or [{head_dim}] (per head)"
            fail(name, expected, describe(weight))
        check_device(name, weight, q)
    if q_weight.shape != k_weight.shape:
        fail("k_weight", f"the shape of q_weight, {list(q_weight.shape)}", describe(k_weight))


def check_sequence(name: str, x: Tensor) -> None:
    """Tokens [B, L, C], float, with at least one channel."""
    if not is_float(x) or x.dim() != 3 or x.shape[2] == 0:
        fail(name, "a float tensor [B, L, C]", describe(x))


def check_rotation(cos: Tensor | None, sin: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Both rotation tables [R, D/2], R at most the length of q and of k, or neither."""
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        fail("cos, sin", "both or neither", f"{describe(cos)} and {describe(sin)}")
    shortest, pairs = min(q.shape[1], k.shape[1]), q.shape[3] // 2
    for name, table in (("cos", cos), ("sin", sin)):
        if not is_float(table) or table.dim() != 2 or table.shape[1] != pairs:
            expected = f"a float tensor [R, {pairs}], one angle per pair of channels"
            fail(name, expected, describe(table))
        if table.shape[0] > shortest:
            fail(name, f"at most {shortest} rows, one per token", describe(table))
        check_device(name, table, q)
    if cos.shape != sin.shape:
        fail("sin", f"the shape of cos, {list(cos.shape)}", describe(sin))


def modulation(name: str, value: Tensor, x: Tensor) -> Tensor:
    """View a scale, shift or gate of x [B, L, C] as [B, 1, C] (per sample) or [B, L, C] (per
    token).

    Args:
        name: For the error message.
        value: [C], [B, C], or [B or 1, L or 1, C], any float dtype.
        x: The tokens.

    Returns:
        The view; differentiable.
    """
    batch, length, channels = x.shape
    if not is_float(value) or not 1 <= value.dim() <= 3 or value.shape[-1] != channels:
        shapes = f"[{channels}], [{batch}, {channels}] or [{batch}, 1 or {length}, {channels}]"
        fail(name, f"a float tensor {shapes}", describe(value))
    check_device(name, value, x)
    if value.dim() == 2:
        value = value[:, None]
    view = value.expand(1, 1, -1) if value.dim() == 1 else value
    if view.shape[0] not in (1, batch) or view.shape[1] not in (1, length):
        fail(name, f"sizes that fit x {list(x.shape)}", describe(value))
    return view if view.shape[0] == batch else view.expand(batch, -1, -1)


def _check_values(name: str, values: list[float]) -> None:
    if not all(map(math.isfinite, values)):
        fail(name, "finite values", str(values))
    if name == "std" and any(value < 0 for value in values):
        fail(name, "values of 0 or above", str(values))


def _is_readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
