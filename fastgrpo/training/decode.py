"""Latents to frames, which stay on their device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.interfaces import Policy


@torch.no_grad()
def decode(policy: Policy, latents: Tensor) -> Tensor:
    """Decode clean latents to frames.

    Args:
        policy: Has the decoder.
        latents: [n, *latent_shape].

    Returns:
        [n, T, 3, H, W], float in [0, 1]. A video whose latent is not finite is NaN throughout,
        which no judge can take for a picture.
    """
    frames = policy.decode(latents)
    broken = ~torch.isfinite(latents).flatten(1).all(dim=1)
    return torch.where(broken.view(-1, *[1] * (frames.ndim - 1)), torch.nan, frames)
