"""Averages over a whole split, every example counted once, in float64 on the host."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.data.loader import Batch, Split, evaluation_batches
from ddpm_jax.keys import EVALUATE, example_keys, purpose_key
from ddpm_jax.parallel import Parallel, fetch
from ddpm_jax.schedule import within


class Average(NamedTuple):
    """A mean over examples with its standard error."""

    mean: float
    error: float


def per_example(
    fn: Callable[[Batch, Any], dict[str, Any]],
    split: Split,
    batch_size: int,
    seed: int,
    spread: Parallel,
) -> dict[str, np.ndarray]:
    """`fn` of every example of a split, in its order.

    Args:
      fn: (batch, keys) -> {name: [B, ...]}, compiled by the caller.
      split: the examples.
      batch_size: how many at a time, rounded up to what the devices divide; it changes no
        result.
      seed: with an example's place in the split, keys its draws: the same at every
        evaluation, so that two of them differ by the parameters alone.
      spread: the devices.
    """
    key = purpose_key(seed, EVALUATE)
    rows: dict[str, list[np.ndarray]] = {}
    size = spread.round_up(batch_size)
    for batch, count in evaluation_batches(split, size, spread.rows(size)):
        spread.breathe()
        batch = spread.shard(batch)
        for name, values in fetch(fn(batch, example_keys(key, 0, batch.index))).items():
            rows.setdefault(name, []).append(np.asarray(values, np.float64)[:count])
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def average(values: np.ndarray) -> Average:
    """The mean and its standard error (0 of a single example, which tells of none)."""
    size = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(size) if size > 1 else 0.0
    return Average(float(values.mean()), error)


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
