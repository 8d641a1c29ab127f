"""Nearest neighbours of images in features or pixels, and precision and recall."""

import numpy as np
from jaxtyping import Float, Int

CHUNK = 1000  # rows of the distance matrix that are in memory at the same time
NEIGHBOUR_RANK = 3  # k in precision and recall, which use the k-th nearest neighbour


def nearest_neighbours(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> tuple[Float[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Find the row of `b`, [m, D], that is nearest to each row of `a`, [n, D].

    Returns:
      The Euclidean distances to the nearest rows, [n], and the indices of these rows in `b`, [n].
    """
    parts = []
    for part in _chunks(a):
        distances = _distances(part, b)
        index = distances.argmin(1)
        parts.append((distances[np.arange(len(part)), index], index))
    distance, index = zip(*parts, strict=True)
    return np.concatenate(distance), np.concatenate(index)


def precision_recall(
    real: Float[np.ndarray, "n d"], sampled: Float[np.ndarray, "m d"], rank: int = NEIGHBOUR_RANK
) -> tuple[float, float]:
    """Return the improved precision and recall (Kynkaanniemi et al. 2019, alg. 1).

    Precision is the share of samples that are within the ball around at least one real image. The
    radius of this ball is the distance from the real image to the `rank`-th nearest other real
    image. Recall is the share of real images that are within such a ball around at least one
    sample.

    Args:
      real: Features of real images, [n, D].
      sampled: Features of samples, [m, D].
      rank: k of the k-th nearest neighbour.

    Raises:
      ValueError: If a set has at most `rank` images.
    """
    if min(len(real), len(sampled)) <= rank:
        raise ValueError(
            f"precision of {len(real)} real and {len(sampled)} sampled images: give more than "
            f"{rank} images in each set"
        )

    def share_within(points: np.ndarray, centres: np.ndarray) -> float:
        # Position 0 of the sorted distances is the centre itself; position k is its neighbour k.
        radius = np.concatenate(
            [np.partition(_distances(part, centres), rank, 1)[:, rank] for part in _chunks(centres)]
        )
        inside = [(_distances(part, centres) <= radius).any(1) for part in _chunks(points)]
        return float(np.concatenate(inside).mean())

    real, sampled = np.asarray(real, np.float64), np.asarray(sampled, np.float64)
    return share_within(sampled, real), share_within(real, sampled)


def _chunks(a: np.ndarray) -> list[np.ndarray]:
    return [a[start : start + CHUNK] for start in range(0, len(a), CHUNK)]


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the Euclidean distance of each row of `a` to each row of `b`, [n, m]."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))
