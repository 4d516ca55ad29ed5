"""The entry for torchrun: `torchrun --standalone --nproc-per-node N fastgrpo/train.py ...`."""

from __future__ import annotations

import os
import sys

if not __package__:
    # Started by its path, this file has its own folder first on sys.path. The working directory
    # belongs there, as with `python -m`: a user's own reward or policy is found in it, and the
    # folders of this package shadow nothing.
    sys.path[0] = os.getcwd()

# Two processes that spin on two cores are 10 to 40 times slower than two that wait. OpenMP reads
# this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# On a GPU: the judge's stream and the phases want blocks of different sizes, and segments that grow
# leave fewer gaps. torch reads either name, the older one first, when it first allocates.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

from fastgrpo.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
