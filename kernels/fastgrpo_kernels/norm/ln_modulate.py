"""LayerNorm and modulation in one pass, forward and backward: out = (x - mean) / sqrt(var + eps) *
(1 + scale) + shift.

Shapes: x [B, L, C], B samples of L tokens of C channels; mean and variance are over C. One
program a row forward, the row in its registers, so the variance is of the differences (two
passes, one read). Arithmetic is fp32 without fused multiply-adds, in an order that x's dtype and
C decide: the fused op of `gate_residual.py`, which shares `layer_norm`, gives the same bits.

Backward, with xhat = (x - mean) rstd and g = dout (1 + scale):
    dx = rstd (g - mean(g) - xhat mean(g xhat))      dscale = sum over L of dout xhat      dshift
    = sum over L of dout
A program walks through the rows of one part of L, keeps its share of dscale and dshift in
registers, and `column_sum` adds the parts up. The parts depend on L alone, and no gradient on
what else is in the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import jit, select_backend, tl, triton, triton_op
from ..triton_reduce import column_sum
from . import reference

FORWARD_VALUES, BACKWARD_VALUES = 40, 16
"""Channels of a row in one thread's registers, at most."""
MAX_PARTS = 528
"""Of L in a backward: four programs for each of an H100's 132 SMs."""
MIN_ROWS = 4
"""Of a part: writing and reading its sums costs as much as several rows."""
PREFETCH_BYTES = 24 * 1024
"""Of shared memory for each warp of a backward program: eight such warps live on an H100's SM at a
time, by their registers.
"""


