"""fastgrpo: Self-Paced GRPO for video diffusion models."""

__version__ = "0.2.0.dev0"
