"""Averages over a whole split, every example counted once, in float64 on the host."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Average(NamedTuple):
    """A mean over examples with its standard error, None of a single example."""

    mean: float
    error: float | None


def average(values: np.ndarray) -> Average:
    """Return the mean and its standard error s / sqrt(n); a single example has none."""
    values = np.asarray(values, np.float64)
    size = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(size) if size > 1 else None
    return Average(float(values.mean()), error)


def ratio_of_sums(
    values: Float[np.ndarray, "examples times"], chosen: Bool[np.ndarray, "examples times"]
) -> Average:
    """Return the mean of the chosen values, with its standard error over examples.

    An example's values belong together: of sums s_i and counts c_i of n examples that have any, the
    error is sqrt(n / (n - 1) sum_i (s_i - mean c_i)^2) / sum_i c_i (Cochran 1977, eq. 6.9).
    """
    counts = chosen.sum(1)
    sums = np.where(chosen, values, 0.0).sum(1)[counts > 0]
    counts = counts[counts > 0]
    mean, size = sums.sum() / counts.sum(), len(counts)
    if size < 2:
        return Average(float(mean), None)
    square = np.square(sums - mean * counts).sum() * size / (size - 1)
    return Average(float(mean), math.sqrt(square) / float(counts.sum()))


def with_error(
    name: str, estimate: tuple[float, float | None], scale: float = 1.0
) -> dict[str, float]:
    """Return the metric `name` and, where there is one, its standard error as `name`_error.

    Args:
      estimate: a value and its standard error, or None.
      scale: that both are multiplied by, positive.
    """
    value, error = estimate
    metrics = {name: value * scale}
    return metrics if error is None else {**metrics, f"{name}_error": error * scale}


def averages(values: dict[str, np.ndarray], scale: float = 1.0) -> dict[str, float]:
    """Return the mean and the standard error of every array over its first axis, as `with_error`.

    Args:
      values: by the metric's name, [N, ...], whose further axes are averaged for each example.
    """
    metrics: dict[str, float] = {}
    for name, array in values.items():
        metrics |= with_error(name, average(array.reshape(len(array), -1).mean(1)), scale)
    return metrics
