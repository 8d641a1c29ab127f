"""Random keys that depend only on (seed, purpose, step, index of the example).

The random numbers of a run are therefore the same on any number of devices, and a checkpoint does
not contain the state of a random number generator.
"""

import jax
from jaxtyping import Array, Int, Key

INIT, TRAIN, EVALUATE, SAMPLE = range(4)


def purpose_key(seed: int, purpose: int) -> Key[Array, ""]:
    """Return the key from which all keys of a purpose are derived.

    `purpose` is `INIT` (initial parameters), `TRAIN`, `EVALUATE` or `SAMPLE`.
    """
    return jax.random.fold_in(jax.random.key(seed), purpose)


def example_keys(
    key: Key[Array, ""], step: Int[Array, ""] | int, index: Int[Array, "batch"]
) -> Key[Array, "batch"]:
    """Return the key fold_in(fold_in(key, step), index) for every example of a training step.

    In sampling, `index` is the number of the image, so that image 7 does not depend on the size of
    the batch that contains image 7.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)


def split_keys(keys: Key[Array, "batch"], count: int) -> tuple[Key[Array, "batch"], ...]:
    """Split the key of each example into `count` keys, one for each use such as times or noise.

    Return `count` arrays of keys, [B].
    """
    split = jax.vmap(lambda key: jax.random.split(key, count))(keys)
    return tuple(split[:, purpose] for purpose in range(count))
