"""Distances of sets of images in features [N, D]; a distance is named after their network."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ddpm_jax.metrics.averages import average

CHUNK = 1000  # rows of a matrix of distances held at once
GROUPS = 20  # random parts of a set, for standard errors
RANK = 3  # which neighbour's distance is the radius, in precision and recall
_ORDER = np.random.Generator(np.random.Philox(key=[0, 3]))
_GROUP = _ORDER.permuted(np.tile(np.arange(GROUPS), (997, 1)), axis=1).ravel()  # of image i


class Estimate(NamedTuple):
    """A value with its standard error, None where so few examples give none."""

    value: float
    error: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Size, mean and scatter of a set of features; sums over parts, so that sets can be streamed.

    scatter: sum of (x - mean) (x - mean)^T.
    """

    size: int
    mean: Float[np.ndarray, "d"]
    scatter: Float[np.ndarray, "d d"]

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased one."""
        return self.scatter / max(self.size - 1, 1)


def moments(features: Float[np.ndarray, "n d"], before: Moments | None = None) -> Moments:
    """Return the moments of `features`, added to those of what came `before` (Chan et al. 1983)."""
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    centred = features - mean
    added = Moments(len(features), mean, centred.T @ centred)
    return added if before is None else _joined(before, added)


def _joined(a: Moments, b: Moments, sign: int = 1) -> Moments:
    """Return the moments of two sets together; with `sign` -1, of `a` without its subset `b`."""
    total, apart = a.size + sign * b.size, b.mean - a.mean
    if total == 0:
        return Moments(0, np.zeros_like(a.mean), np.zeros_like(a.scatter))
    mean = a.mean + sign * apart * (b.size / total)
    between = np.outer(apart, apart) * (a.size * b.size / total)
    return Moments(total, mean, a.scatter + sign * (b.scatter + between))


class Grouped:
    """Moments of random groups of a set, of which each can be left out.

    Group by group they are as large as each other but for one image, and the same ones every time:
    each run of `GROUPS` images has one of every group, in random order.
    """

    def __init__(self, features: Float[np.ndarray, "n d"], before: "Grouped | None" = None) -> None:
        """Add the groups of `features` to those of what came `before`."""
        start = before.moments.size if before else 0
        group = _GROUP[(start + np.arange(len(features))) % len(_GROUP)]
        self._groups: dict[int, Moments] = dict(before._groups) if before else {}
        for number in np.unique(group):
            rows = features[group == number]
            self._groups[number] = moments(rows, self._groups.get(number))

    @functools.cached_property
    def moments(self) -> Moments:
        """Those of the whole set."""
        return functools.reduce(_joined, self._groups.values())

    def without(self) -> Iterator[Moments]:
        """Yield the moments of the set without each of its groups, in turn."""
        for number in sorted(self._groups):
            yield _joined(self.moments, self._groups[number], -1)


def frechet(a: Moments, b: Moments) -> float:
    """Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017).

    |m_a - m_b|^2 + tr C_a + tr C_b - 2 tr (C_a^1/2 C_b C_a^1/2)^1/2, whose last trace is the
    sum of the roots of a symmetric matrix's eigenvalues: real, whatever the covariances.

    Raises:
      ValueError: one set has fewer than 2 images, which have no covariance.
    """
    return _frechet(a, b)[0]


def _frechet(a: Moments, b: Moments) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the distance, and its derivatives by C_a and C_b, of which I - T is the first.

    T is the optimal transport map from a to b, T C_a T = C_b (Takatsu 2011, lemma 2.3), where no
    covariance is singular; directions in which one has next to no variance are left out.
    """
    if min(a.size, b.size) < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {min(a.size, b.size)}")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    inner, vectors = np.linalg.eigh(root @ b.covariance @ root)
    scales = np.sqrt(np.maximum(inner, 0.0))
    apart = np.square(a.mean - b.mean).sum()
    distance = apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * scales.sum()
    kept = scales > 1e-5 * scales.max()
    half, inverse = root @ vectors[:, kept], scales[kept] ** -0.5
    of_a, of_b = b.covariance @ half * inverse**3, half * inverse
    identity = np.eye(len(a.mean))
    return float(distance), identity - of_a @ of_a.T, identity - of_b @ of_b.T


