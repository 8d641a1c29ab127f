"""Distances between two sets of images, from their features [N, D], with standard errors."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ddpm_jax.metrics.averages import average

CHUNK = 1000  # rows of the kernel matrix that are in memory at the same time
GROUPS = 20  # number of random groups of a set in the jackknife, for standard errors
_RNG = np.random.Generator(np.random.Philox(key=[0, 3]))
_GROUP = _RNG.permuted(np.tile(np.arange(GROUPS), (997, 1)), axis=1).ravel()  # group of image i


class Estimate(NamedTuple):
    """An estimate and its standard error, None if there are too few images for an error."""

    value: float
    error: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Size, mean and scatter matrix of a set of feature vectors.

    Attributes:
      size: Number of feature vectors x.
      mean: Mean of the feature vectors, [D].
      scatter: Sum of (x - mean) (x - mean)^T over the feature vectors, [D, D].
    """

    size: int
    mean: Float[np.ndarray, "d"]
    scatter: Float[np.ndarray, "d d"]

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased covariance matrix, [D, D]."""
        return self.scatter / max(self.size - 1, 1)


def moments(features: Float[np.ndarray, "n d"], previous: Moments | None = None) -> Moments:
    """Return the moments of a set of features, [n, D].

    If `previous` are the moments of other features, return the moments of the union of both sets
    (Chan et al. 1983).
    """
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    centred = features - mean
    added = Moments(len(features), mean, centred.T @ centred)
    return added if previous is None else _combined(previous, added)


def _combined(a: Moments, b: Moments, sign: int = 1) -> Moments:
    """Return the moments of the union of sets a and b, or of a without b if `sign` is -1."""
    total, shift = a.size + sign * b.size, b.mean - a.mean
    if total == 0:
        return Moments(0, np.zeros_like(a.mean), np.zeros_like(a.scatter))
    mean = a.mean + sign * shift * (b.size / total)
    between = np.outer(shift, shift) * (a.size * b.size / total)
    return Moments(total, mean, a.scatter + sign * (b.scatter + between))


class GroupedMoments:
    """Moments of `GROUPS` random groups of a set of features.

    The jackknife computes a metric once without each group. Of every `GROUPS` consecutive images,
    each group contains one. The group of image i is the same in all sets and runs.
    """

    def __init__(
        self, features: Float[np.ndarray, "n d"], previous: "GroupedMoments | None" = None
    ) -> None:
        """Compute the moments of the `previous` features followed by `features`, [n, D]."""
        start = previous.moments.size if previous else 0
        group = _GROUP[(start + np.arange(len(features))) % len(_GROUP)]
        self._groups: dict[int, Moments] = dict(previous._groups) if previous else {}
        for number in np.unique(group):
            rows = features[group == number]
            self._groups[number] = moments(rows, self._groups.get(number))

    @functools.cached_property
    def moments(self) -> Moments:
        """The moments of all features of the set."""
        return functools.reduce(_combined, self._groups.values())

    def without(self) -> Iterator[Moments]:
        """Yield, for each group, the moments of the set without this group."""
        for number in sorted(self._groups):
            yield _combined(self.moments, self._groups[number], -1)


def frechet(a: Moments, b: Moments) -> float:
    """Return the squared Frechet distance of two Gaussians N(m_a, C_a) and N(m_b, C_b).

    d = |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a^1/2 C_b C_a^1/2)^1/2 (Dowson & Landau 1982;
    Heusel et al. 2017, eq. 6). The last trace is computed as the sum of the square roots of the
    eigenvalues of a symmetric matrix, so that it is real.

    Raises:
      ValueError: If a set has fewer than 2 images, so that there is no covariance.
    """
    return _frechet(a, b)[0]


def _frechet(a: Moments, b: Moments) -> tuple[float, np.ndarray, np.ndarray]:
    """Return `frechet` and its derivatives [D, D] with respect to C_a and to C_b.

    The derivative with respect to C_a is I - T, where T is the optimal transport map from a to b,
    T C_a T = C_b (Takatsu 2011, lemma 2.3, for regular covariances). Directions in which a or b has
    almost no variance are left out of T.
    """
    if min(a.size, b.size) < 2:
        raise ValueError(
            f"Frechet distance of {a.size} and {b.size} images: give at least 2 images in each set"
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    inner, vectors = np.linalg.eigh(root @ b.covariance @ root)
    scales = np.sqrt(np.maximum(inner, 0.0))
    squared_shift = np.square(a.mean - b.mean).sum()
    distance = squared_shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * scales.sum()
    regular = scales > 1e-5 * scales.max()
    half, inverse = root @ vectors[:, regular], scales[regular] ** -0.5
    factor_a, factor_b = b.covariance @ half * inverse**3, half * inverse
    identity = np.eye(len(a.mean))
    return float(distance), identity - factor_a @ factor_a.T, identity - factor_b @ factor_b.T


class Jackknife(NamedTuple):
    """A statistic of one or two sets of images, with the values that give its standard error.

    Attributes:
      value: The statistic of the complete sets.
      without: One array [groups] for each set. Entry g is the statistic without group g of the set.
    """

    value: float
    without: tuple[Float[np.ndarray, "groups"], ...]

    @property
    def error(self) -> float | None:
        """The standard error by the delete-a-group jackknife, None for fewer than two groups.

        error^2 = sum over sets of (G - 1) / G sum_g (s_g - mean of s)^2, where s_g is the value
        without group g, of G groups (Shao & Tu 1995, sec. 2.3). The error is known to a relative
        precision of about 1 / sqrt(2 (G - 1)). The expectation of error^2 is at least the variance
        of the statistic (Efron & Stein 1981). It is twice the variance if the statistic has no
        linear part, as for a distance between equal distributions.
        """
        if any(len(values) < 2 for values in self.without):
            return None
        return math.sqrt(sum((len(values) - 1) * values.var() for values in self.without))

    @property
    def estimate(self) -> tuple[float, float | None]:
        """The value and its standard error, as `averages.with_error` takes them."""
        return self.value, self.error

    def divided_by(self, denominator: "Jackknife") -> "Jackknife | None":
        """Return the ratio d(a, c) / d(b, c) of this distance to `denominator`.

        The ratio without a group is computed to first order. Leaving out a group of the common set
        c changes both distances. If the denominator is 0, return None.
        """
        if not denominator.value > 0:
            return None
        ratio = self.value / denominator.value
        first, second = ((values - self.value) / denominator.value for values in self.without)
        denominator_first, denominator_second = (
            ratio * (values / denominator.value - 1) for values in denominator.without
        )
        without_second = ratio + second - denominator_second
        return Jackknife(ratio, (ratio + first, ratio - denominator_first, without_second))


def frechet_distance(a: GroupedMoments, b: GroupedMoments, paired: bool = False) -> Jackknife:
    """Return the Frechet distance of two sets of features, with values for a standard error.

    The distance without a group is computed to first order in the change of the moments, so that
    all groups use the same matrix decomposition.

    Args:
      a: Moments of the first set.
      b: Moments of the second set.
      paired: True if image i of the second set is computed from image i of the first, such as a
        reconstruction. Then the jackknife leaves out group g of both sets at the same time.

    Raises:
      ValueError: If a set has fewer than 2 images.
    """
    distance, *slopes = _frechet(a.moments, b.moments)
    shift = a.moments.mean - b.moments.mean
    changes = []
    for groups, slope, sign in zip((a, b), slopes, (1, -1), strict=True):
        full, mean_slope, change = groups.moments, 2 * sign * shift, []
        for part in groups.without():
            if part.size > 1:
                by_covariance = np.vdot(slope, part.covariance) - np.vdot(slope, full.covariance)
                change.append(mean_slope @ (part.mean - full.mean) + by_covariance)
        changes.append(np.array(change))
    if paired:
        changes = [changes[0] + changes[1]]
    return Jackknife(distance, tuple(distance + change for change in changes))


def kernel_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Estimate:
    """Return KID, the unbiased squared MMD with k = (x.y / D + 1)^3 (Binkowski et al. 2018).

    MMD^2 = sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1))
      - 2 sum_ij k(x_i, y_j) / (n m)

    The variance of this U-statistic is V1 + V2, where V1 is the variance of the linear part and V2
    that of the quadratic part (Hoeffding 1948). The delete-one jackknife over both sets has the
    expectation V1 + 2 V2, up to factors (n - 1) / (n - 2) (Efron & Stein 1981, sec. 4). Therefore
    an unbiased estimate of V2, from doubly centred kernels, is subtracted. The result is at least
    V2.

    Args:
      a: Features of the first set, [n, D].
      b: Features of the second set, [m, D].

    Returns:
      KID and its standard error. The error is None if a set has fewer than 4 features.

    Raises:
      ValueError: If a set has fewer than 2 features.
    """
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError(f"KID of {n} and {m} images: give at least 2 images in each set")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    (xx, _, xx_square), (yy, _, yy_square) = _kernel_sums(a, a), _kernel_sums(b, b)
    xy, yx, xy_square = _kernel_sums(a, b)

    sums = xx.sum(), yy.sum(), xy.sum()
    distance = float(_squared_mmd(*sums, n, m))
    if min(n, m) < 4:
        return Estimate(distance, None)
    without_x = _squared_mmd(sums[0] - 2 * xx, sums[1], sums[2] - xy, n - 1, m)
    without_y = _squared_mmd(sums[0], sums[1] - 2 * yy, sums[2] - yx, n, m - 1)
    variance = (n - 1) * without_x.var() + (m - 1) * without_y.var()

    between = xy_square - xy @ xy / m - yx @ yx / n + sums[2] ** 2 / (n * m)
    across = 4 * max(between, 0.0) / ((n - 1) * (m - 1) * n * m)
    x_part, y_part = 2 * _squared_kernel(xx, xx_square, n), 2 * _squared_kernel(yy, yy_square, m)
    quadratic = x_part / (n * (n - 1)) + y_part / (m * (m - 1)) + across
    variance -= x_part / ((n - 1) * (n - 2)) + y_part / ((m - 1) * (m - 2)) + across
    return Estimate(distance, math.sqrt(max(variance, quadratic)))


def _squared_mmd(
    xx: float | np.ndarray, yy: float | np.ndarray, xy: float | np.ndarray, n: int, m: int
) -> np.ndarray:
    """Return the squared MMD from the sums of k(x_i, x_j), k(y_i, y_j) and k(x_i, y_j)."""
    return np.asarray(xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m))


def _squared_kernel(sums: Float[np.ndarray, "n"], square: float, n: int) -> float:
    """Return an unbiased estimate of E[k^2] for the doubly centred k (Szekely & Rizzo 2014).

    `sums` are the sums over j of k(x_i, x_j), [n]; `square` is the sum of k(x_i, x_j)^2; i != j.
    """
    centred = square - 2 * (sums @ sums) / (n - 2) + sums.sum() ** 2 / ((n - 1) * (n - 2))
    return float(max(centred, 0.0)) / (n * (n - 3))


def _kernel_sums(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "m"], float]:
    """Return sum_j k(a_i, b_j), sum_i k(a_i, b_j) and sum_ij k(a_i, b_j)^2.

    If a and b are the same array, pairs with i = j are left out.
    """
    rows, columns, square = np.zeros(len(a)), np.zeros(len(b)), 0.0
    for start in range(0, len(a), CHUNK):
        k = a[start : start + CHUNK] @ b.T
        k /= a.shape[1]
        k += 1
        k *= k * k
        if a is b:
            np.fill_diagonal(k[:, start:], 0.0)
        rows[start : start + CHUNK] = k.sum(1)
        columns += k.sum(0)
        square += float(np.vdot(k, k))
    return rows, columns, square


def inception_score(probabilities: Float[np.ndarray, "n classes"]) -> float:
    """Return the Inception score exp(mean over x of KL(p(y|x) || p(y))) (Salimans et al. 2016).

    The score is between 1 and the number of classes.
    """
    return math.exp(_divergences(probabilities).mean())


def inception_score_error(probabilities: Float[np.ndarray, "n classes"]) -> float | None:
    """Return the standard error of the Inception score to first order, None for a single image.

    The error is the score times the standard error of the mean KL. The derivative of the mean KL
    with respect to p(y) is the same for all classes, so that an error of p(y) has no effect of
    first order.
    """
    mean, error = average(_divergences(probabilities))
    return None if error is None else math.exp(mean) * error


def _divergences(probabilities: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n"]:
    p = np.maximum(np.asarray(probabilities, np.float64), 1e-300)
    return np.asarray((p * (np.log(p) - np.log(p.mean(0)))).sum(1))


def share_error(share: float, count: int) -> float | None:
    """Return the standard error sqrt(p (1 - p) / (n - 1)) of a share p of n, None for n = 1."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


def median(values: Float[np.ndarray, "n"]) -> Estimate:
    """Return the median of n values and its standard error, None for n = 1.

    The error is the std of the median of a bootstrap sample, in closed form: the i-th of the sorted
    values is this median with the probability that Beta((n + 1) / 2, (n + 1) / 2) has in the
    interval ((i - 1) / n, i / n) (Maritz & Jarrett 1978).
    """
    from scipy.special import betainc

    n, ordered = len(values), np.sort(np.asarray(values, np.float64))
    if n < 2:
        return Estimate(float(np.median(ordered)), None)
    weights = np.diff(betainc((n + 1) / 2, (n + 1) / 2, np.arange(n + 1) / n))
    variance = weights @ np.square(ordered) - np.square(weights @ ordered)
    return Estimate(float(np.median(ordered)), math.sqrt(max(variance, 0.0)))


def quotient(a: Estimate, b: Estimate) -> Estimate | None:
    """Return a / b of two independent estimates, with its error to first order; None if b is 0."""
    if not b.value > 0:
        return None
    ratio = a.value / b.value
    if a.error is None or b.error is None:
        return Estimate(ratio, None)
    return Estimate(ratio, math.hypot(a.error, ratio * b.error) / b.value)
