"""What every operation checks of its arguments: ValueErrors that say what was expected and what
got.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

Coefficient = float | Tensor
"""A number, a scalar tensor, or a tensor [B]; any float dtype (the table's float64 is rounded once,
here).
"""

CFG_GRADS = ("both", "cond_only")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WORD = 0xFFFFFFFF


def describe(value: object) -> str:
    """What came, for an error message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def compute_dtype(samples: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, float32 for every other."""
    return torch.float64 if samples.dtype == torch.float64 else torch.float32


def check_samples(name: str, samples: Tensor) -> None:
    """A float tensor [B, ...] with at least one element per sample."""
    if not isinstance(samples, Tensor) or samples.dtype not in _FLOATS or samples.dim() < 1:
        raise ValueError(
            f"{name}: expected a float tensor with the batch first, got {describe(samples)}"
        )
    if 0 in samples.shape[1:]:
        raise ValueError(
            f"{name}: expected at least one element per sample, got shape {list(samples.shape)}"
        )


def check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """A float tensor of the shape and on the device of another."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS or tensor.shape != like.shape:
        raise ValueError(
            f"{name}: expected a float tensor {list(like.shape)}, got {describe(tensor)}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected it on {like.device}, got on {tensor.device}")


def check_vector(name: str, tensor: Tensor, batch: int) -> None:
    """A float tensor [B], on any device."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS or tensor.shape != (batch,):
        raise ValueError(f"{name}: expected a float tensor [{batch}], got {describe(tensor)}")


def check_stored(next_latents: Tensor, latents: Tensor) -> None:
    """x', stored in the shape, dtype and place of x."""
    check_like("next_latents", next_latents, latents)
    if next_latents.dtype != latents.dtype:
        raise ValueError(
            f"next_latents: expected the dtype of latents, {latents.dtype}, got {next_latents.dtype}"
        )


def check_guidance(
    velocity: Tensor, velocity_uncond: Tensor | None, guidance_scale: float, cfg_grad: str
) -> None:
    """Both branches of classifier-free guidance, or one and a scale of 1."""
    if cfg_grad not in CFG_GRADS:
        raise ValueError(f"cfg_grad: expected one of {', '.join(CFG_GRADS)}, got {cfg_grad!r}")
    check_number("guidance_scale", guidance_scale, "that is finite", math.isfinite)
    if velocity_uncond is not None:
        check_like("velocity_uncond", velocity_uncond, velocity)
    elif guidance_scale != 1.0:
        raise ValueError(
            f"velocity_uncond: expected a tensor for guidance_scale {guidance_scale}, got None"
        )


def check_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_range: float, adv_clip: float
) -> None:
    """The arguments of the clipped loss: three vectors [B] and two bounds."""
    check_samples("log_probs", log_probs)
    for name, tensor in (
        ("log_probs", log_probs),
        ("old_log_probs", old_log_probs),
        ("advantages", advantages),
    ):
        check_vector(name, tensor, log_probs.shape[0])
    check_bounds(clip_range, adv_clip)


def check_bounds(clip_range: float, adv_clip: float) -> None:
    """The two bounds of the clipped loss."""
    check_number("clip_range", clip_range, "in [0, 1)", lambda eps: 0.0 <= eps < 1.0)
    check_number("adv_clip", adv_clip, "above 0", lambda bound: bound > 0.0)


def check_number(name: str, value: float, wanted: str, valid: Callable[[float], bool]) -> None:
    """A number for which `valid` holds."""
    if not _is_number(value) or not valid(value):
        raise ValueError(f"{name}: expected a number {wanted}, got {describe(value)}")


