"""A reward of your own: bright videos. Train with `--reward my_reward.Brightness`."""

import torch

from fastgrpo.interfaces import RewardModel


class Brightness(RewardModel):
    stages = ("brightness",)

    def load(self, device):
        """Nothing to load; a model would be moved to `device` here."""

    def score(self, videos, prompts, fps):
        """videos [B, T, 3, H, W] -> scores [B, 1] float64 in [0, 1], valid [B] bool."""
        largest = 1.0 if videos.is_floating_point() else 255.0
        scores = videos.double().mean(dim=(1, 2, 3, 4))[:, None] / largest
        return scores, torch.ones(len(videos), dtype=torch.bool)
