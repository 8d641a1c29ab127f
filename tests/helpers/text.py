"""Parameters of networks, for tests of what reads text."""

import jax
import jax.numpy as jnp
import numpy as np


def drawn(init, *arguments, seed=1):
    """Parameters of the shapes that `init(key, *arguments)` makes; none is 0, so nothing hides.

    Drawn on the host, N(0, 0.1^2), scales around 1: `init` is not compiled.
    """
    draws = np.random.default_rng(seed)

    def one(path, leaf):
        made = 0.1 * draws.normal(size=leaf.shape) + (path[-1].key == "scale")
        return jnp.asarray(made, leaf.dtype)

    shapes = jax.eval_shape(init, jax.random.key(0), *arguments)
    return jax.tree_util.tree_map_with_path(one, shapes)
