"""How much a judge's scores depend on what a video shows: the coefficient of variation κ over
clusters of prompts (Eq. 3, Figs. 4, 5, 8, 9).

Real videos of all kinds of content should be about equally good. A judge whose mean score differs
between clusters of prompts therefore prefers some content.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from fastgrpo.errors import UserError, require

N_INIT = 10
"""Starts of k-means; the best one is kept."""
NEAR_ZERO = 0.01
"""A mean below this share of the greatest score's magnitude counts as zero."""
COMPONENTS, COMPONENTS_OF_STARTS = 8, 2
"""Principal components of long vectors, for each cluster, on which k-means ends and starts."""
SHUFFLES = 200
"""Shuffles of the scores that measure what chance alone would give."""

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class _Bias:
    """One judge under one partition into k clusters.

    Attributes:
        of_means: κ over the k cluster means, in percent: the bias (Eq. 3); NaN if withheld.
        sizes: Videos per cluster.
        means: Mean score per cluster.
        within: κ of the scores within each cluster, in percent; NaN if withheld or if the cluster
            has one video.
        chance: κ over the means stays below this in 95 % of shuffles of the scores, so a judge
            without bias reaches it too; NaN if `of_means` is withheld.
    """

    of_means: float
    sizes: list[int]
    means: list[float]
    within: list[float]
    chance: float


@dataclass(frozen=True)
class JudgeBias:
    """One judge under all partitions.

    Attributes:
        score: Which of its scores these are: a stage, a component or `mean`.
        scores: [n].
        by_k: Its bias under the first seed, by number of clusters.
        by_seed: κ over the means under every seed, by number of clusters.
    """

    score: str
    scores: Floats
    by_k: dict[int, _Bias]
    by_seed: dict[int, list[float]]

    def band(self, k: int) -> tuple[float, float]:
        """Lowest and highest κ over the means under any seed; NaN if one is withheld."""
        return float(np.min(self.by_seed[k])), float(np.max(self.by_seed[k]))


def kappa(values: ArrayLike, scale: ArrayLike | None = None) -> Floats:
    """κ = 100 · std / |mean| along the last axis (Eq. 3, population std).

    κ takes zero on the scale as "no quality at all". Scores that are normalised to mean 0, such as
    VideoAlign's, have no such zero, so κ is withheld (NaN) for values of both signs and for a mean
    below NEAR_ZERO of the scale.

    Args:
        values: [..., n] scores or means.
        scale: [...] what the mean is compared with; by default the greatest magnitude of the
            values.

    Returns:
        [...] float64, in percent.
    """
    x = np.asarray(values, dtype=np.float64)
    mean, reference = x.mean(-1), np.abs(x).max(-1) if scale is None else np.asarray(scale)
    one_sign = (x.min(-1) >= 0) | (x.max(-1) <= 0)
    defined = one_sign & (np.abs(mean) > NEAR_ZERO * reference)
    return np.where(defined, 100 * x.std(-1) / np.where(defined, np.abs(mean), 1.0), np.nan)


def shuffles(scores: ArrayLike, seed: int = 0) -> Floats:
    """The scores [n] in SHUFFLES random orders, one a row."""
    x = np.asarray(scores, dtype=np.float64)
    return np.random.default_rng(seed).permuted(np.tile(x, (SHUFFLES, 1)), axis=1)


def measure(scores: ArrayLike, labels: Labels, shuffled: Floats) -> _Bias:
    """The bias of one judge under one partition.

    Args:
        scores: [n].
        labels: [n] cluster of each video, from 0 to k - 1, none empty.
        shuffled: [SHUFFLES, n], as `shuffles` makes them: the same under all partitions.
    """
    x = np.asarray(scores, dtype=np.float64)
    member = np.asarray(labels)[:, None] == np.arange(np.max(labels) + 1)
    sizes, scale = member.sum(0), np.abs(x).max()
    groups = [x[column] for column in member.T]
    means = [float(group.mean()) for group in groups]
    within = [float(kappa(group, scale)) if len(group) > 1 else np.nan for group in groups]
    of_means = float(kappa(means, scale))
    by_chance = kappa(shuffled @ member.astype(np.float64) / sizes, scale)
    chance = float(np.percentile(by_chance, 95)) if np.isfinite(of_means) else np.nan
    return _Bias(of_means, sizes.tolist(), means, within, chance)


def measure_all(
    score: str, scores: Floats, labels: Mapping[tuple[int, int], Labels], seed: int
) -> JudgeBias:
    """The bias of one judge under all partitions.

    Args:
        score: Which of its scores these are.
        scores: [n].
        labels: [n] by (k, seed), as `cluster_all` makes them.
        seed: The seed whose partitions are shown, and of the shuffles.
    """
    shuffled = shuffles(scores, seed)
    found = {key: measure(scores, label, shuffled) for key, label in labels.items()}
    ks, seeds = (list(dict.fromkeys(column)) for column in zip(*labels, strict=True))
    by_seed = {k: [found[k, s].of_means for s in seeds] for k in ks}
    return JudgeBias(score, scores, {k: found[k, seed] for k in ks}, by_seed)