@jit
def _ln_modulate_fwd_kernel(
    x,
    scale,
    shift,
    out,
    means,
    rstds,
    L,
    scale_b,
    scale_l,
    shift_b,
    shift_l,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    row, sample, token = (
        program.to(tl.int64),
        (program // L).to(tl.int64),
        (program % L).to(tl.int64),
    )
    cols = tl.max_contiguous(tl.arange(0, BLOCK), WIDTH)
    inside = cols < C
    x_row = load_once(x + row * C, cols, inside)
    mean, rstd, normed = layer_norm(x_row, inside, eps, C)
    scale_row = load_shared(scale + sample * scale_b + token * scale_l, cols, inside)
    shift_row = load_shared(shift + sample * shift_b + token * shift_l, cols, inside)
    tl.store(out + row * C + cols, normed * (1.0 + scale_row) + shift_row, mask=inside)
    tl.store(means + row, mean)
    tl.store(rstds + row, rstd)


@jit
def _ln_modulate_bwd_kernel(
    dout,
    x,
    means,
    rstds,
    scale,
    dx,
    dscale,
    dshift,
    L,
    num_parts,
    rows_per_part,
    scale_b,
    scale_l,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    NEEDS_PARAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    sample, first = (program // num_parts).to(tl.int64), (program % num_parts) * rows_per_part
    cols = tl.arange(0, BLOCK)
    inside = cols < C
    scale += sample * scale_b
    scale_row = load_row(scale, cols, inside)
    dscale_sum = tl.zeros([BLOCK], tl.float32)
    dshift_sum = tl.zeros([BLOCK], tl.float32)
    for token in tl.range(first, tl.minimum(first + rows_per_part, L), num_stages=STAGES):
        row = sample * L + token
        if TOKENS:
            scale_row = load_row(scale + (row - sample * L) * scale_l, cols, inside)
        x_row = load_row(x + row * C, cols, inside)
        dout_row = load_row(dout + row * C, cols, inside)
        rstd = tl.load(rstds + row)
        normed = tl.where(inside, (x_row - tl.load(means + row)) * rstd, 0.0)
        if NEEDS_PARAMS:
            if TOKENS:
                tl.store(dscale + row * C + cols, dout_row * normed, mask=inside)
                tl.store(dshift + row * C + cols, dout_row, mask=inside)
            else:
                dscale_sum += dout_row * normed
                dshift_sum += dout_row
        tl.store(
            dx + row * C + cols,
            layer_norm_grad(dout_row * (1.0 + scale_row), normed, rstd, C),
            mask=inside,
        )
    if NEEDS_PARAMS and not TOKENS:
        part = program.to(tl.int64) * C
        tl.store(dscale + part + cols, dscale_sum, mask=inside)
        tl.store(dshift + part + cols, dshift_sum, mask=inside)


# -------- what `gate_residual.py` also uses has no underscore


@jit
def load_row(pointer, cols, inside):
    """A row in fp32, 0 outside."""
    return tl.load(pointer + cols, mask=inside, other=0.0).to(tl.float32)


@jit
def load_once(pointer, cols, inside):
    """A row that no other program reads: it may leave the L1 cache first."""
    return tl.load(pointer + cols, mask=inside, other=0.0, eviction_policy="evict_first").to(
        tl.float32
    )


@jit
def load_shared(pointer, cols, inside):
    """A row that many programs read."""
    return tl.load(pointer + cols, mask=inside, other=0.0, eviction_policy="evict_last").to(
        tl.float32
    )


@jit
def layer_norm(x, inside, eps, C: tl.constexpr):
    """mean, 1 / sqrt(var + eps) and the normalised row of x, which is fp32 and 0 outside."""
    mean = tl.div_rn(tl.sum(x, axis=0), C * 1.0)
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, axis=0), C * 1.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    return mean, rstd, centred * rstd


@jit
def layer_norm_grad(dnormed, normed, rstd, C: tl.constexpr):
    """Gradient of a row before its LayerNorm; both rows are fp32 and 0 outside."""
    mean_grad = tl.div_rn(tl.sum(dnormed, axis=0), C * 1.0)
    mean_dot = tl.div_rn(tl.sum(dnormed * normed, axis=0), C * 1.0)
    return (dnormed - mean_grad - normed * mean_dot) * rstd


def num_warps(C: int, values: int) -> int:
    """The fewest warps whose threads hold at most `values` of a row's C channels each; 16 at most."""
    return min(triton.next_power_of_2(triton.cdiv(C, 32 * values)), 16)


def forward_shape(x: Tensor) -> dict[str, Any]:
    """Constants of a forward kernel.

    WIDTH, the channels that a thread loads at once, is x's for every operand: the compiler lays
    a row out by the widest load of the kernel, the order of the row's sums follows the layout,
    and no other operand's dtype may change it.
    """
    C = x.shape[2]
    shape = {"C": C, "BLOCK": triton.next_power_of_2(C), "WIDTH": 16 // x.element_size()}
    return {**shape, "num_warps": num_warps(C, FORWARD_VALUES), "enable_fp_fusion": False}


def backward_shape(
    x: Tensor, tokens: bool, reduces: bool, values: int, operands: list[Tensor]
) -> tuple[int, int, dict[str, Any]]:
    """Parts of L, rows in each, and the constants of a backward kernel. Without a sum over L every
    row is a part.

    operands: what its loop reads a row of at a time; the next rows come in while one is worked
    on, as many as fit.
    """
    L, C = x.shape[1:]
    rows = max(MIN_ROWS, triton.cdiv(L, MAX_PARTS)) if reduces and not tokens else 1
    block, warps = triton.next_power_of_2(C), num_warps(C, values)
    space = (
        getattr(
            torch.cuda.get_device_properties(x.device), "shared_memory_per_block_optin", 48 * 1024
        )
        if x.is_cuda
        else 227 * 1024
    )
    ahead = min(warps * PREFETCH_BYTES, space - 8 * 1024) // (
        block * sum(operand.element_size() for operand in operands)
    )
    shape = {
        "C": C,
        "BLOCK": block,
        "TOKENS": tokens,
        "STAGES": 1 + min(ahead, 2) if rows > 1 else 1,
    }
    return triton.cdiv(L, rows), rows, {**shape, "num_warps": warps, "enable_fp_fusion": False}


def aligned(x: Tensor) -> Tensor:
    """x contiguous and at a multiple of 16 bytes.

    The compiled code, and with it the order of sums, depends on alignment, and must not on a
    sample's place in a batch.
    """
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def strided(value: Tensor) -> tuple[Tensor, int, int]:
    """A scale, shift or gate [B, 1 or L, C] with the strides of its samples and tokens.

    It is read where it lies if its strides are multiples of 16 elements, else copied (see
    `aligned`).
    """
    steps = [
        step if size > 1 else 0
        for size, step in zip(value.shape[:2], value.stride()[:2], strict=True)
    ]
    C = value.shape[2]
    if (
        C % 16 == 0
        and value.stride(2) == 1
        and not any(step % 16 for step in steps)
        and value.data_ptr() % 16 == 0
    ):
        return value, steps[0], steps[1]
    return aligned(value), value.shape[1] * C, C if value.shape[1] != 1 else 0


def common_tokens(x: Tensor, **given: Tensor | None) -> list[Tensor]:
    """Each scale, shift or gate as a view [B, 1, C], or [B, L, C] if any differs between tokens;
    None is left out.

    Autograd sums over what is expanded here. It does so in fp32: 16-bit values are widened
    first.
    """
    values = {name: value for name, value in given.items() if value is not None}
    views = {name: checks.modulation(name, value, x) for name, value in values.items()}
    tokens = x.shape[1] if any(view.shape[1] != 1 for view in views.values()) else 1
    size = x.shape[0] * tokens * x.shape[2]
    for name, value in values.items():
        if value.requires_grad and value.element_size() == 2 and value.numel() < size:
            views[name] = checks.modulation(name, value.float(), x)
    return [view.expand(-1, tokens, -1) for view in views.values()]


def row_values(x: Tensor) -> Tensor:
    """One fp32 value for each row of x [B, L, C], not yet written: [B, L]."""
    return torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)


def new_gradients(
    x: Tensor, dtypes: list[torch.dtype], needed: list[bool], tokens: bool, num_parts: int
) -> list[Tensor]:
    """What a backward kernel writes for each scale, shift or gate: gradients [B, L, C] in these
    dtypes, or partial sums fp32 [B, num_parts, C]; empty, [0], for one that is not needed.
    """
    B, L, C = x.shape
    shape = (B, L, C) if tokens else (B, num_parts, C)
    return [
        torch.empty(
            shape if wanted else (0,),
            dtype=dtype if tokens or not wanted else torch.float32,
            device=x.device,
        )
        for dtype, wanted in zip(dtypes, needed, strict=True)
    ]


def finish(written: list[Tensor], dtypes: list[torch.dtype], tokens: bool) -> list[Tensor]:
    """The gradients [B, 1 or L, C], from what the kernel wrote."""
    return [
        tensor if tokens or tensor.dim() == 1 else column_sum(tensor, dtype)[:, None]
        for tensor, dtype in zip(written, dtypes, strict=True)
    ]


# -------- the operation


@triton_op("ln_modulate")
def _ln_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, L, C]; scale, shift [B, 1 or L, C]. The result, and mean and 1 / standard deviation of
    each row, fp32 [B, L].
    """
    x = aligned(x)
    out, means, rstds = torch.empty_like(x), row_values(x), row_values(x)
    if x.numel():
        (scale, scale_b, scale_l), (shift, shift_b, shift_l) = strided(scale), strided(shift)
        with torch.cuda.device_of(x):
            _ln_modulate_fwd_kernel[(means.numel(),)](
                x,
                scale,
                shift,
                out,
                means,
                rstds,
                x.shape[1],
                scale_b,
                scale_l,
                shift_b,
                shift_l,
                eps,
                **forward_shape(x),
            )
    return out, means, rstds


@_ln_modulate.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), row_values(x), row_values(x)


@triton_op("ln_modulate_backward")
def _ln_modulate_backward(
    dout: Tensor,
    x: Tensor,
    means: Tensor,
    rstds: Tensor,
    scale: Tensor,
    shift_dtype: torch.dtype,
    needs_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and shift; the last two are empty, [0], unless needs_params."""
    x, dout = aligned(x), aligned(dout)
    dx, tokens, dtypes = torch.empty_like(x), scale.shape[1] != 1, [scale.dtype, shift_dtype]
    num_parts, rows, shape = backward_shape(x, tokens, needs_params, BACKWARD_VALUES, [dout, x])
    written = new_gradients(x, dtypes, [needs_params] * 2, tokens, num_parts)
    if x.numel():
        scale, scale_b, scale_l = strided(scale)
        with torch.cuda.device_of(x):
            _ln_modulate_bwd_kernel[(x.shape[0] * num_parts,)](
                dout,
                x,
                means,
                rstds,
                scale,
                dx,
                *written,
                x.shape[1],
                num_parts,
                rows,
                scale_b,
                scale_l,
                NEEDS_PARAMS=needs_params,
                **shape,
            )
    dscale, dshift = finish(written, dtypes, tokens)
    return dx, dscale, dshift


@_ln_modulate_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    means: Tensor,
    rstds: Tensor,
    scale: Tensor,
    shift_dtype: torch.dtype,
    needs_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = scale.shape if needs_params else (0,)
    return x.new_empty(x.shape), scale.new_empty(shape), scale.new_empty(shape, dtype=shift_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, scale, shift, _ = inputs
    ctx.save_for_backward(x, *output[1:], scale)
    ctx.shift_dtype = shift.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None
    needs_params = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dscale, dshift = _ln_modulate_backward(
        dout, *ctx.saved_tensors, ctx.shift_dtype, needs_params
    )
    return (dx, dscale, dshift, None) if needs_params else (dx, None, None, None)


_ln_modulate.register_autograd(_backward, setup_context=_save)


def ln_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """LN(x) (1 + scale) + shift: LayerNorm over the channels in fp32, without weights of its own,
    and the modulation.

    x: [B, L, C] tokens, any float dtype. scale, shift: [C], [B, C], or [B or 1, L or 1, C] (one
    a token: Wan 2.2 ti2v), any float dtypes; slices and chunks of a larger tensor are read where
    they lie. eps: added to the variance. backend: a forced backend, see `dispatch.py`.
    Returns x's shape and dtype, rounded once from fp32 (float64 for float64 x). Differentiable
    in x, scale and shift; each gradient has its input's dtype, and sums over tokens are fp32. A
    sample's bits do not depend on the rest of the batch. ValueError: a shape, dtype or device
    that does not fit, or a backend that cannot serve.

    In diffusers 0.42: `norm1`, `norm3` and `norm_out` with what follows them in
    WanTransformerBlock.forward and WanTransformer3DModel.forward; for HunyuanVideo the last
    lines of AdaLayerNormZero, AdaLayerNormZeroSingle and AdaLayerNormContinuous, and `norm2` and
    `norm2_context` with their modulation in HunyuanVideoTransformerBlock.forward. Wan's affine
    `norm2` (before the cross-attention) is scale = weight - 1, shift = bias.
    """
    if select_backend("ln_modulate", x, backend) == "reference":
        return reference.ln_modulate(x, scale, shift, eps=eps)
    checks.check_sequence("x", x)
    scale, shift = common_tokens(x, scale=scale, shift=shift)
    return _ln_modulate(x.contiguous(), scale, shift, eps)[0]
