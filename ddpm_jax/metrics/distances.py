"""Distances between two sets of images, given as features [N, D]; numpy, float64.

A distance is worth what its features are worth: whoever tells a figure names them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

CHUNK = 1000  # rows of a matrix of distances held at once


class Moments(NamedTuple):
    """What of a set of features a Gaussian knows; sums of parts, so that sets can be streamed."""

    size: int
    mean: Float[np.ndarray, "d"]
    scatter: Float[np.ndarray, "d d"]  # sum of (x - mean) (x - mean)^T

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased one."""
        return self.scatter / max(self.size - 1, 1)


def moments(features: Float[np.ndarray, "n d"], before: Moments | None = None) -> Moments:
    """The moments of `features`, added to those of what came `before` (Chan et al. 1983)."""
    features = np.asarray(features, np.float64)
    count, mean = len(features), features.mean(0)
    centred = features - mean
    scatter = centred.T @ centred
    if before is None:
        return Moments(count, mean, scatter)
    total, apart = count + before.size, mean - before.mean
    return Moments(
        total,
        before.mean + apart * count / total,
        before.scatter + scatter + np.outer(apart, apart) * (before.size * count / total),
    )


def frechet(a: Moments, b: Moments) -> float:
    """Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017).

    |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a^1/2 C_b C_a^1/2)^1/2, whose last trace is the
    sum of the roots of a symmetric matrix's eigenvalues: real, whatever the covariances.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ b.covariance @ root)
    cross = np.sqrt(np.maximum(inner, 0.0)).sum()
    apart = np.square(a.mean - b.mean).sum()
    return float(apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def kernel_distance(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], size: int = 1000, subsets: int = 50
) -> tuple[float, float]:
    """KID: the unbiased squared MMD of the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    Args:
      size: of a subset of each set, at most.
      subsets: how many are drawn, always the same ones.

    Returns:
      The mean over subsets, and its standard deviation.
    """
    draws = np.random.Generator(np.random.Philox(key=[0, 0]))
    size = min(size, len(a), len(b))
    found = []
    for _ in range(subsets):
        x = np.asarray(a, np.float64)[draws.choice(len(a), size, replace=False)]
        y = np.asarray(b, np.float64)[draws.choice(len(b), size, replace=False)]

        def kernel(u, v):
            return (u @ v.T / u.shape[1] + 1) ** 3

        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        inside = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        found.append(inside - 2 * xy.mean())
    return float(np.mean(found)), float(np.std(found))


def inception_score(probabilities: Float[np.ndarray, "n classes"]) -> float:
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al. 2016): 1 ... the number of classes."""
    p = np.maximum(np.asarray(probabilities, np.float64), 1e-300)
    return float(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))


def nearest(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> tuple[Float[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """How far each of `a` is from its nearest of `b`, and which that is."""
    found = []
    for part in _chunks(a):
        distances = _distances(part, b)
        which = distances.argmin(1)
        found.append((distances[np.arange(len(part)), which], which))
    distance, which = zip(*found, strict=True)
    return np.concatenate(distance), np.concatenate(which)


def precision_recall(
    real: Float[np.ndarray, "n d"], drawn: Float[np.ndarray, "m d"], rank: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, alg. 1).

    The share of `drawn` within a ball around some real image that reaches to its `rank`-th
    nearest real neighbour; and the same the other way round.
    """

    def share(of, among):
        # Of each row the nearest is the row itself, so its rank-th neighbour has place `rank`.
        radius = np.concatenate(
            [np.partition(_distances(part, among), rank, 1)[:, rank] for part in _chunks(among)]
        )
        inside = [(_distances(part, among) <= radius).any(1) for part in _chunks(of)]
        return float(np.concatenate(inside).mean())

    real, drawn = np.asarray(real, np.float64), np.asarray(drawn, np.float64)
    return share(drawn, real), share(real, drawn)


def _chunks(a: np.ndarray) -> list[np.ndarray]:
    return [a[start : start + CHUNK] for start in range(0, len(a), CHUNK)]


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, m] Euclidean distances; exactly 0 between equal rows is not promised, near 0 is."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
    return np.sqrt(np.maximum(squares, 0.0))
