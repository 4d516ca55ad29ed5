"""Other projects' functions for single operations, as ops.py times them beside ours.

Of the trainers, whose checkouts the user names: one denoising step with noise and log-probability,
and the loss of a stored transition. Their steps take time steps and sigmas instead of
coefficients, so what they compute from these is in their time, and guidance is added where the case
has it, in the lines that their pipelines have. The ratio and the clipped loss are restated, but for
UniRL's.

Of libraries, where they are installed: forward passes of the transformer's pointwise operations
(SGLang's and FlashInfer's kernels have no backward). QuACK has the norm of `qk_norm_rope` without
the rotation, so less than the operation. None of the libraries has been run here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.peers import ADV_CLIP, CLIP_RANGE, GUIDANCE, Inputs
from benchmarks.peers import checkout, dancegrpo, flow_factory, flow_grpo, unirl
from fastgrpo.algorithm.sde import sigma_schedule

Step = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""Velocity, latents and the stored next latents, or None to sample: next latents, log-prob."""
NUM_STEPS, STEP, SHIFT, ETA = 16, 8, 3.0, 0.3
"""The step whose coefficients common/cases.py has."""


@dataclass(frozen=True)
class PeerOperation:
    """What a project computes of one operation of ours.

    Attributes:
        name: Of the project.
        op: Ours.
        compute: Of the case's inputs, with the case's outputs; differentiable where we are.
        directions: Those that it has.
        is_whole: Whether its outputs are those of the operation.
    """

    name: str
    op: str
    compute: Callable[[Inputs], tuple[Tensor, ...]]
    directions: tuple[str, ...] = ("forward",)
    is_whole: bool = True


def of_checkouts(roots: Mapping[str, Path | None]) -> list[PeerOperation]:
    """`sde_step` and `grpo_loss` of the trainers, by name of the options.

    Raises:
        checkout.Changed: A checkout has not what is taken from it.
    """
    makers: dict[str, Callable[[Path], tuple[Step, Any]]] = {
        "dancegrpo": _dancegrpo,
        "flow_grpo": _flow_grpo,
        "flow_factory": _flow_factory,
        "unirl": _unirl,
    }
    found = []
    for name, make in makers.items():
        if root := roots.get(name):
            step, loss = make(root)
            both = ("forward", "backward", "forward+backward")
            found.append(PeerOperation(name, "sde_step", _sampling(step), is_whole=False))
            found.append(PeerOperation(name, "grpo_loss", _training(step, loss), both, False))
    return found


def of_libraries() -> list[PeerOperation]:
    """The pointwise operations of installed libraries; one that does not import is named."""
    found: list[PeerOperation] = []
    for package, make in (("sglang", _sglang), ("flashinfer", _flashinfer), ("quack", _quack)):
        if importlib.util.find_spec(package) is None:
            continue
        try:
            found += make()
        except (ImportError, AttributeError) as error:
            print(f"{package}: no number: {error}", flush=True)
    return found


def _guided(inputs: Inputs) -> Tensor:
    velocity, uncond = inputs["velocity"].float(), inputs.get("velocity_uncond")
    return velocity if uncond is None else uncond.float() + GUIDANCE * (velocity - uncond.float())


def _sampling(step: Step) -> Callable[[Inputs], tuple[Tensor, ...]]:
    return lambda inputs: step(_guided(inputs), inputs["latents"], None)


def _training(step: Step, loss: Any) -> Callable[[Inputs], tuple[Tensor, ...]]:
    def compute(inputs: Inputs) -> tuple[Tensor, ...]:
        _, new = step(_guided(inputs), inputs["latents"], inputs["next_latents"])
        return loss(new, inputs["old_log_probs"], inputs["advantages"]), new.detach()

    return compute


