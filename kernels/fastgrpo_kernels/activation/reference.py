"""The activation in plain PyTorch: the specification that the kernel must meet, and what serves
float64. Arithmetic is fp32 (float64 for float64 x), rounded once to x's dtype.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .. import checks


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """The specification of `fastgrpo_kernels.bias_gelu`."""
    check_arguments(x, bias)
    dtype = checks.compute_dtype(x)
    biased = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    return F.gelu(biased, approximate="tanh").to(x.dtype)


def check_arguments(x: Tensor, bias: Tensor | None) -> None:
    """Floats [..., C], C at least 1, and [C] on the same device.

    Raises:
        ValueError: they are not.
    """
    if not checks.is_float(x) or x.dim() < 1 or x.shape[-1] == 0:
        checks.fail("x", "a float tensor [..., C]", checks.describe(x))
    if bias is not None:
        if not checks.is_float(bias) or bias.shape != x.shape[-1:]:
            checks.fail("bias", f"a float tensor [{x.shape[-1]}] or None", checks.describe(bias))
        checks.check_device("bias", bias, x)
