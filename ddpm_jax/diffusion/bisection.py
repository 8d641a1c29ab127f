"""The inverse of a decreasing function on [0, 1], computed by bisection."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array


def inverse_of_decreasing(decreasing: Callable[[Array], Array], value: Array) -> Array:
    """Return t in [0, 1] with decreasing(t) = value, for each element, with error at most 2^-41."""

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        above = decreasing(middle) > value
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    ends = jnp.zeros_like(value), jnp.ones_like(value)
    low, high = jax.lax.fori_loop(0, 40, halve, ends)
    middle: Array = (low + high) / 2
    return middle