class Jackknife(NamedTuple):
    """A statistic of sets of images, and for each set its values without each of the groups."""

    value: float
    without: tuple[Float[np.ndarray, "groups"], ...]

    @property
    def error(self) -> float | None:
        """The standard error by the delete-a-group jackknife; None for fewer than two groups.

        Its square is the sum over sets of (G - 1) / G sum_g (s_g - mean of s)^2, where s_g is the
        value without group g (Shao & Tu 1995, sec. 2.3).  The relative standard error of the
        error itself is about 1 / sqrt(2 (G - 1)).  On average its square is not too small (Efron &
        Stein 1981), and twice the variance where the statistic has no linear part, as a distance
        between equal distributions has none.
        """
        if any(len(values) < 2 for values in self.without):
            return None
        return math.sqrt(sum((len(values) - 1) * values.var() for values in self.without))

    def over(self, denominator: "Jackknife") -> "Jackknife | None":
        """Return the ratio of distances to one second set, to first order; None for x / 0."""
        if not denominator.value > 0:
            return None
        ratio = self.value / denominator.value
        ours, shared = ((values - self.value) / denominator.value for values in self.without)
        theirs, again = (ratio * (values / denominator.value - 1) for values in denominator.without)
        return Jackknife(ratio, (ratio + ours, ratio - theirs, ratio + shared - again))


def frechet_distance(a: Grouped, b: Grouped, paired: bool = False) -> Jackknife:
    """Return `frechet` of two sets, with what its standard error needs.

    The distances without a group are those to first order in the moments, for which one
    decomposition serves all groups.

    Args:
      paired: group by group both sets are of the same images, which are left out of both.

    Raises:
      ValueError: as `frechet`.
    """
    distance, *slopes = _frechet(a.moments, b.moments)
    apart = a.moments.mean - b.moments.mean
    changes = []
    for sets, slope, sign in zip((a, b), slopes, (1, -1), strict=True):
        whole, by_mean, change = sets.moments, 2 * sign * apart, []
        for part in sets.without():
            if part.size > 1:
                moved = np.vdot(slope, part.covariance) - np.vdot(slope, whole.covariance)
                change.append(by_mean @ (part.mean - whole.mean) + moved)
        changes.append(np.array(change))
    if paired:
        changes = [changes[0] + changes[1]]
    return Jackknife(distance, tuple(distance + change for change in changes))


def kernel_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> Estimate:
    """KID: the unbiased squared MMD of the kernel k = (x.y / D + 1)^3 (Binkowski et al. 2018).

    MMD^2 = sum_{i != j} k(x_i, x_j) / (n (n - 1)) + the same of y - 2 sum_ij k(x_i, y_j) / (n m)

    over all pairs, a U-statistic.  Its variance is V1 + V2, of a linear and a quadratic part
    (Hoeffding 1948).  The delete-one jackknife over both samples has the expectation V1 + 2 V2, but
    for factors (n - 1) / (n - 2) (Efron & Stein 1981, sec. 4).  So V2, estimated without bias from
    doubly centred kernels, is taken away once; what remains is at least V2.

    Returns:
      The value and its standard error (None for fewer than 4 features in a set).

    Raises:
      ValueError: there are fewer than 2 features in a set.
    """
    n, m = len(a), len(b)
    if min(n, m) < 2:
        raise ValueError(f"KID needs at least 2 features in each set, not {n} and {m}")
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
    of_x, of_y = 2 * _squared_kernel(xx, xx_square, n), 2 * _squared_kernel(yy, yy_square, m)
    quadratic = of_x / (n * (n - 1)) + of_y / (m * (m - 1)) + across
    variance -= of_x / ((n - 1) * (n - 2)) + of_y / ((m - 1) * (m - 2)) + across
    return Estimate(distance, math.sqrt(max(variance, quadratic)))


