"""Averages over a split in which every example counts once, in float64 on the host."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Average(NamedTuple):
    """A mean over examples and its standard error, which is None for a single example."""

    mean: float
    error: float | None


def average(values: np.ndarray) -> Average:
    """Return the mean of n values and its standard error s / sqrt(n), None for n = 1."""
    values = np.asarray(values, np.float64)
    size = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(size) if size > 1 else None
    return Average(float(values.mean()), error)


def ratio_of_sums(
    values: Float[np.ndarray, "examples times"], mask: Bool[np.ndarray, "examples times"]
) -> Average:
    """Return the mean of the values that a mask selects, with its standard error over examples.

    The values of one example are not independent. With s_i the sum of the selected values of
    example i, c_i their number, and n the number of examples with c_i > 0, the standard error is
    sqrt(n / (n - 1) sum_i (s_i - mean c_i)^2) / sum_i c_i (Cochran 1977, eq. 6.9).
    """
    counts = mask.sum(1)
    sums = np.where(mask, values, 0.0).sum(1)[counts > 0]
    counts = counts[counts > 0]
    mean, size = sums.sum() / counts.sum(), len(counts)
    if size < 2:
        return Average(float(mean), None)
    square = np.square(sums - mean * counts).sum() * size / (size - 1)
    return Average(float(mean), math.sqrt(square) / float(counts.sum()))


def with_error(
    name: str, estimate: tuple[float, float | None], scale: float = 1.0
) -> dict[str, float]:
    """Return a metric `name` and its standard error `name`_error as a dictionary.

    Args:
      name: Name of the metric.
      estimate: The value, and its standard error or None. If None, the dictionary has no error.
      scale: Positive factor of the value and of its error.
    """
    value, error = estimate
    metrics = {name: value * scale}
    return metrics if error is None else {**metrics, f"{name}_error": error * scale}


def averages(values: dict[str, np.ndarray], scale: float = 1.0) -> dict[str, float]:
    """Return the mean and the standard error over examples of every array (see `with_error`).

    Args:
      values: Arrays [N, ...] by the name of the metric. Further axes are averaged first.
      scale: Positive factor of the means and of their errors.
    """
    metrics: dict[str, float] = {}
    for name, array in values.items():
        metrics |= with_error(name, average(array.reshape(len(array), -1).mean(1)), scale)
    return metrics
