"""Stage 3: latents to frames, which stay on their device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.interfaces import Policy


@torch.no_grad()
def decode(policy: Policy, latents: Tensor) -> Tensor:
    """Frames [n, T, 3, H, W], float in [0, 1], of clean latents [n, *latent_shape].

    A video whose latent is not finite comes out as NaN throughout, which no judge can take for a
    picture.
    """
    frames = policy.decode(latents)
    broken = ~torch.isfinite(latents).flatten(1).all(dim=1)
    return torch.where(broken.view(-1, *[1] * (frames.ndim - 1)), torch.nan, frames)
