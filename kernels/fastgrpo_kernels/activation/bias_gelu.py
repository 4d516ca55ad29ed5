"""GELU in its tanh approximation, with the bias of the linear layer before it.

    h = x + bias      u = sqrt(2 / pi) (h + 0.044715 h^3)
    out = h / 2 (1 + tanh u) = h s        s = sigmoid(2 u)

Shapes: x [..., C], the linear layer's output without its bias; bias [C]. Arithmetic is fp32.

Backward: dx = dout (s + h s (1 - s) 2 du/dh)      dbias = sum over all rows of dx, in fp32

x is kept for the backward, where autograd keeps h, of the same size, without this op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import call, register, select_backend
from . import reference, triton_bias_gelu  # noqa: F401  the second registers the Triton ops


def _fake(x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x)


def _backward_fake(
    dout: Tensor, x: Tensor, bias: Tensor | None, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None or not needs_bias else bias.new_empty(bias.shape)
    return torch.empty_like(x), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(backend: str, ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    needs_bias = ctx.needs_input_grad[1]
    dx, dbias = call(backend, "bias_gelu_backward", dout.contiguous(), x, bias, needs_bias)
    return dx, dbias if needs_bias else None


register("bias_gelu", _fake, _backward, _save)
register("bias_gelu_backward", _backward_fake)


def bias_gelu(x: Tensor, bias: Tensor | None, *, backend: str | None = None) -> Tensor:
    """GELU(x + bias), in the tanh approximation.

    Differentiable in x and bias; each gradient has its input's dtype, and the sum over rows is fp32
    and in a fixed order. A row's bits depend on nothing else in the batch; with and without
    gradients they are the same.

    In diffusers 0.42: `GELU` (proj, then gelu with approximate="tanh") in the feed-forward of
    WanTransformerBlock and HunyuanVideoTransformerBlock, and `act_mlp` after `proj_mlp` in
    HunyuanVideoSingleTransformerBlock.

    Args:
        x: [..., C], any float dtype.
        bias: [C], any float dtype; None where the layer before has added it.
        backend: a forced backend, see `dispatch.py`.

    Returns:
        x's shape and dtype, contiguous, rounded once from fp32 (float64 for float64 x).
    """
    selected = select_backend("bias_gelu", x, backend)
    if selected == "reference":
        return reference.bias_gelu(x, bias)
    reference.check_arguments(x, bias)
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.float()
    out: Tensor = call(selected, "bias_gelu", x.contiguous(), bias)
    return out
