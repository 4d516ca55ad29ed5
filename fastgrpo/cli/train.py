"""Train a policy, in one process; `torchrun fastgrpo/train.py` takes the same options and any number of processes."""

from fastgrpo.train import main

__all__ = ["main"]
