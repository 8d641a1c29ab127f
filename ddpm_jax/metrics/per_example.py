"""Functions that compute metrics of every example of a split, and diffusion times for them."""

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

    The random numbers of an example depend only on `seed` and on the index of the example in the
    split. They are the same at every evaluation, so that evaluations differ only by the parameters.

    Args:
      compute: A function (*arguments, batch, keys) that returns a dictionary of arrays [B, ...]. It
        is compiled once for each set of static arguments.
      split: The examples.
      batch_size: Number of examples in a batch. It is rounded up to a multiple of the number of
        devices. The results do not depend on this number.
      seed: Seed of the random keys.
      partitioner: The object that partitions the batches across devices.
      arguments: The first arguments of `compute`, such as parameters.
      check: A function that is called before every batch. It may raise an exception that ends the
        evaluation.
      static_argnums: Positions of the static arguments of `compute`.

    Returns:
      A dictionary of float64 arrays [N, ...] with the names that `compute` returns.
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
    """Return `count` diffusion times for each image; the times of all images cover [0, 1) evenly.

    The times of image i are (j + s_ij) / count for j = 0 ... count - 1, where
    s_ij = (i (sqrt(5) - 1) / 2 + u_ij / 997) modulo 1 with uniform u_ij in [0, 1). The first term
    is a low-discrepancy sequence. It is computed in integers (Knuth 1998, sec. 6.4:
    2654435769 / 2^32), so that its rounding errors do not grow with i. The second term makes
    the times random; it is small, so that they remain evenly spaced.

    Args:
      index: Index of each image in the split, [B].
      keys: One key for each image, [B].
      count: Number of times for each image.
    """
    noise = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
    product = index.astype(jnp.uint32) * jnp.uint32(2654435769)
    start = (product >> 8).astype(noise.dtype) / 2**24
    return stratum_time(jnp.arange(count), (start[:, None] + noise / 997) % 1, count)
