"""The inverse of a decreasing function on [0, 1], computed by bisection."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array


def inverse_of_decreasing(decreasing: Callable[[Array], Array], value: Array) -> Array:
    """Return the t in [0, 1] with decreasing(t) = value, by 40 bisections of [0, 1].

    The function `decreasing` maps t to values element by element. The result has the shape of
    `value` and an error of at most 2^-41.
    """

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        above = decreasing(middle) > value
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    ends = jnp.zeros_like(value), jnp.ones_like(value)
    low, high = jax.lax.fori_loop(0, 40, halve, ends)
    middle: Array = (low + high) / 2
    return middle
