"""Latents to frames, and what becomes of a latent that is not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastgrpo.training.decode import decode


def test_frames_are_the_policys_without_a_gradient(tiny_policy: Any) -> None:
    latents = torch.randn(
        3, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    frames = decode(tiny_policy(), latents)
    assert frames.shape == (3, 2, 3, 2, 2)
    assert not frames.requires_grad
    torch.testing.assert_close(
        frames, (1 / (1 + (-latents.detach()).exp())).permute(0, 2, 1, 3, 4), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_latent_that_is_not_finite_gives_no_picture(tiny_policy: Any, broken: float) -> None:
    """The logistic function makes 0 and 1 of infinities, which would be scored as a picture."""
    latents = torch.zeros(3, 3, 2, 2, 2)
    latents[1, 2, 0, 1, 0] = broken
    frames = decode(tiny_policy(), latents)
    assert torch.isnan(frames[1]).all()
    assert torch.equal(frames[[0, 2]], torch.full((2, 2, 3, 2, 2), 0.5))
