"""Random parameters of networks for tests."""

import jax
import jax.numpy as jnp
import numpy as np


def random_params(init, *arguments, seed=1):
    """Return random parameters of the shapes of `init(key, *arguments)`, none of which is 0.

    They are sampled on the host from N(0, 0.1^2), or N(1, 0.1^2) for scales, without compiling
    `init`. A parameter that is 0 would hide errors of the layers before it.
    """
    rng = np.random.default_rng(seed)

    def parameter(path, leaf):
        values = 0.1 * rng.normal(size=leaf.shape) + (path[-1].key == "scale")
        return jnp.asarray(values, leaf.dtype)

    shapes = jax.eval_shape(init, jax.random.key(0), *arguments)
    return jax.tree_util.tree_map_with_path(parameter, shapes)
