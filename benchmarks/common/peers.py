"""What an operation is compared with: the same stretch as its users write it today, eagerly, in
torch's operations.

The samplers' steps as DanceGRPO and Flow-GRPO write them; the transformer's stretches as the
blocks of diffusers 0.42 do. `torch.compile` of these is the second peer. They are not
`fastgrpo_kernels.sde.reference`, which also makes counter-based noise and exact sums and is slower
for it.

Every function takes the inputs of its case in ops.py as a dict; a branch that is absent (no
classifier-free guidance) has no key.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

GUIDANCE = 5.0
CLIP_RANGE, ADV_CLIP = 1e-4, 5.0

Inputs = dict[str, Tensor]


def _per_sample(coefficient: Tensor, latents: Tensor) -> Tensor:
    return coefficient.view(-1, *[1] * (latents.dim() - 1))


def _mean(inputs: Inputs) -> Tensor:
    velocity, uncond, x = (
        inputs["velocity"].float(),
        inputs.get("velocity_uncond"),
        inputs["latents"],
    )
    if uncond is not None:
        velocity = uncond.float() + GUIDANCE * (velocity - uncond.float())
    return _per_sample(inputs["a"], x) * x + _per_sample(inputs["b"], x) * velocity


def log_prob(std: Tensor, next_latents: Tensor, mean: Tensor) -> Tensor:
    """Log-probability of each sample's transition as a mean over elements (Eq. 2)."""
    std = _per_sample(std, next_latents)
    found = (
        -((next_latents.detach() - mean) ** 2) / (2 * std**2)
        - torch.log(std)
        - math.log(math.sqrt(2 * math.pi))
    )
    return found.flatten(1).mean(1)


def sde_step(inputs: Inputs) -> tuple[Tensor, ...]:
    """Guidance, mean, torch's own noise, log-probability."""
    mean = _mean(inputs)
    next_latents = mean + _per_sample(inputs["std"], mean) * torch.randn_like(mean)
    return next_latents, log_prob(inputs["std"], next_latents, mean)


def sde_log_prob(inputs: Inputs) -> tuple[Tensor, ...]:
    """The log-probability of a stored transition."""
    return (log_prob(inputs["std"], inputs["next_latents"], _mean(inputs)),)


def clipped_ratio_loss(inputs: Inputs) -> tuple[Tensor, ...]:
    """DanceGRPO's loss and the numbers it logs."""
    advantages = inputs["advantages"].clamp(-ADV_CLIP, ADV_CLIP)
    ratio = torch.exp(inputs["log_probs"] - inputs["old_log_probs"])
    clipped_ratio = torch.clamp(ratio, 1.0 - CLIP_RANGE, 1.0 + CLIP_RANGE)
    loss = torch.mean(torch.maximum(-advantages * ratio, -advantages * clipped_ratio))
    clip_fraction = (torch.abs(ratio - 1.0) > CLIP_RANGE).float().mean()
    approx_kl = 0.5 * torch.mean((inputs["log_probs"] - inputs["old_log_probs"]) ** 2)
    return loss, clip_fraction.detach(), approx_kl.detach()


def grpo_loss(inputs: Inputs) -> tuple[Tensor, ...]:
    """The two in a row."""
    (log_probs,) = sde_log_prob(inputs)
    return clipped_ratio_loss({**inputs, "log_probs": log_probs})


def branch_gradient(inputs: Inputs) -> tuple[Tensor, ...]:
    """Noise of torch's own, scaled, in the dtype of the velocities."""
    x = inputs["latents"]
    factor = -inputs["advantages"] * inputs["b"] / (inputs["std"] * x[0].numel())
    gradient = _per_sample(factor, x) * torch.randn_like(x)
    if "velocity_uncond" not in inputs:
        return (gradient.to(inputs["velocity"].dtype),)
    cond = GUIDANCE * gradient
    return cond.to(inputs["velocity"].dtype), (gradient - cond).to(inputs["velocity"].dtype)


def ln_modulate_wan(inputs: Inputs) -> tuple[Tensor, ...]:
    """WanTransformerBlock: norm1 (FP32LayerNorm without affine) and its modulation, an fp32 row a
    sample.
    """
    x = inputs["x"]
    return (
        (
            F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + inputs["scale"])
            + inputs["shift"]
        ).type_as(x),
    )


def ln_modulate_hunyuan(inputs: Inputs) -> tuple[Tensor, ...]:
    """AdaLayerNormZero, all in the dtype of x."""
    x = inputs["x"]
    return (F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + inputs["scale"]) + inputs["shift"],)


def gate_residual_wan(inputs: Inputs) -> tuple[Tensor, ...]:
    """WanTransformerBlock: the attention's result, gated, onto the stream."""
    return ((inputs["x"].float() + inputs["y"] * inputs["gate"]).type_as(inputs["x"]),)


def gate_residual_hunyuan(inputs: Inputs) -> tuple[Tensor, ...]:
    """HunyuanVideoTransformerBlock: the same, in the dtype of x."""
    return (inputs["x"] + inputs["y"] * inputs["gate"],)


def gate_residual_ln_modulate_wan(inputs: Inputs) -> tuple[Tensor, ...]:
    """The two in a row; the stream is needed too."""
    (residual,) = gate_residual_wan(inputs)
    return residual, *ln_modulate_wan({**inputs, "x": residual})


def gate_residual_ln_modulate_hunyuan(inputs: Inputs) -> tuple[Tensor, ...]:
    """The two in a row; the stream is needed too."""
    (residual,) = gate_residual_hunyuan(inputs)
    return residual, *ln_modulate_hunyuan({**inputs, "x": residual})


def qk_norm_rope_wan(inputs: Inputs) -> tuple[Tensor, ...]:
    """WanAttnProcessor: torch.nn.RMSNorm over all heads' channels, then the rotation; tables [1, L,
    1, D], each value twice.
    """

    def one(x: Tensor, weight: Tensor) -> Tensor:
        normed = F.rms_norm(x.flatten(2), weight.shape, weight, 1e-6).unflatten(2, x.shape[2:])
        x1, x2 = normed.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = inputs["table_cos"][..., 0::2], inputs["table_sin"][..., 1::2]
        out = torch.empty_like(normed)
        out[..., 0::2] = x1 * cos - x2 * sin
        out[..., 1::2] = x1 * sin + x2 * cos
        return out.type_as(normed)

    return one(inputs["q"], inputs["q_weight"]), one(inputs["k"], inputs["k_weight"])


def qk_norm_rope_hunyuan(inputs: Inputs) -> tuple[Tensor, ...]:
    """HunyuanVideoAttnProcessor2_0: diffusers' RMSNorm per head, then the rotation of the video
    tokens alone.
    """
    cos, sin = inputs["table_cos"], inputs["table_sin"]

    def one(x: Tensor, weight: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        normed = normed.to(weight.dtype) * weight
        video, text = normed[:, : cos.shape[1]], normed[:, cos.shape[1] :]
        real, imaginary = video.reshape(*video.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
        return torch.cat([(video.float() * cos + turned.float() * sin).to(x.dtype), text], dim=1)

    return one(inputs["q"], inputs["q_weight"]), one(inputs["k"], inputs["k_weight"])


def bias_gelu(inputs: Inputs) -> tuple[Tensor, ...]:
    """diffusers' GELU after its linear layer, which adds the bias in its own dtype."""
    x = inputs["hidden"]
    return (F.gelu(x + inputs["bias"].to(x.dtype), approximate="tanh"),)
