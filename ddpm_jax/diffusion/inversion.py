"""The noise that DDIM leads from to an image, and noise between two noises."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpm_jax.diffusion.prediction import Denoiser
from ddpm_jax.diffusion.process import alpha_sigma


def invert(
    denoise: Denoiser, logsnrs: Float[Array, "grid"], x0: Float[Array, "batch *event"]
) -> Float[Array, "batch *event"]:
    """Return the noise from which `samplers.ddim()` leads to x0 (Song et al. 2021).

    Its steps are taken backwards.

    Args:
      logsnrs: rising, as for `samplers.sample`; the last, +inf, is where x0 lies, and the first
        step back from it takes the prediction of the cleanest finite entry.
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
    a: Float[Array, "*event"], b: Float[Array, "*event"], share: float | Array
) -> Float[Array, "*event"]:
    """Return the point of the great circle from a to b: noise between two noises stays noise.

    (sin((1 - share) angle) a + sin(share angle) b) / sin(angle) (Shoemake 1985, sec. 3.3).  Where
    a and b fix no great circle (they are parallel or opposite, or one is 0), the point of the
    straight line, (1 - share) a + share b.

    Args:
      share: 0 gives a, 1 gives b.
    """
    size_a, size_b = jnp.sum(jnp.square(a)), jnp.sum(jnp.square(b))
    nonzero = (size_a > 0) & (size_b > 0)
    unit_a, unit_b = (
        x / jnp.sqrt(jnp.where(nonzero, n, 1.0)) for x, n in ((a, size_a), (b, size_b))
    )
    apart, together = jnp.sum(jnp.square(unit_a - unit_b)), jnp.sum(jnp.square(unit_a + unit_b))
    least = jnp.square(10 * jnp.finfo(apart.dtype).eps)
    curved = nonzero & (apart > least) & (together > least)
    # Both branches are finite everywhere, and so are their gradients.
    apart, together = jnp.where(curved, apart, 2.0), jnp.where(curved, together, 2.0)
    angle = 2 * jnp.arctan2(jnp.sqrt(apart), jnp.sqrt(together))
    arc = (jnp.sin((1 - share) * angle) * a + jnp.sin(share * angle) * b) / jnp.sin(angle)
    return jnp.where(curved, arc, (1 - share) * a + share * b)
