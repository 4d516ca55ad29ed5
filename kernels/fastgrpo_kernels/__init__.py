"""The operations of GRPO on flow-matching models; needs torch and nothing else.

`reference.py` is the specification of every operation and the path a CPU takes; `philox.py` is the noise.
Method: Self-Paced GRPO (method.md sections 1 and 2), DanceGRPO's and Flow-GRPO's transition as one affine step.
"""

from __future__ import annotations

from fastgrpo_kernels.philox import gaussian_noise
from fastgrpo_kernels.reference import (
    GRPOStats,
    clipped_ratio_loss,
    gaussian_kl,
    grpo_loss,
    guided_velocity,
    sde_log_prob,
    sde_step,
)

__all__ = [
    "GRPOStats",
    "clipped_ratio_loss",
    "gaussian_kl",
    "gaussian_noise",
    "grpo_loss",
    "guided_velocity",
    "sde_log_prob",
    "sde_step",
]
