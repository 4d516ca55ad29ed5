"""The operations at the sizes that matter: inputs, what computes them, and bytes. To measure
a new operation, add its entry here.

`ops.py` measures these cases, `ahead_of_time.py` compiles what they launch, `gpu_check.py` calls
each once under the sanitizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import fastgrpo_kernels as kernels
import torch
from fastgrpo_kernels.sde import reference
from torch import Tensor

from benchmarks.common import peers
from benchmarks.common.peers import GUIDANCE, Inputs


@dataclass(frozen=True)
class Size:
    """What one step of one model works on (docs/performance.md)."""

    batch: int
    latent: tuple[int, ...]
    """Shape of one sample's latents, fp32."""
    dtype: torch.dtype
    """Of velocities and tokens."""
    guided: bool
    """Classifier-free guidance, so two velocities."""
    tokens: int = 0
    rotated: int = 0
    """Tokens that the rotary embedding turns: the first, those of the video."""
    heads: int = 0
    per_head: bool = False
    """RMSNorm of each head (HunyuanVideo) or over all heads (Wan). Wan's modulation is fp32,
    HunyuanVideo's as its tokens.
    """
    head_dim: int = 128
    hidden: int = 0
    """Channels of the feed-forward layers."""

    @property
    def elements(self) -> int:
        """Of all samples' latents."""
        return self.batch * math.prod(self.latent)

    @property
    def channels(self) -> int:
        """Of a token."""
        return self.heads * self.head_dim


SIZES = {
    "wan_1.3b_480p": Size(
        1, (16, 14, 60, 104), torch.bfloat16, True, 21_840, 21_840, 12, hidden=8960
    ),
    "wan_14b_240p": Size(
        1, (16, 14, 30, 52), torch.bfloat16, True, 5_460, 5_460, 40, hidden=13_824
    ),
    "hunyuan_240p": Size(
        1, (16, 14, 30, 52), torch.bfloat16, False, 5_716, 5_460, 24, per_head=True, hidden=12_288
    ),
    "shapes_16": Size(16, (96, 8, 1, 1), torch.float32, False),
    "shapes_64": Size(64, (96, 8, 1, 1), torch.float32, False),
    "tiny": Size(2, (4, 3, 5), torch.bfloat16, True, 12, 12, 2, head_dim=16, hidden=40),
    "tiny_per_head": Size(
        3, (4, 2, 7), torch.float32, False, 9, 7, 3, per_head=True, head_dim=8, hidden=48
    ),
}
A, B, STD = 0.99432, -0.03883, 0.09731  # step 8 of 16, docs/method.md's table

