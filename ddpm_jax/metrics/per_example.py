"""Compute a function of every example of a split, and the times of an evaluation."""

from collections.abc import Callable
from typing import TypeVarTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.data.batches import evaluation_batches
from ddpm_jax.data.types import Batch, Split
from ddpm_jax.diffusion.grids import stratum_time
from ddpm_jax.parallel.partitioner import Partitioner, fetch
from ddpm_jax.rng import EVALUATE, example_keys, purpose_key

Ts = TypeVarTuple("Ts")


def per_example(
    compute: Callable[[*Ts, Batch, Key[Array, "batch"]], dict[str, Array]],
    split: Split,
    batch_size: int,
    seed: int,
    partitioner: Partitioner,
    *arguments: *Ts,
    check: Callable[[], None] = lambda: None,
    static_argnums: int | tuple[int, ...] = (),
) -> dict[str, np.ndarray]:
    """Return the results of a function for every example, in the order of the split.

    The random numbers of an example depend only on `seed` and on its index in the split. They are
    the same at every evaluation, so that two evaluations differ only by the parameters.

    Args:
      compute: Maps (*arguments, batch, keys) to arrays [B, ...] by name. It is compiled once for
        each function and its static arguments.
      split: The examples.
      batch_size: Number of examples of a batch, rounded up to a multiple of the devices. The
        results do not depend on it.
      seed: Seed of the keys.
      partitioner: Partitions the batches across devices.
      arguments: The first arguments of `compute`, such as parameters.
      check: A function that is called before every batch. It may end the evaluation by an error.
      static_argnums: Positions of the static arguments of `compute`.

    Returns:
      Arrays [N, ...] in float64 by name.
    """
    key = purpose_key(seed, EVALUATE)
    rows: dict[str, list[np.ndarray]] = {}
    size, compiled = partitioner.round_up(batch_size), partitioner.compile(compute, static_argnums)
    for batch, count in evaluation_batches(split, size, partitioner.rows(size)):
        check()
        batch = partitioner.shard(batch)
        keys = example_keys(key, 0, batch.index)
        for name, values in fetch(compiled(*arguments, batch, keys)).items():
            rows.setdefault(name, []).append(np.asarray(values, np.float64)[:count])
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def evaluation_times(
    index: Int[Array, "batch"], keys: Key[Array, "batch"], count: int
) -> Float[Array, "batch count"]:
    """Return `count` times in [0, 1) for each image, which cover [0, 1) evenly over all images.

    The times of image i are (j + s_ij) / count for j = 0 ... count - 1, where s_ij is the
    low-discrepancy sequence i (sqrt(5) - 1) / 2 plus noise below 1 / 997, modulo 1. The sequence
    is computed in integers (Knuth 1998, sec. 6.4: 2654435769 / 2^32), so that it is as exact for
    the last image as for the first.

    Args:
      index: Index of each image in its split.
      keys: One key for each image.
      count: Number of times of an image.
    """
    noise = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
    product = index.astype(jnp.uint32) * jnp.uint32(2654435769)
    start = (product >> 8).astype(noise.dtype) / 2**24
    return stratum_time(jnp.arange(count), (start[:, None] + noise / 997) % 1, count)