def directions(embeddings: ArrayLike) -> Vectors:
    """Scale embeddings [n, D] to length 1, float32: what prompts are about, however long they are.

    Raises:
        UserError: A vector is zero or not finite.
    """
    x = np.asarray(embeddings, dtype=np.float64)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    bad = int((~(np.isfinite(lengths) & (lengths > 0))).sum())
    if bad:
        raise UserError(
            f"embeddings: expected finite numbers, not all zero, in each of {len(x)} rows, got "
            f"{bad} rows without"
        )
    return (x / lengths).astype(np.float32)


def principal_components(vectors: Vectors, k: int) -> Vectors | None:
    """What k-means has to see of vectors [n, D] to make up to k clusters: [n, m] coordinates along
    the m = 8 k leading principal components; None where vectors are no longer.

    k centres span k - 1 dimensions, and of all subspaces these components lose least of the
    distances: the sum of squares of the best partition is at most 1 + k/m times the least (Cohen et
    al. 2015, arXiv:1410.6801), and seen to be within the thousandths by which seeds differ.
    """
    num_components = COMPONENTS * k
    if min(vectors.shape) <= num_components:
        return None
    pca, threadpool_limits = _scikit_learn("decomposition", "PCA")
    with threadpool_limits(1):
        projected: Vectors = pca(
            num_components, svd_solver="randomized", iterated_power=3, random_state=0
        ).fit_transform(vectors)
    return projected


def cluster(vectors: Vectors, k: int, seed: int, num_first: int | None = None) -> Labels:
    """Cluster vectors [n, D] by k-means++ with N_INIT starts; the number of threads changes no bit.

    Args:
        vectors: Directions, or their principal components.
        k: Number of clusters.
        seed: Of the starts.
        num_first: Components that the starts see; the best of them then goes on with all.

    Returns:
        Labels [n], 0 for the largest cluster.
    """
    k_means, threadpool_limits = _scikit_learn("cluster", "KMeans")
    with threadpool_limits(1):  # more threads would add up in another order
        found = k_means(k, n_init=N_INIT, random_state=seed).fit_predict(vectors[:, :num_first])
        if num_first is not None:
            centres = np.stack([vectors[found == label].mean(0) for label in np.unique(found)])
            found = k_means(len(centres), init=centres, n_init=1).fit_predict(vectors)
    # If vectors are nearly alike, k-means may make fewer clusters than k.
    _, first, group, sizes = np.unique(
        found, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return rank[group]


def _scikit_learn(module: str, name: str) -> tuple[Any, Any]:
    """A class of scikit-learn and threadpool_limits, imported late because it is an extra."""
    try:
        found = getattr(importlib.import_module(f"sklearn.{module}"), name)
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise UserError(
            f'bias needs scikit-learn ({error}): pip install "fastgrpo[analysis]"'
        ) from error
    return found, threadpool_limits


def cluster_all(
    vectors: Vectors, ks: Sequence[int], seeds: Sequence[int]
) -> dict[tuple[int, int], Labels]:
    """`cluster` for each k and seed, by (k, seed), on all CPU cores; of long vectors, on their
    principal components.

    Raises:
        UserError: There are fewer different vectors than clusters.
    """
    different = len({row.tobytes() for row in vectors + np.float32(0)})  # -0 is 0
    expected = f"at most {different}, the number of different prompts (by their embeddings)"
    require(max(ks) <= different, "clusters", expected, max(ks))
    cases = [(k, seed) for k in ks for seed in seeds]
    _, threadpool_limits = _scikit_learn("cluster", "KMeans")
    components = principal_components(vectors, max(ks))

    def labels_of(case: tuple[int, int]) -> Labels:
        k, seed = case
        if components is None:
            return cluster(vectors, k, seed)
        return cluster(components, k, seed, num_first=COMPONENTS_OF_STARTS * k)

    # The limits inside the threads may end in another order than they began; the outer one restores
    # what there was before.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(labels_of, cases)
        shown = tqdm(found, total=len(cases), desc="k-means", disable=None)
        return dict(zip(cases, shown, strict=True))


def typical(vectors: Vectors, labels: Labels) -> list[int]:
    """For each cluster the index of the vector nearest to its centre."""
    found = []
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == label)
        offsets = vectors[members] - vectors[members].mean(0)
        found.append(int(members[np.linalg.norm(offsets, axis=1).argmin()]))
    return found
