"""Serve a judge's model to training runs: by vLLM, or by our own server for TensorRT-LLM."""

from __future__ import annotations

from collections.abc import Sequence

import jsonargparse

from fastgrpo.errors import fail
from fastgrpo.rewards.server.launch import JudgeServer


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; exit code 2 with one line for what cannot be used."""
    parser = jsonargparse.ArgumentParser(prog="fastgrpo serve_judge", description=__doc__)
    parser.add_class_arguments(JudgeServer, as_group=False)
    parser.add_argument("--print", action="store_true", help="only print vLLM's command line")
    options = parser.parse_args(argv).as_dict()
    only_print = options.pop("print")
    try:
        server = JudgeServer(**options)
        if only_print:
            print(server.shown_command())
        else:
            server.run()
    except (ValueError, ImportError, OSError) as error:
        # The engine names its arguments as a recipe has them.
        fail(str(error).replace("reward.engine.", "--"))
    return 0
