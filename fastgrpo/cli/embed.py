"""Make the text embeddings of a recipe's prompts, once: training then reads them from disk.

Takes the options of `train`. Prompts that have an embedding are left alone, and a command that was
killed goes on where it was. Also runs under torchrun, each process its share of the prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastgrpo.errors import INPUT_ERRORS, fail
from fastgrpo.training.recipe_parser import parse_config

logger = logging.getLogger("fastgrpo")


def main(argv: Sequence[str] | None = None) -> int:
    """Embed the training and the validation prompts, on all ranks."""
    config, _, _ = parse_config(argv, prog="python -m fastgrpo embed", description=__doc__)
    from fastgrpo.distributed import collectives
    from fastgrpo.training.preflight import checked_prompts

    try:
        train = checked_prompts(config.policy, config.prompts.train, "prompts.train")
        validation = (
            checked_prompts(config.policy, config.prompts.validation, "prompts.validation")
            if config.prompts.validation
            else []
        )
        config.policy.embed([*train, *validation], collectives.start(config.runtime))
    except INPUT_ERRORS as error:
        fail(error)
    logger.info(
        f"embed: {type(config.policy).__name__} has what it needs for {len(train)} training and "
        f"{len(validation)} validation prompts"
    )
    # Not after an error: the other ranks may wait in a collective, and leaving would wait for them.
    collectives.stop()
    return 0