def coefficient(
    name: str, value: Coefficient, batch: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """A coefficient as [B] in the dtype of the arithmetic.

    The values of a device tensor are not checked, for which the host would have to wait; nor are
    they under torch.compile.
    """
    if isinstance(value, Tensor):
        if value.shape not in ((), (batch,)) or value.dtype not in _FLOATS:
            raise ValueError(
                f"{name}: expected a number or a float tensor [{batch}], got {describe(value)}"
            )
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_coefficients(name, value.reshape(-1).tolist())
        return value.detach().to(device, dtype, non_blocking=True).expand(batch).contiguous()
    if not _is_number(value):
        raise ValueError(
            f"{name}: expected a number or a float tensor [{batch}], got {describe(value)}"
        )
    _check_coefficients(name, [value])
    return torch.full((batch,), float(value), dtype=dtype, device=device)


def seed_vector(seeds: Tensor, batch: int | None, device: torch.device | str | None) -> Tensor:
    """Noise seeds as int64 [B], of any B for None, on the device, or where they are for None."""
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.dim() != 1:
        raise ValueError(f"seeds: expected an int64 tensor [B], got {describe(seeds)}")
    if batch is not None and seeds.shape[0] != batch:
        raise ValueError(f"seeds: expected one per sample, [{batch}], got {describe(seeds)}")
    return seeds.to(seeds.device if device is None else device, non_blocking=True).contiguous()


def step_vector(step: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """Step numbers as int64 [B] on the device. The values of a device tensor are not checked, see
    `coefficient`.
    """
    if isinstance(step, Tensor):
        if step.dtype != torch.int64 or step.shape != (batch,):
            raise ValueError(
                f"step: expected an int or an int64 tensor [{batch}], got {describe(step)}"
            )
        if (
            step.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not all(0 <= value <= _WORD for value in step.tolist())
        ):
            raise ValueError(f"step: expected values in [0, 2^32), got {step.tolist()}")
        return step.to(device, non_blocking=True).contiguous()
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(
            f"step: expected an int or an int64 tensor [{batch}], got {describe(step)}"
        )
    if not 0 <= step <= _WORD:
        raise ValueError(f"step: expected a value in [0, 2^32), got {step}")
    return torch.full((batch,), step, dtype=torch.int64, device=device)


def check_transition(
    latents: Tensor,
    velocity: Tensor,
    velocity_uncond: Tensor | None,
    guidance_scale: float,
    cfg_grad: str,
) -> None:
    """The tensors that the ops of a transition share."""
    check_samples("latents", latents)
    check_like("velocity", velocity, latents)
    check_guidance(velocity, velocity_uncond, guidance_scale, cfg_grad)


def coefficients(
    a: Coefficient, b: Coefficient, std: Coefficient, latents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and std of a transition, each [B] in the dtype of its arithmetic."""
    batch, device, dtype = latents.shape[0], latents.device, compute_dtype(latents)
    return (
        coefficient("a", a, batch, device, dtype),
        coefficient("b", b, batch, device, dtype),
        coefficient("std", std, batch, device, dtype),
    )


def branch_factor(
    seeds: Tensor,
    advantages: Tensor,
    b: Coefficient,
    std: Coefficient,
    shape: Sequence[int],
    guidance_scale: float,
    scale: float,
    adv_clip: float,
    cfg_grad: str,
    normalized: bool,
    device: torch.device | str | None,
) -> tuple[Tensor, torch.device]:
    """Check the arguments of `branch_gradient`; what it multiplies the noise by, fp32 [B], and its
    device.
    """
    seeds = seed_vector(seeds, None, device)
    batch, target = seeds.shape[0], seeds.device
    check_vector("advantages", advantages, batch)
    if cfg_grad not in CFG_GRADS:
        raise ValueError(f"cfg_grad: expected one of {', '.join(CFG_GRADS)}, got {cfg_grad!r}")
    check_number("guidance_scale", guidance_scale, "that is finite", math.isfinite)
    check_number("scale", scale, "that is finite", math.isfinite)
    check_number("adv_clip", adv_clip, "above 0", lambda bound: bound > 0.0)
    if not shape or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"shape: expected positive sizes of one sample, got {tuple(shape)}")
    # fp32 first, as the loss rounds them, then float64 up to the last rounding.
    b_B = coefficient("b", b, batch, target, torch.float32).double()
    std_B = coefficient("std", std, batch, target, torch.float32).double()
    advantage = (
        advantages.detach()
        .to(target, torch.float32, non_blocking=True)
        .clamp(-adv_clip, adv_clip)
        .double()
    )
    weight = torch.where(std_B > 0, 1.0 / std_B, 0.0) if normalized else 2.0 * std_B
    return (-scale * advantage * b_B * weight / math.prod(shape)).float(), target


def check_qk(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> None:
    """Queries and keys [B, L, H, D] and their RMSNorm weights, both [H * D] or both [D]."""
    for name, x in (("q", q), ("k", k)):
        if (
            not isinstance(x, Tensor)
            or x.dtype not in _FLOATS
            or x.dim() != 4
            or 0 in x.shape[2:]
            or x.shape[3] % 2
        ):
            raise ValueError(
                f"{name}: expected a float tensor [B, L, H, D] with an even D, got {describe(x)}"
            )
    if (
        k.dtype != q.dtype
        or k.device != q.device
        or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:])
    ):
        raise ValueError(
            f"k: expected the batch, heads, channels, dtype and device of q, {describe(q)} on {q.device}, "
            f"got {describe(k)} on {k.device}"
        )
    heads, channels = q.shape[2:]
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if (
            not isinstance(weight, Tensor)
            or weight.dtype not in _FLOATS
            or weight.shape not in ((heads * channels,), (channels,))
        ):
            raise ValueError(
                f"{name}: expected a float tensor [{heads * channels}] (across heads) or [{channels}] (per head), "
                f"got {describe(weight)}"
            )
        if weight.device != q.device:
            raise ValueError(f"{name}: expected it on {q.device}, got on {weight.device}")
    if q_weight.shape != k_weight.shape:
        raise ValueError(
            f"k_weight: expected the shape of q_weight, {list(q_weight.shape)}, got {describe(k_weight)}"
        )


def check_sequence(name: str, x: Tensor) -> None:
    """Tokens [B, L, C], float, with at least one channel."""
    if not isinstance(x, Tensor) or x.dtype not in _FLOATS or x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"{name}: expected a float tensor [B, L, C], got {describe(x)}")


def check_rotation(cos: Tensor | None, sin: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Both rotation tables [R, D/2] with R not above the lengths of q and k, or none."""
    if (cos is None) != (sin is None):
        raise ValueError(
            f"cos, sin: expected both or neither, got {describe(cos)} and {describe(sin)}"
        )
    shortest, pairs = min(q.shape[1], k.shape[1]), q.shape[3] // 2
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None:
            continue
        if (
            not isinstance(table, Tensor)
            or table.dtype not in _FLOATS
            or table.dim() != 2
            or table.shape[1] != pairs
        ):
            raise ValueError(
                f"{name}: expected a float tensor [R, {pairs}], one angle a pair of channels, got {describe(table)}"
            )
        if table.shape[0] > shortest:
            raise ValueError(
                f"{name}: expected at most {shortest} rows, one a token, got {describe(table)}"
            )
        if table.device != q.device:
            raise ValueError(f"{name}: expected it on {q.device}, got on {table.device}")
    if cos is not None and sin is not None and cos.shape != sin.shape:
        raise ValueError(f"sin: expected the shape of cos, {list(cos.shape)}, got {describe(sin)}")


def modulation(name: str, value: Tensor, x: Tensor) -> Tensor:
    """A scale, shift or gate of x [B, L, C] as a view [B, 1, C] (one a sample) or [B, L, C] (one a
    token); differentiable.

    value: [C], [B, C], or [B or 1, L or 1, C], any float dtype.
    """
    batch, length, channels = x.shape
    if (
        not isinstance(value, Tensor)
        or value.dtype not in _FLOATS
        or not 1 <= value.dim() <= 3
        or value.shape[-1] != channels
    ):
        raise ValueError(
            f"{name}: expected a float tensor [{channels}], [{batch}, {channels}] or [{batch}, 1 or {length}, {channels}], "
            f"got {describe(value)}"
        )
    if value.device != x.device:
        raise ValueError(f"{name}: expected it on {x.device}, got on {value.device}")
    view = (
        value[:, None]
        if value.dim() == 2
        else value.expand(1, 1, -1)
        if value.dim() == 1
        else value
    )
    if view.shape[0] not in (1, batch) or view.shape[1] not in (1, length):
        raise ValueError(
            f"{name}: expected sizes that fit x {list(x.shape)}, got {describe(value)}"
        )
    return view.expand(batch, -1, -1)


def _check_coefficients(name: str, values: list[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{name}: expected finite values, got {values}")
    if name == "std" and any(value < 0 for value in values):
        raise ValueError(f"std: expected values of 0 or above, got {values}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
