"""Make the text embeddings of a recipe's captions, once: training takes them from disk, and the text encoder is not loaded again.

Takes the options of `train`. Captions that have an embedding already are left alone, and a command that was killed goes on where it was.
Works under torchrun too: `torchrun ... -m fastgrpo embed`, each process its share.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastgrpo import parallel
from fastgrpo.config import parse_config, refuse
from fastgrpo.run import captions, say


def main(argv: Sequence[str] | None = None) -> int:
    """Embed the training and the held-out captions, on all ranks; exit code 2 with one message for whatever cannot be used."""
    config, _, _ = parse_config(argv, prog="python -m fastgrpo embed", description=__doc__)
    try:
        train = captions(config, config.prompts.train, "prompts.train")
        heldout = captions(config, config.prompts.heldout, "prompts.heldout") if config.prompts.heldout else []
        config.policy.embed([*train, *heldout], parallel.start(config.runtime))
    except (ValueError, FileNotFoundError) as error:
        refuse(error)
    say(f"embed: {type(config.policy).__name__} has what it needs for {len(train)} training and {len(heldout)} held-out captions")
    parallel.stop()  # not after an error: the other ranks may wait in a collective, and leaving would wait for them
    return 0