Draw = Callable[[tuple[int, ...], torch.dtype], Tensor]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One operation at one size."""

    op: str
    size: str
    tests: str
    """Its file under tests/ops."""
    make: Callable[[Draw], Inputs]
    fused: Callable[..., Outputs]
    """fastgrpo_kernels' function of the inputs, by the backend that is named, with options of its
    own as keywords.
    """
    eager: Callable[[Inputs], Outputs]
    bytes: dict[str, int]
    """By direction: every large input once and every large output once."""
    wrt: tuple[str, ...] = ()
    """Inputs that have a gradient; where there is none, there is no backward row."""
    log_prob: Callable[[Inputs, Outputs], tuple[Tensor, Tensor]] | None = None
    """Log-probabilities that came out, and those of the float64 reference."""


def cases(name: str, dtype: torch.dtype | None = None) -> list[Case]:
    """Every operation at the size of this name; the transformer's only where the size has tokens.
    dtype: in place of the size's own.
    """
    size = replace(SIZES[name], dtype=dtype or SIZES[name].dtype)
    return [*_transition_cases(name, size), *(_token_cases(name, size) if size.tokens else [])]


def _transition_cases(name: str, size: Size) -> list[Case]:
    n, velocities = size.elements, (2 if size.guided else 1) * size.dtype.itemsize
    guidance = ("velocity", "velocity_uncond") if size.guided else ("velocity",)
    read = n * (8 + velocities)  # x and x' or, in a step, x read and x' written
    backward, both = read + n * velocities, 2 * read + n * velocities
    case = partial(Case, size=name, make=_maker(_transition_inputs, size))
    vectors = size.batch * (3 * 4 + 4 + 1 + 4) + 12
    return [
        case(
            "sde_step",
            tests="test_sde_step.py",
            fused=_sde_step,
            eager=peers.sde_step,
            bytes={"forward": read},
            log_prob=lambda inputs, out: (out[1], _exact_log_prob(inputs, out[0])),
        ),
        case(
            "sde_log_prob",
            tests="test_sde_log_prob.py",
            fused=_sde_log_prob,
            eager=peers.sde_log_prob,
            wrt=guidance,
            bytes={"forward": read, "backward": backward},
            log_prob=lambda inputs, out: (out[0], _exact_log_prob(inputs, inputs["next_latents"])),
        ),
        case(
            "clipped_ratio_loss",
            tests="test_grpo_loss.py",
            fused=_clipped_ratio_loss,
            eager=peers.clipped_ratio_loss,
            wrt=("log_probs",),
            bytes={"forward": vectors, "backward": 8 * size.batch},
        ),
        case(
            "grpo_loss",
            tests="test_grpo_loss.py",
            fused=_grpo_loss,
            eager=peers.grpo_loss,
            wrt=guidance,
            bytes={"forward": read, "backward": backward, "forward+backward": both},
            log_prob=lambda inputs, out: (out[1], _exact_log_prob(inputs, inputs["next_latents"])),
        ),
        case(
            "branch_gradient",
            tests="test_branch_gradient.py",
            fused=_branch_gradient,
            eager=peers.branch_gradient,
            bytes={"forward": n * velocities},
        ),
    ]


def _token_cases(name: str, size: Size) -> list[Case]:
    n = size.batch * size.tokens * size.channels
    wide, tables = n * size.dtype.itemsize, 4 * size.rotated * size.head_dim
    hidden = size.batch * size.tokens * size.hidden * size.dtype.itemsize
    case = partial(Case, size=name, make=_maker(_token_inputs, size))
    backend = "hunyuan" if size.per_head else "wan"
    return [
        case(
            "ln_modulate",
            tests="test_gate_residual_ln_modulate.py",
            fused=_ln_modulate,
            eager=getattr(peers, f"ln_modulate_{backend}"),
            wrt=("x", "scale", "shift"),
            bytes={"forward": 2 * wide, "backward": 3 * wide},
        ),
        # The gradient of x is that of the result: nothing is read or written for it.
        case(
            "gate_residual",
            tests="test_gate_residual_ln_modulate.py",
            fused=_gate_residual,
            eager=getattr(peers, f"gate_residual_{backend}"),
            wrt=("x", "y", "gate"),
            bytes={"forward": 3 * wide, "backward": 3 * wide},
        ),
        case(
            "gate_residual_ln_modulate",
            tests="test_gate_residual_ln_modulate.py",
            fused=_gate_residual_ln_modulate,
            eager=getattr(peers, f"gate_residual_ln_modulate_{backend}"),
            wrt=("x", "y", "gate", "scale", "shift"),
            bytes={"forward": 4 * wide, "backward": 6 * wide},
        ),
        case(
            "qk_norm_rope",
            tests="test_qk_norm_rope.py",
            fused=_qk_norm_rope,
            eager=getattr(peers, f"qk_norm_rope_{backend}"),
            wrt=("q", "k", "q_weight", "k_weight"),
            bytes={"forward": 4 * wide + tables, "backward": 6 * wide + tables},
        ),
        case(
            "bias_gelu",
            tests="test_bias_gelu.py",
            make=_maker(_hidden_inputs, size),
            fused=_bias_gelu,
            eager=peers.bias_gelu,
            wrt=("hidden", "bias"),
            bytes={"forward": 2 * hidden, "backward": 3 * hidden},
        ),
    ]


def probe(inputs: Inputs) -> Tensor:
    """The input whose device and dtype choose the backend."""
    return next(inputs[name] for name in ("latents", "x", "hidden") if name in inputs)


@cache
def _maker(inputs: Callable[[Size, Draw], Inputs], size: Size) -> Callable[[Draw], Inputs]:
    """Of the inputs that all operations of a size share: the same object for each of them."""
    return partial(inputs, size)


def _transition_inputs(size: Size, draw: Draw) -> Inputs:
    latents, velocity = (
        draw((size.batch, *size.latent), torch.float32),
        draw((size.batch, *size.latent), size.dtype),
    )
    inputs = {"latents": latents, "velocity": velocity}
    if size.guided:
        inputs["velocity_uncond"] = draw((size.batch, *size.latent), size.dtype)
    for key, value in (("a", A), ("b", B), ("std", STD)):
        inputs[key] = torch.full((size.batch,), value, device=latents.device)
    inputs["seeds"] = torch.arange(size.batch, device=latents.device) + 7
    inputs["steps"] = torch.full((size.batch,), 8, device=latents.device)
    inputs["advantages"] = draw((size.batch,), torch.float32)
    # A transition that this velocity could have made, and its own log-probabilities: a ratio of 1,
    # so every gradient flows.
    inputs["next_latents"], inputs["old_log_probs"] = _sde_step(inputs, "reference")
    inputs["log_probs"] = inputs["old_log_probs"] + 1e-5
    return inputs


def _token_inputs(size: Size, draw: Draw) -> Inputs:
    stream, heads = (
        (size.batch, size.tokens, size.channels),
        (size.batch, size.tokens, size.heads, size.head_dim),
    )
    inputs = {key: draw(stream, size.dtype) for key in ("x", "y")} | {
        key: draw(heads, size.dtype) for key in ("q", "k")
    }
    for key in ("scale", "shift", "gate"):
        inputs[key] = draw(
            (size.batch, 1, size.channels), size.dtype if size.per_head else torch.float32
        )
    for key in ("q_weight", "k_weight"):
        inputs[key] = draw((size.head_dim if size.per_head else size.channels,), size.dtype)
    angles = draw((size.rotated, size.head_dim // 2), torch.float32)
    inputs["cos"], inputs["sin"] = angles.cos(), angles.sin()
    for key in ("cos", "sin"):  # as diffusers has them: every value twice
        inputs[f"table_{key}"] = inputs[key].repeat_interleave(2, dim=1)[None, :, None]
    return inputs


def _hidden_inputs(size: Size, draw: Draw) -> Inputs:
    """A linear layer's output; its bias in fp32, as autocast leaves it."""
    return {
        "hidden": draw((size.batch, size.tokens, size.hidden), size.dtype),
        "bias": draw((size.hidden,), torch.float32),
    }


