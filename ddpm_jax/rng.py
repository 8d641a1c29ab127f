"""Randomness as data: every draw is keyed by (seed, purpose, step, index of the example).

So a run is the same on any number of devices, and resuming needs no generator state.
"""

import jax
from jaxtyping import Array, Int, Key

INIT, TRAIN, EVALUATE, SAMPLE = range(4)


def purpose_key(seed: int, purpose: int) -> Key[Array, ""]:
    """Return the root of all draws for one purpose: `INIT`, `TRAIN`, `EVALUATE` or `SAMPLE`."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def example_keys(
    key: Key[Array, ""], step: Int[Array, ""] | int, index: Int[Array, "batch"]
) -> Key[Array, "batch"]:
    """Return a key for every example of a step: fold_in(fold_in(key, step), index).

    In sampling the index is the image's number, so that image 7 is image 7 in any batch.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)


def split_keys(keys: Key[Array, "batch"], count: int) -> tuple[Key[Array, "batch"], ...]:
    """Return `count` arrays of keys, one for each use of random numbers of an example."""
    split = jax.vmap(lambda key: jax.random.split(key, count))(keys)
    return tuple(split[:, purpose] for purpose in range(count))
