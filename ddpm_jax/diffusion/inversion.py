"""Inversion of DDIM, from images to noise, and interpolation between two noises."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpm_jax.diffusion.prediction import Denoiser
from ddpm_jax.diffusion.process import alpha_sigma


def invert(
    denoise: Denoiser, logsnrs: Float[Array, "grid"], x0: Float[Array, "batch *event"]
) -> Float[Array, "batch *event"]:
    """Return the noise from which `samplers.ddim()` samples x0, approximately (Song et al. 2021).

    The steps of DDIM are taken backwards, with the prediction at the cleaner end of each step.

    Args:
      denoise: The denoiser; it is not called at +inf.
      logsnrs: The increasing grid of `samplers.sample`. x0 belongs to the last entry, +inf, and
        the first step from there uses the prediction at the largest finite entry.
      x0: The images.
    """
    down = logsnrs[:-1][::-1]
    alpha, _ = alpha_sigma(down[0])
    x = alpha * x0

    def step(x: Array, pair: Array) -> tuple[Array, None]:
        prediction = denoise(x, pair[0])
        alpha, sigma = alpha_sigma(pair[1])
        return alpha * prediction.x0 + sigma * prediction.eps, None

    noise: Array = jax.lax.scan(step, x, jnp.stack([down[:-1], down[1:]], -1))[0]
    return noise


def slerp(
    a: Float[Array, "*event"], b: Float[Array, "*event"], fraction: float | Array
) -> Float[Array, "*event"]:
    """Return a point of the great circle from a to b, which is noise if a and b are noise.

    (sin((1 - f) angle) a + sin(f angle) b) / sin(angle), f = `fraction` (Shoemake 1985, sec. 3.3)

    If a and b are parallel or opposite, or one of them is 0, the great circle is not unique, and
    the result is the point (1 - f) a + f b of the straight line.

    >>> print(slerp(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), 0.5).round(4))
    [0.7071 0.7071]

    Args:
      a: The first noise.
      b: The second noise.
      fraction: The position between a (0) and b (1).
    """
    square_a, square_b = jnp.sum(jnp.square(a)), jnp.sum(jnp.square(b))
    nonzero = (square_a > 0) & (square_b > 0)
    unit_a, unit_b = (
        x / jnp.sqrt(jnp.where(nonzero, n, 1.0)) for x, n in ((a, square_a), (b, square_b))
    )
    difference, total = (jnp.sum(jnp.square(x)) for x in (unit_a - unit_b, unit_a + unit_b))
    rounding = jnp.square(10 * jnp.finfo(difference.dtype).eps)
    curved = nonzero & (difference > rounding) & (total > rounding)
    # Both branches and their gradients are finite for all inputs.
    difference, total = jnp.where(curved, difference, 2.0), jnp.where(curved, total, 2.0)
    angle = 2 * jnp.arctan2(jnp.sqrt(difference), jnp.sqrt(total))
    arc = (jnp.sin((1 - fraction) * angle) * a + jnp.sin(fraction * angle) * b) / jnp.sin(angle)
    return jnp.where(curved, arc, (1 - fraction) * a + fraction * b)
