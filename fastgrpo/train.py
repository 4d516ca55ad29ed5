"""The trainer's entry: `torchrun --standalone --nproc-per-node N fastgrpo/train.py --config fastgrpo/recipes/shapes.yaml`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# Two processes that spin on two cores are 10 to 40 times slower than two that wait; read by OpenMP when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from torch.distributed.elastic.multiprocessing.errors import record

from fastgrpo.commands.report import write_report
from fastgrpo.config import parse_config
from fastgrpo.parallel import rank
from fastgrpo.run import run


@record
def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and draw the report; the exit code."""
    config, config_yaml, _ = parse_config(
        argv,
        prog="fastgrpo/train.py",
        description="Align a video diffusion model with Self-Paced GRPO. Metrics, checkpoints and videos go to <output_dir>/<name>/.",
    )
    code = run(config, config_yaml)
    if rank() == 0:
        print(f"report: {write_report(config.run_folder)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
