"""Compute a function of every example of a split."""

from collections.abc import Callable
from typing import TypeVarTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.data.batches import evaluation_batches
from ddpm_jax.data.types import Batch, Split
from ddpm_jax.diffusion.grids import within
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
    """Return what a function computes of every example of a split, in its order.

    Args:
      compute: (*arguments, batch, keys) -> {name: [B, ...]}; compiled here, once for each function
        and its static arguments.
      split: the examples.
      batch_size: examples at a time, rounded up to what the devices divide; it changes no result.
      seed: with an example's place in the split, keys its random numbers: the same at every
        evaluation, so that two of them differ by the parameters alone.
      partitioner: the devices.
      arguments: what the function needs besides, such as parameters.
      check: called before every batch; may end the evaluation.
      static_argnums: arguments that are static.
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
    place: Int[Array, "batch"], keys: Key[Array, "batch"], count: int
) -> Float[Array, "batch count"]:
    """Return `count` times in [0, 1) for each image, together evenly spread over all images.

    An image's times are a comb, whose start is its place's in a low-discrepancy sequence:
    place (sqrt(5) - 1) / 2 modulo 1, in integers (Knuth 1998, sec. 6.4: 2654435769 / 2^32), so
    that any place is as exact as the first.
    """
    draws = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
    turn = place.astype(jnp.uint32) * jnp.uint32(2654435769)
    start = (turn >> 8).astype(draws.dtype) / 2**24
    return within(jnp.arange(count), (start[:, None] + draws / 997) % 1, count)
