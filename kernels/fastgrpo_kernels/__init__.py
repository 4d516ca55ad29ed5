"""The operations of GRPO on flow-matching models, and the pointwise work of their transformers.

They need torch, and Triton on a GPU. `sde/` has the step of a sampler, its log-probability and the
loss; `norm/` and `activation/` the pointwise work of a transformer's block, `attention/` its
attention over few tokens; `random/` the noise.
The `reference.py` of each folder is the specification; `dispatch.py` selects the backend of a call:
Triton, CUDA C++, C++ on the CPU, or the reference. README.md beside this folder shows how to use
them in another trainer, and states which results have equal bits. The method: docs/method.md,
sections 1 and 2.
"""

from __future__ import annotations

from .activation.bias_gelu import bias_gelu
from .attention.few_tokens import few_token_attention
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
    "bias_gelu",
    "branch_gradient",
    "clipped_ratio_loss",
    "few_token_attention",
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
