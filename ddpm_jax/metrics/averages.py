"""Averages over a whole split, every example counted once, in float64 on the host."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ddpm_jax.data.loader import Split, evaluation_batches
from ddpm_jax.diffusion.schedules import within
from ddpm_jax.parallel.sharding import Parallel, fetch
from ddpm_jax.rng import EVALUATE, example_keys, purpose_key


class Average(NamedTuple):
    """A mean over examples with its standard error, None of a single example."""

    mean: float
    error: float | None


def per_example(
    fn: Callable[..., dict[str, Any]],
    split: Split,
    batch_size: int,
    seed: int,
    spread: Parallel,
    *arguments: Any,
) -> dict[str, np.ndarray]:
    """`fn` of every example of a split, in its order.

    Args:
      fn: (*arguments, batch, keys) -> {name: [B, ...]}; compiled here, once for each function.
      split: the examples.
      batch_size: how many at a time, rounded up to what the devices divide; it changes no
        result.
      seed: with an example's place in the split, keys its draws: the same at every
        evaluation, so that two of them differ by the parameters alone.
      spread: the devices.
      arguments: what the function reads besides, such as parameters.
    """
    key = purpose_key(seed, EVALUATE)
    rows: dict[str, list[np.ndarray]] = {}
    size, compiled = spread.round_up(batch_size), spread.compile(fn)
    for batch, count in evaluation_batches(split, size, spread.rows(size)):
        spread.breathe()
        batch = spread.shard(batch)
        keys = example_keys(key, 0, batch.index)
        for name, values in fetch(compiled(*arguments, batch, keys)).items():
            rows.setdefault(name, []).append(np.asarray(values, np.float64)[:count])
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def average(values: np.ndarray) -> Average:
    """The mean and its standard error s / sqrt(n); a single example has none."""
    values = np.asarray(values, np.float64)
    size = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(size) if size > 1 else None
    return Average(float(values.mean()), error)


def ratio_of_sums(
    values: Float[np.ndarray, "examples times"], chosen: Bool[np.ndarray, "examples times"]
) -> Average:
    """The mean of the chosen values, with its standard error over examples.

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


def figures(
    name: str, estimate: tuple[float, float | None], scale: float = 1.0
) -> dict[str, float]:
    """The metric `name` and, where there is one, its standard error as `name`_error.

    Args:
      estimate: a value and its standard error, or None.
      scale: that both are multiplied by, positive.
    """
    value, error = estimate
    found = {name: value * scale}
    return found if error is None else {**found, f"{name}_error": error * scale}


def averages(values: dict[str, np.ndarray], scale: float = 1.0) -> dict[str, float]:
    """The mean and the standard error of every array over its first axis, as `figures`.

    Args:
      values: by the metric's name, [N, ...], whose further axes are averaged for each example.
    """
    found: dict[str, float] = {}
    for name, array in values.items():
        found |= figures(name, average(array.reshape(len(array), -1).mean(1)), scale)
    return found


def spread_times(
    place: Int[Array, "batch"], keys: Key[Array, "batch"], count: int
) -> Float[Array, "batch count"]:
    """`count` times in [0, 1) for each image, together evenly spread over all images.

    An image's times are a comb, whose start is its place's in a low-discrepancy sequence:
    place (sqrt(5) - 1) / 2 modulo 1, in integers (Knuth 1998, sec. 6.4: 2654435769 / 2^32), so
    that any place is as exact as the first.
    """
    draws = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
    turn = place.astype(jnp.uint32) * jnp.uint32(2654435769)
    start = (turn >> 8).astype(draws.dtype) / 2**24
    return within(jnp.arange(count), (start[:, None] + draws / 997) % 1, count)
