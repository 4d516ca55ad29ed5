"""Write the trained weights of a run for diffusers: a transformer's folder or a LoRA file, with a
model card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastgrpo.errors import INPUT_ERRORS, fail
from fastgrpo.training.trust import OPTION
from fastgrpo.training.used_folder import require_run


def main(argv: Sequence[str] | None = None) -> int:
    """Export, and print the folder."""
    parser = argparse.ArgumentParser(prog="python -m fastgrpo export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder, also of a run still going")
    parser.add_argument(
        "--checkpoint", default="latest", help="name of a checkpoint, such as iteration_000050"
    )
    parser.add_argument(
        "--ema", action="store_true", help="the average of the weights instead of the weights"
    )
    parser.add_argument(
        "--output", help="a new folder; RUN/export/CHECKPOINT if not given, with _ema for --ema"
    )
    parser.add_argument("--trust", action="store_true", help=OPTION)
    options = parser.parse_args(argv)
    try:
        require_run(Path(options.run))  # before torch is loaded
        from fastgrpo.training.export import export

        folder = export(options.run, options.checkpoint, options.ema, options.output, options.trust)
    except INPUT_ERRORS as error:
        fail(error)
    print(f"weights, and a model card that says how to load them: {folder}")
    return 0
