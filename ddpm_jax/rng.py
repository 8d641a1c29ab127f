"""Random keys as data: every key depends only on (seed, purpose, step, index of the example).

A run is therefore the same on any number of devices, and a resumed run needs no generator state.
"""

import jax
from jaxtyping import Array, Int, Key

INIT, TRAIN, EVALUATE, SAMPLE = range(4)


def purpose_key(seed: int, purpose: int) -> Key[Array, ""]:
    """Return the root key of one purpose: `INIT`, `TRAIN`, `EVALUATE` or `SAMPLE`."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


def example_keys(
    key: Key[Array, ""], step: Int[Array, ""] | int, index: Int[Array, "batch"]
) -> Key[Array, "batch"]:
    """Return a key for every example of a step: fold_in(fold_in(key, step), index).

    In sampling, the index is the number of the image, so that image 7 does not depend on the
    size of the batch that contains it.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)


def split_keys(keys: Key[Array, "batch"], count: int) -> tuple[Key[Array, "batch"], ...]:
    """Return `count` arrays of keys, one array for each use of random numbers by an example."""
    split = jax.vmap(lambda key: jax.random.split(key, count))(keys)
    return tuple(split[:, purpose] for purpose in range(count))
