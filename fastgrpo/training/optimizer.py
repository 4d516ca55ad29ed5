"""The optimizer: torch's fused AdamW, or NVIDIA apex's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastgrpo.config import UpdateConfig
from fastgrpo.errors import UserError


def make_optimizer(parameters: list[nn.Parameter], cfg: UpdateConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW, or NVIDIA apex's FusedAdam for `optimizer: apex_fused_adam`.

    Raises:
        UserError: NVIDIA apex is not installed.
    """
    options = {"lr": cfg.learning_rate, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)  # type: ignore[arg-type]
    optimizer: torch.optim.Optimizer = import_fused_adam()(parameters, adam_w_mode=True, **options)
    return optimizer


def import_fused_adam() -> Any:
    """NVIDIA apex's FusedAdam (PyPI's package of that name is something else).

    Raises:
        UserError: NVIDIA apex is not installed.
    """
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(
            "update.optimizer: apex_fused_adam needs NVIDIA apex, built from NVIDIA's source with "
            f"its CUDA extensions; the `apex` on PyPI is another package ({error}). Use adamw, "
            "torch's own fused optimizer"
        ) from error
    return FusedAdam
