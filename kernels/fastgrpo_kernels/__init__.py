"""The operations of GRPO on flow-matching models, and the pointwise work of their transformers;
needs torch, and triton on a GPU.

`reference.py` is the specification of every operation; `dispatch.py` chooses what serves a call:
CUDA C++, its CPU path, Triton or the reference; `philox.py` is the noise. How to use them in
another trainer: kernels/README.md. Method: Self-Paced GRPO (method.md sections 1 and 2),
DanceGRPO's and Flow-GRPO's transition as one affine step.
"""

from __future__ import annotations

from .norm.gate_residual_ln_modulate import (
    gate_residual,
    gate_residual_ln_modulate,
    ln_modulate,
)
from .norm.qk_norm_rope import qk_norm_rope
from .patching import patch
from .random.philox import gaussian_noise
from .sde.branch_gradient import branch_gradient
from .sde.log_prob import sde_log_prob
from .sde.loss import clipped_ratio_loss, grpo_loss
from .sde.reference import GRPOStats, gaussian_kl, guided_velocity
from .sde.step import sde_step
from .sde.transition import Transition

__all__ = [
    "GRPOStats",
    "Transition",
    "branch_gradient",
    "clipped_ratio_loss",
    "gate_residual",
    "gate_residual_ln_modulate",
    "gaussian_kl",
    "gaussian_noise",
    "grpo_loss",
    "guided_velocity",
    "ln_modulate",
    "patch",
    "qk_norm_rope",
    "sde_log_prob",
    "sde_step",
]
