"""Make the text embeddings of a recipe's captions, once: training takes them from disk, and the
text encoder is not loaded again.

Takes the options of `train`. Captions that have an embedding already are left alone, and a
command that was killed goes on where it was. Works under torchrun too: `torchrun ... -m fastgrpo
embed`, each process its share.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastgrpo.config import parse_config
from fastgrpo.distributed import collectives
from fastgrpo.errors import fail
from fastgrpo.training.loop import captions

logger = logging.getLogger("fastgrpo")


def main(argv: Sequence[str] | None = None) -> int:
    """Embed the training and the validation captions, on all ranks; exit code 2 with one message for
    whatever cannot be used.
    """
    config, _, _ = parse_config(argv, prog="python -m fastgrpo embed", description=__doc__)
    try:
        train = captions(config, config.prompts.train, "prompts.train")
        validation = (
            captions(config, config.prompts.validation, "prompts.validation")
            if config.prompts.validation
            else []
        )
        config.policy.embed([*train, *validation], collectives.start(config.runtime))
    except (ValueError, FileNotFoundError) as error:
        fail(error)
    logger.info(
        f"embed: {type(config.policy).__name__} has what it needs for {len(train)} training and {len(validation)} validation captions"
    )
    # not after an error: the other ranks may wait in a collective, and leaving would wait for them
    collectives.stop()
    return 0