def _squared_mmd(
    xx: float | np.ndarray, yy: float | np.ndarray, xy: float | np.ndarray, n: int, m: int
) -> np.ndarray:
    """Return the squared MMD of n and m features from the kernel's sums over pairs."""
    return np.asarray(xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m))


def _squared_kernel(sums: Float[np.ndarray, "n"], square: float, n: int) -> float:
    """E of the squared kernel, doubly centred, without bias (Szekely & Rizzo 2014)."""
    centred = square - 2 * (sums @ sums) / (n - 2) + sums.sum() ** 2 / ((n - 1) * (n - 2))
    return float(max(centred, 0.0)) / (n * (n - 3))


def _kernel_sums(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "m"], float]:
    """Return sums over rows and columns of k(a_i, b_j), and of its squares; if b is a, i != j."""
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
    """exp of the mean KL(p(y|x) || p(y)) (Salimans et al. 2016): 1 ... the number of classes."""
    return math.exp(_divergences(probabilities).mean())


def inception_score_error(probabilities: Float[np.ndarray, "n classes"]) -> float | None:
    """Return the score's standard error, to first order: the score times that of the mean of KL.

    A first-order error of p(y), the mean of p(y|x), does not change the score.  None for a single
    image.
    """
    mean, error = average(_divergences(probabilities))
    return None if error is None else math.exp(mean) * error


def _divergences(probabilities: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n"]:
    p = np.maximum(np.asarray(probabilities, np.float64), 1e-300)
    return np.asarray((p * (np.log(p) - np.log(p.mean(0)))).sum(1))


def share_error(share: float, count: int) -> float | None:
    """Return the standard error sqrt(p (1 - p) / (n - 1)) of a share p of n; None for n = 1."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


def median(values: Float[np.ndarray, "n"]) -> Estimate:
    """Return the median and its standard error (Maritz & Jarrett 1978), None for a single value.

    The error is the standard deviation of the median of a bootstrap sample, in closed form: that
    the i-th of n values is the median has a Beta distribution's mass between (i - 1) / n and i / n.
    """
    from scipy.special import betainc

    n, ordered = len(values), np.sort(np.asarray(values, np.float64))
    if n < 2:
        return Estimate(float(np.median(ordered)), None)
    weights = np.diff(betainc((n + 1) / 2, (n + 1) / 2, np.arange(n + 1) / n))
    variance = weights @ np.square(ordered) - np.square(weights @ ordered)
    return Estimate(float(np.median(ordered)), math.sqrt(max(variance, 0.0)))


def quotient(a: Estimate, b: Estimate) -> Estimate | None:
    """a / b of independent estimates: relative errors add in squares.  None where b is 0."""
    if not b.value > 0:
        return None
    ratio = a.value / b.value
    if a.error is None or b.error is None:
        return Estimate(ratio, None)
    return Estimate(ratio, math.hypot(a.error, ratio * b.error) / b.value)


def nearest(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]
) -> tuple[Float[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Return how far each of `a` is from its nearest of `b`, and which that is."""
    parts = []
    for part in _chunks(a):
        distances = _distances(part, b)
        which = distances.argmin(1)
        parts.append((distances[np.arange(len(part)), which], which))
    distance, which = zip(*parts, strict=True)
    return np.concatenate(distance), np.concatenate(which)


def precision_recall(
    real: Float[np.ndarray, "n d"], drawn: Float[np.ndarray, "m d"], rank: int = RANK
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, alg. 1).

    The share of `drawn` within a ball around some real image that reaches to its `rank`-th
    nearest real neighbour; and the same the other way round.

    Raises:
      ValueError: a set has no more than `rank` images.
    """
    if min(len(real), len(drawn)) <= rank:
        raise ValueError(f"needs more than {rank} images of each, not {len(real)}, {len(drawn)}")

    def share(of: np.ndarray, among: np.ndarray) -> float:
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
    """Return Euclidean distances [n, m]; between equal rows near 0, not always exactly."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))
