"""Counter-based seeds: every random draw of a run has its own."""

from __future__ import annotations

import hashlib


def derive_seed(*words: int | str) -> int:
    """Derive the seed of one draw from its purpose.

    The result depends only on the words. It does not depend on what was drawn before, on which
    rank, or whether the run was resumed.

    Args:
        words: The run's seed, the purpose's name and its counters, such as
            `derive_seed(seed, "sde", iteration, slot, g)`.

    Returns:
        A seed in [0, 2^63).
    """
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
