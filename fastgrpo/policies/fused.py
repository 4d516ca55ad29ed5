"""Whether the fused operations of fastgrpo_kernels do the pointwise work of a transformer."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from fastgrpo_kernels import dispatch, patch

from fastgrpo.errors import UserError


def fused_serves(device: torch.device) -> bool:
    """True where the fused operations are faster than diffusers' own: compiled for the device
    (Triton on a GPU, C++ on a CPU), not their reference in plain PyTorch.
    """
    return _backend(device) != "reference"


def fuse(transformer: Any, fused: bool | Literal["auto"], device: torch.device) -> bool:
    """Put the fused operations into the blocks of a transformer, in place, if `fused` says so.

    Args:
        transformer: A model of diffusers.
        fused: `policy.fused`.
        device: Where it will run. On the meta device nothing runs.

    Returns:
        Whether they are in. Warns of operations that are slower than diffusers' own, and where
        `auto` leaves them out because they do not know this transformer.

    Raises:
        UserError: The operations do not know this transformer, and `fused` is true.
    """
    serves = fused_serves(device)
    if not (serves if fused == "auto" else fused):
        return False
    if not serves and device.type != "meta":
        reason = dispatch.unsupported_reason(
            "triton" if device.type == "cuda" else "cpp", "ln_modulate", _probe(device)
        )
        warnings.warn(
            "policy.fused: expected compiled operations for true, got only their reference in "
            f"plain PyTorch on {device.type}, slower than false or auto ({reason})",
            stacklevel=2,
        )
    try:
        patch(transformer)
    except ValueError as error:
        if fused != "auto":
            raise UserError(f"policy.fused: {error}; set it to false") from error
        warnings.warn(f"policy.fused: auto takes diffusers' own operations: {error}", stacklevel=2)
        return False
    return True


def _backend(device: torch.device) -> str:
    return dispatch.select_backend("ln_modulate", _probe(device))


def _probe(device: torch.device) -> torch.Tensor:
    return torch.empty(0, device=device)