def _clipped(new: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """As three of the four have it in the middle of a loop."""
    advantages = torch.clamp(advantages, -ADV_CLIP, ADV_CLIP)
    ratio = torch.exp(new - old)
    clipped = torch.clamp(ratio, 1.0 - CLIP_RANGE, 1.0 + CLIP_RANGE)
    return torch.mean(torch.maximum(-advantages * ratio, -advantages * clipped))


@cache
def _sigmas(device: torch.device) -> Tensor:
    """Made once: the trainers have theirs before the first step, so it is not in a step's time."""
    return sigma_schedule(NUM_STEPS, SHIFT).to(device, torch.float32)


def _dancegrpo(root: Path) -> tuple[Step, Any]:
    flux_step = dancegrpo.source(root)[0].flux_step

    def step(velocity: Tensor, latents: Tensor, following: Tensor | None) -> tuple[Tensor, Tensor]:
        sigmas = _sigmas(latents.device)
        found, _, log_prob = flux_step(
            velocity, latents, ETA, sigmas, STEP, following, grpo=True, sde_solver=True
        )
        return found, log_prob

    return step, _clipped


def _flow_grpo(root: Path) -> tuple[Step, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    (sde,) = checkout.load(root, [f"{flow_grpo.PATCH}.sd3_sde_with_logprob"])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)

    def step(velocity: Tensor, latents: Tensor, following: Tensor | None) -> tuple[Tensor, Tensor]:
        if len(scheduler.timesteps) != NUM_STEPS:
            scheduler.set_timesteps(NUM_STEPS, device=latents.device)
        # Its coefficients have four dimensions; a view costs nothing.
        flat = [None if x is None else x.flatten(3) for x in (velocity, latents, following)]
        found, log_prob, *_ = sde.sde_step_with_logprob(
            scheduler, flat[0], scheduler.timesteps[STEP : STEP + 1], flat[1], prev_sample=flat[2]
        )
        return found.view_as(latents), log_prob

    return step, _clipped


def _flow_factory(root: Path) -> tuple[Step, Any]:
    (module,) = checkout.load(root / "src", ["flow_factory.scheduler"], flow_factory.ABSENT)
    scheduler = module.UniPCMultistepSDEScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=SHIFT,
        dynamics_type="Dance-SDE",
    )
    scheduler.set_timesteps(NUM_STEPS)
    here, there = scheduler.timesteps[STEP], scheduler.timesteps[STEP + 1]

    def step(velocity: Tensor, latents: Tensor, following: Tensor | None) -> tuple[Tensor, Tensor]:
        out = scheduler.step(
            noise_pred=velocity,
            timestep=here,
            latents=latents,
            timestep_next=there,
            next_latents=following,
            noise_level=ETA,
            return_kwargs=["next_latents", "log_prob"],
        )
        return out.next_latents, out.log_prob

    return step, _clipped


def _unirl(root: Path) -> tuple[Step, Any]:
    kernels, base = checkout.load(
        root, ["unirl.sde.kernels", "unirl.algorithms.base"], unirl.ABSENT
    )
    strategy = kernels.DanceSDEStrategy()

    def step(velocity: Tensor, latents: Tensor, following: Tensor | None) -> tuple[Tensor, Tensor]:
        sigmas = _sigmas(latents.device)
        found, log_prob, _ = strategy.denoise(
            velocity, latents, sigmas[STEP], sigmas[STEP + 1], eta=ETA, prev_sample=following
        )
        return found, log_prob

    def loss(new: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        found, _ = base._grpo_clip_loss(
            new_logp=new, old_logp=old, advantages=advantages, clip_range=CLIP_RANGE
        )
        return found.mean()

    return step, loss


def _sglang() -> list[PeerOperation]:
    name = "sglang.jit_kernel.diffusion.cutedsl.scale_residual_norm_scale_shift"
    norm: Any = importlib.import_module(name)

    def ln_modulate(i: Inputs) -> tuple[Tensor, ...]:
        return (
            norm.fused_norm_scale_shift(i["x"], None, None, i["scale"], i["shift"], "layer", 1e-6),
        )

    def gated(i: Inputs) -> tuple[Tensor, ...]:
        modulated, residual = norm.fused_scale_residual_norm_scale_shift(
            i["x"], i["y"], i["gate"], None, None, i["scale"], i["shift"], "layer", 1e-6
        )
        return residual, modulated

    return [
        PeerOperation("sglang", "ln_modulate", ln_modulate),
        PeerOperation("sglang", "gate_residual_ln_modulate", gated),
    ]


def _flashinfer() -> list[PeerOperation]:
    """bf16 and 3,072 channels only, which HunyuanVideo has; parameters are a row a token there."""
    ops: Any = importlib.import_module("flashinfer.diffusion_ops")

    def wide(i: Inputs, *names: str) -> SimpleNamespace:
        return SimpleNamespace(**{name: i[name].expand_as(i["x"]) for name in names})

    def ln_modulate(i: Inputs) -> tuple[Tensor, ...]:
        p = wide(i, "scale", "shift")
        return (ops.fused_dit_residual_layernorm_scale_shift(i["x"], p.scale, p.shift)[1],)

    def gated(i: Inputs) -> tuple[Tensor, ...]:
        p = wide(i, "gate", "scale", "shift")
        found: tuple[Tensor, ...] = ops.fused_dit_gate_residual_layernorm_scale_shift(
            i["y"], i["x"], p.gate, p.scale, p.shift
        )
        return found

    return [
        PeerOperation("flashinfer", "ln_modulate", ln_modulate),
        PeerOperation("flashinfer", "gate_residual_ln_modulate", gated),
    ]


def _quack() -> list[PeerOperation]:
    rmsnorm: Any = importlib.import_module("quack").rmsnorm

    def norms(i: Inputs) -> tuple[Tensor, ...]:
        # Over a head or over all of them, as the weight says.
        width = len(i["q_weight"])
        return tuple(
            rmsnorm(i[x].reshape(-1, width), i[f"{x}_weight"], eps=1e-6).view_as(i[x])
            for x in ("q", "k")
        )

    return [PeerOperation("quack", "qk_norm_rope", norms, ("forward", "backward"), False)]
