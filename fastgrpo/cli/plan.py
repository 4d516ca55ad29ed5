"""Say what a recipe needs of the GPUs, and which settings fit, without a GPU or weights.

Takes the options of `train`, and --gpu_memory GB (80), --world_size N (8), --gpus_per_node N (8).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastgrpo.errors import INPUT_ERRORS, fail, require
from fastgrpo.training.recipe_parser import parse_config


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan, also if nothing fits."""
    prog = "python -m fastgrpo plan"
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--gpu_memory", type=float, default=80.0)
    parser.add_argument("--world_size", type=int, default=8)
    parser.add_argument("--gpus_per_node", type=int, default=8)
    options, rest = parser.parse_known_args(argv)
    config, _, _ = parse_config(rest, prog=prog, description=__doc__)
    from fastgrpo.planning.plan import Cluster, plan

    try:
        for key, value in vars(options).items():
            require(value > 0, f"--{key}", "a number above 0", value)
        cluster = Cluster(options.gpu_memory * 1e9, options.world_size, options.gpus_per_node)
        print(plan(config, cluster))
    except INPUT_ERRORS as error:
        fail(error)
    return 0
