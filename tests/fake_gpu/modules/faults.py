"""Faults to plant in a step, of each kind that the GPU that is not there is to catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastgrpo.training import rollout, step
from fastgrpo.training.step import Trainer


@torch.library.custom_op("fake_gpu_tests::without_a_fake", mutates_args=())
def without_a_fake(velocity: Tensor) -> Tensor:
    """An operator that nobody has told what it returns."""
    return velocity.clone()


def _in_the_rollout(change: Callable[[Any], None]) -> Any:
    """Change the rollout before it is sampled."""
    original = step.start_rollout

    def start(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        change(made)
        return made

    return mock.patch.object(step, "start_rollout", start)


def _in_the_sampling_loop(change: Callable[[Tensor], Tensor]) -> Any:
    """Change every conditional velocity of the rollout."""
    original = rollout.branch_velocities

    def velocities(*args: Any) -> tuple[Tensor, Tensor | None]:
        velocity, uncond = original(*args)
        return change(velocity), uncond

    return mock.patch.object(rollout, "branch_velocities", velocities)


def host_timesteps(_: Trainer) -> Any:
    """Time steps that were left on the host."""
    return _in_the_rollout(lambda made: setattr(made, "timesteps", torch.zeros(made.num_steps)))


def host_operand(_: Trainer) -> Any:
    """A table that was left on the host, added to what is on the GPU."""
    return _in_the_sampling_loop(lambda velocity: velocity + torch.ones(velocity.shape[-1]))


def fp32_products(_: Trainer) -> Any:
    """A forward pass without autocast."""
    return _in_the_rollout(lambda made: setattr(made, "compute_dtype", torch.float32))


def fp32_stream(trainer: Trainer) -> Any:
    """A block that gives fp32 to the next one."""
    network: Any = trainer.policy.transformer
    network.blocks[0].register_forward_hook(lambda module, args, out: out.float())
    return mock.MagicMock()


def fp64_latents(_: Trainer) -> Any:
    """Arithmetic of whole latents in fp64."""
    return _in_the_sampling_loop(lambda velocity: (velocity.double() * 1.0).float())


class _FP64Gradient(torch.autograd.Function):
    """The identity, whose gradient passes through fp64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient.double() * 1.0).to(gradient.dtype)


def fp64_gradient(trainer: Trainer) -> Any:
    """A backward pass in fp64 of a forward pass without any."""
    network: Any = trainer.policy.transformer
    network.blocks[0].register_forward_hook(lambda module, args, out: _FP64Gradient.apply(out))
    return mock.MagicMock()


def fp32_vector_product(_: Trainer) -> Any:
    """A product of a matrix and a vector in fp32."""
    return _in_the_sampling_loop(lambda velocity: velocity + _product(velocity.float()))


def _product(values: Tensor) -> Tensor:
    return (values.flatten(1) @ values.flatten()).sum()


def no_fake(_: Trainer) -> Any:
    """An operator without a fake."""
    return _in_the_sampling_loop(lambda velocity: without_a_fake(velocity))


def item(_: Trainer) -> Any:
    """A number that is read back at every step of the sampling loop."""
    return _in_the_sampling_loop(lambda velocity: velocity * velocity.mean().item())


def kept_frames(_: Trainer) -> Any:
    """Frames of every video that live until the end of the step."""
    original, kept = step.decode, []

    def decode(*args: Any) -> Tensor:
        kept.append(original(*args))
        return kept[-1]

    return mock.patch.object(step, "decode", decode)


FAULTS: dict[str, Callable[[Trainer], Any]] = {
    fault.__name__: fault
    for fault in (
        host_timesteps,
        host_operand,
        fp32_products,
        fp32_stream,
        fp64_latents,
        fp64_gradient,
        fp32_vector_product,
        no_fake,
        item,
        kept_frames,
    )
}
"""Each plants itself in a trainer's step and returns what takes it out again."""
