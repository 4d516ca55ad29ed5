"""Counter-based Gaussian noise: a pure function of (sample seed, step, element).

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) followed by
Box-Muller. Nothing is drawn from a stream, so a trajectory does not depend on the split of the
batch, the rank or the world size.

    key = (seed low word, seed high word)
    counter = (quad low word, quad high word, step, 0)          quad = element // 4
    words 0, 1 -> elements 4q, 4q + 1 = r cos, r sin
    words 2, 3 -> elements 4q + 2, 4q + 3

Words are 32-bit unsigned integers held in int64 tensors, because torch has no unsigned arithmetic
on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks

Words = tuple[Tensor, Tensor, Tensor, Tensor]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, as fractions of 2^32
_ROUNDS = 10


def philox_4x32_10(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """The four output words of Philox-4x32-10, int64 in [0, 2^32).

    Args:
        counter: Four words, int64 tensors with values in [0, 2^32) that broadcast with the key's.
        key: Two words.
    """
    assert all(word.dtype == torch.int64 for word in (*counter, *key))
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit product may wrap to a negative int64: its bits are right, and the mask after
        # the arithmetic shift drops the copies of the sign. c1 and c3 are masked only when they
        # have been mixed in (next round, or below).
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) ^ c1 ^ k0) & _WORD, product1
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & _WORD, product0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def uniform(words: Tensor) -> Tensor:
    """((word >> 9) + 1/2) * 2^-23: float64 in the open interval (0, 1), symmetric about 1/2 and
    exact in fp32 too.

    words: int64, values in [0, 2^32).
    """
    assert words.dtype == torch.int64
    return ((words >> 9).double() + 0.5) * 2.0**-23


def box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals (fp32) from two uniforms: r cos(2 pi v), r sin(2 pi v) with
    r = sqrt(-2 ln u).

    u, v: float64 of one shape, values of `uniform`.

    The radius, the cosine and the sine are computed in float64 and rounded to fp32. No value of
    `uniform` brings them within 20 float64 ulps of a rounding boundary (tests/ops/test_philox.py
    tries all 2^23), so the functions of any library, vectorised or not, give the same fp32 bits.
    (torch's own fp32 square root is an ulp off for one CPU value in five.) Their product is
    correctly rounded by IEEE 754.
    """
    assert u.dtype == v.dtype == torch.float64
    radius = torch.sqrt(-2.0 * torch.log(u)).float()
    angle = v * (2.0 * math.pi)
    return radius * torch.cos(angle).float(), radius * torch.sin(angle).float()


def gaussian_noise(
    seeds: Tensor,
    step: int | Tensor,
    shape: Sequence[int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise. The bits of a sample depend on its seed and step only.

    Args:
        seeds: [B] int64; all 64 bits are the key.
        step: An int for all samples, or [B] int64; in [0, 2^32), not checked on a GPU, for which
            the host would have to wait.
        shape: Of one sample, without the batch.
        device: Of the result; None: where the seeds are.

    Returns:
        [B, *shape], fp32.

    Raises:
        ValueError: Another dtype, a step outside the range, or lengths that disagree.
    """
    key = checks.seed_vector(seeds, None, device)[:, None]
    sizes = tuple(shape)
    checks.check_sizes(sizes)
    batch, numel, target = key.shape[0], math.prod(sizes), key.device
    # Rows [B, 1] against columns [1, quads].
    quad = torch.arange((numel + 3) // 4, device=target)[None]
    step_word = checks.step_vector(step, batch, target)[:, None]
    counter = (quad & _WORD, quad >> 32, step_word, torch.zeros_like(step_word))
    w0, w1, w2, w3 = philox_4x32_10(counter, (key & _WORD, (key >> 32) & _WORD))
    radius_words, angle_words = torch.stack((w0, w2), dim=-1), torch.stack((w1, w3), dim=-1)
    pairs = torch.stack(
        box_muller(uniform(radius_words), uniform(angle_words)), dim=-1
    )  # [B, quads, 2, 2]
    return pairs.reshape(batch, 4 * quad.shape[1])[:, :numel].reshape(batch, *sizes)
