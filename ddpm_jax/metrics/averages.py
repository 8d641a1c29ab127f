"""Averages over the examples of a split with their standard errors, in float64 on the host."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Average(NamedTuple):
    """A mean over examples and the standard error of the mean, None if there is one example."""

    mean: float
    error: float | None


def average(values: np.ndarray) -> Average:
    """Return the mean of n values, [n], and its standard error s / sqrt(n), None for n = 1."""
    values = np.asarray(values, np.float64)
    size = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(size) if size > 1 else None
    return Average(float(values.mean()), error)


def ratio_of_sums(
    values: Float[np.ndarray, "examples times"], mask: Bool[np.ndarray, "examples times"]
) -> Average:
    """Return the mean of the values that `mask` selects, and the standard error of the mean.

    The values of one example are not independent. Let s_i be the sum and c_i the number of selected
    values of example i, and n the number of examples with c_i > 0. The standard error is
    sqrt(n / (n - 1) sum_i (s_i - mean c_i)^2) / sum_i c_i (Cochran 1977, eq. 6.9), None for n = 1.
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
    """Return the dictionary {NAME: value, NAME_error: standard error} of a metric.

    Args:
      name: Name of the metric.
      estimate: The value and its standard error. If the error is None, NAME_error is left out.
      scale: Positive number by which the value and the error are multiplied.
    """
    value, error = estimate
    metrics = {name: value * scale}
    return metrics if error is None else {**metrics, f"{name}_error": error * scale}


def averages(values: dict[str, np.ndarray], scale: float = 1.0) -> dict[str, float]:
    """Return the mean of every array, NAME, and the standard error of the mean, NAME_error.

    Args:
      values: A dictionary from the name of a metric to an array [N, ...] with one row per example.
        Each row is averaged first.
      scale: Positive number by which the means and errors are multiplied.
    """
    metrics: dict[str, float] = {}
    for name, array in values.items():
        metrics |= with_error(name, average(array.reshape(len(array), -1).mean(1)), scale)
    return metrics
