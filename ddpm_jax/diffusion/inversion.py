"""Inversion of DDIM, which maps images to noise, and spherical interpolation of noise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpm_jax.diffusion.prediction import Denoiser
from ddpm_jax.diffusion.process import alpha_sigma


def invert(
    denoise: Denoiser, logsnrs: Float[Array, "grid"], x0: Float[Array, "batch *event"]
) -> Float[Array, "batch *event"]:
    """Return noise from which `samplers.ddim()` approximately samples x0 (Song et al. 2021).

    The function takes the steps of DDIM backwards, each with the prediction at its cleaner end.

    Args:
      denoise: The denoiser, which is called with finite logsnr only.
      logsnrs: The increasing grid with which `samplers.sample` is called. The inversion starts with
        alpha x0 at the largest finite entry; the last entry, +inf, is not used.
      x0: The images, [B, *event].
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
    """Return the spherical interpolation between a and b (Shoemake 1985, sec. 3.3).

    (sin((1 - f) angle) a + sin(f angle) b) / sin(angle), where f is `fraction` and `angle` is the
    angle between a and b. The result has about the norm of a and b, unlike linear interpolation.

    If a and b are parallel or opposite, or if a or b is 0, the arc from a to b is not unique, and
    the result is the linear interpolation (1 - f) a + f b.

    >>> print(slerp(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), 0.5).round(4))
    [0.7071 0.7071]

    Args:
      a: The noise at fraction 0, [*event].
      b: The noise at fraction 1, [*event].
      fraction: The position between a and b, from 0 to 1.
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