def _transition(inputs: Inputs, normalized: bool = True) -> kernels.Transition:
    uncond = inputs.get("velocity_uncond")
    return kernels.Transition(
        *(inputs["latents"], inputs["velocity"], inputs["a"], inputs["b"], inputs["std"]),
        velocity_uncond=uncond,
        guidance_scale=1.0 if uncond is None else GUIDANCE,
        normalized=normalized,
    )


def _sde_step(i: Inputs, backend: str, normalized: bool = True, **options: Any) -> Outputs:
    return kernels.sde_step(
        _transition(i, normalized), seeds=i["seeds"], step=i["steps"], backend=backend, **options
    )


def _sde_log_prob(i: Inputs, backend: str, normalized: bool = True, **options: Any) -> Outputs:
    return (
        kernels.sde_log_prob(
            _transition(i, normalized), i["next_latents"], backend=backend, **options
        ),
    )


def _clipped_ratio_loss(i: Inputs, backend: str, **options: Any) -> Outputs:
    loss, stats = kernels.clipped_ratio_loss(
        i["log_probs"], i["old_log_probs"], i["advantages"], backend=backend, **options
    )
    return loss, stats.clip_fraction, stats.approx_kl


def _grpo_loss(i: Inputs, backend: str, normalized: bool = True, **options: Any) -> Outputs:
    loss, stats = kernels.grpo_loss(
        _transition(i, normalized),
        i["next_latents"],
        i["old_log_probs"],
        i["advantages"],
        backend=backend,
        **options,
    )
    return loss, stats.log_probs


def _branch_gradient(i: Inputs, backend: str, normalized: bool = True, **options: Any) -> Outputs:
    cond, uncond = kernels.branch_gradient(
        _transition(i, normalized),
        i["advantages"],
        seeds=i["seeds"],
        step=i["steps"],
        backend=backend,
        **options,
    )
    return (cond,) if uncond is None else (cond, uncond)


def _ln_modulate(i: Inputs, backend: str, **options: Any) -> Outputs:
    return (kernels.ln_modulate(i["x"], i["scale"], i["shift"], backend=backend, **options),)


def _gate_residual(i: Inputs, backend: str, **options: Any) -> Outputs:
    return (kernels.gate_residual(i["x"], i["y"], i["gate"], backend=backend, **options),)


def _gate_residual_ln_modulate(i: Inputs, backend: str, **options: Any) -> Outputs:
    return kernels.gate_residual_ln_modulate(
        i["x"], i["y"], i.get("gate"), i["scale"], i["shift"], backend=backend, **options
    )


def _qk_norm_rope(i: Inputs, backend: str, **options: Any) -> Outputs:
    return kernels.qk_norm_rope(
        i["q"],
        i["k"],
        i["q_weight"],
        i["k_weight"],
        i.get("cos"),
        i.get("sin"),
        backend=backend,
        **options,
    )


def _bias_gelu(i: Inputs, backend: str, **options: Any) -> Outputs:
    return (kernels.bias_gelu(i["hidden"], i.get("bias"), backend=backend, **options),)


def _exact_log_prob(inputs: Inputs, next_latents: Tensor) -> Tensor:
    i = {
        key: value.detach().double() if value.is_floating_point() else value
        for key, value in inputs.items()
    }
    return reference.sde_log_prob(_transition(i), next_latents.detach().double())
