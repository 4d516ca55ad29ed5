"""How much a judge's scores hang on what a video shows: the coefficient of variation over clusters
of captions (Eq. 3, Figs. 4, 5, 8, 9).

Real videos of all kinds of content should be about equally good, so a judge whose mean score
differs between clusters of captions prefers some content.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

N_INIT = 10
"""Starts of k-means, of which the best is kept."""
NEAR_ZERO = 0.01
"""A mean below this share of the greatest score's magnitude counts as zero."""
SHUFFLES = 200
"""Shuffles of the scores that chance is measured with."""

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Bias:
    """One judge and one partition into k clusters; all in the clusters' order. κ in percent, NaN
    where it is withheld.
    """

    of_means: float
    """κ over the k cluster means: the bias."""
    sizes: list[int]
    means: list[float]
    inside: list[float]
    """κ of the scores inside each cluster; NaN in a cluster of one video too."""
    chance: float
    """What κ over the means stays below in 95 % of shuffles of the scores: a judge without bias
    comes as far. NaN where κ is withheld.
    """


def kappa(values: ArrayLike, scale: ArrayLike | None = None) -> Floats:
    """100 · std / |mean| (Eq. 3, population std) along the last axis: [..., n] -> [...], float64,
    percent.

    NaN where it means nothing: values of both signs, or a mean below NEAR_ZERO of the scale. κ
    takes the scale's zero for "no quality at all"; VideoAlign's scores, which are normalised to
    mean 0 and may be negative, have no such zero.

    Args:
        values: [..., n] scores or means. scale: [...] what the mean is compared with; the
            greatest magnitude among the values if not given.
    """
    x = np.asarray(values, dtype=np.float64)
    mean, reference = (
        x.mean(-1),
        np.abs(x).max(-1) if scale is None else np.asarray(scale, dtype=np.float64),
    )
    one_sign = (x.min(-1) >= 0) | (x.max(-1) <= 0)
    defined = one_sign & (np.abs(mean) > NEAR_ZERO * reference)
    return np.where(defined, 100 * x.std(-1) / np.where(defined, np.abs(mean), 1.0), np.nan)


def measure(scores: ArrayLike, labels: Labels, seed: int = 0) -> Bias:
    """The bias of a judge's scores [n] over clusters with labels [n] from 0 to k - 1, none empty.
    seed: of the shuffles.
    """
    x = np.asarray(scores, dtype=np.float64)
    member = np.asarray(labels)[:, None] == np.arange(np.max(labels) + 1)
    sizes, scale = member.sum(0), np.abs(x).max()
    groups = [x[column] for column in member.T]
    means = [float(group.mean()) for group in groups]
    inside = [float(kappa(group, scale)) if len(group) > 1 else np.nan for group in groups]
    of_means = float(kappa(means, scale))
    shuffled = np.random.default_rng(seed).permuted(np.tile(x, (SHUFFLES, 1)), axis=1)
    by_chance = kappa(shuffled @ member.astype(np.float64) / sizes, scale)
    chance = float(np.percentile(by_chance, 95)) if np.isfinite(of_means) else np.nan
    return Bias(of_means, sizes.tolist(), means, inside, chance)


def directions(embeddings: ArrayLike) -> Vectors:
    """[n, D] of any dtype -> float32 vectors of length 1: what captions are about, whatever their
    length.

    ValueError: another shape, or a vector that is zero or not finite.
    """
    x = np.asarray(embeddings, dtype=np.float64)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(
            f"embeddings: expected a matrix with a row for each caption, got the shape {list(x.shape)}"
        )
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    bad = int((~(np.isfinite(lengths) & (lengths > 0))).sum())
    if bad:
        raise ValueError(
            f"embeddings: expected finite numbers, not all zero, in each of {len(x)} rows, got {bad} rows without"
        )
    return (x / lengths).astype(np.float32)


def cluster(vectors: Vectors, k: int, seed: int) -> Labels:
    """k-means (scikit-learn's, N_INIT starts by k-means++) of vectors [n, D] into k clusters:
    labels [n], 0 for the largest.

    A function of its arguments alone: the number of threads changes no bit. ValueError: no
    scikit-learn.
    """
    k_means, threadpool_limits = _scikit_learn()
    with threadpool_limits(1):  # several would add up in another order
        found = k_means(k, n_init=N_INIT, random_state=seed).fit_predict(vectors)
    _, first, group, sizes = np.unique(
        found, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(
        len(sizes), dtype=np.int64
    )  # of vectors that are nearly alike k-means may make fewer clusters than k
    rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return rank[group]


def _scikit_learn() -> tuple[Any, Any]:
    """KMeans, and threadpool_limits of a library that scikit-learn needs; imported when needed, as
    they are an extra.
    """
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ValueError(
            f'bias needs scikit-learn ({error}): pip install "fastgrpo[analysis]"'
        ) from error
    return KMeans, threadpool_limits


def cluster_all(
    vectors: Vectors, ks: Sequence[int], seeds: Sequence[int]
) -> dict[tuple[int, int], Labels]:
    """`cluster` for each k and seed, by (k, seed), on all CPU cores. ValueError: fewer different
    vectors than clusters, or k below 2.
    """
    different = len(np.unique(vectors, axis=0))
    if min(ks) < 2 or max(ks) > different:
        raise ValueError(
            f"clusters: expected from 2 to {different}, the number of different captions (by their embeddings), "
            f"got {min(ks) if min(ks) < 2 else max(ks)}"
        )
    cases = [(k, seed) for k in ks for seed in seeds]
    _, threadpool_limits = _scikit_learn()
    # The outer limit keeps what there was: those inside the threads may end in another order than
    # they began.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda case: cluster(vectors, *case), cases)
        return dict(
            zip(cases, tqdm(found, total=len(cases), desc="k-means", disable=None), strict=True)
        )


def typical(vectors: Vectors, labels: Labels) -> list[int]:
    """For each cluster the index of the vector nearest to its centre."""
    found = []
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == label)
        found.append(
            int(
                members[
                    np.linalg.norm(vectors[members] - vectors[members].mean(0), axis=1).argmin()
                ]
            )
        )
    return found
