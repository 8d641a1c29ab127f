"""Guidance composes denoisers: scale 0 is unconditional, 1 conditional.

So it is with a classifier beside an unconditional denoiser, where 1 is Bayes' rule,
p(x | y) ~ p(x) p(y | x); 0 leaves the denoiser alone, whatever it is.  In autoguidance 0 is the
worse model and 1 the good one alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpm_jax.diffusion.prediction import Denoiser, Prediction, with_x0
from ddpm_jax.diffusion.process import alpha_sigma


def combine(conditional: Prediction, unconditional: Prediction, scale: float | Array) -> Prediction:
    """unconditional + scale (conditional - unconditional) (Ho & Salimans 2022, eq. 6).

    Autoguidance is the same with a worse model in the second place (Karras et al. 2024).
    """
    return Prediction(
        unconditional.x0 + scale * (conditional.x0 - unconditional.x0),
        unconditional.eps + scale * (conditional.eps - unconditional.eps),
        conditional.variance_fraction,
    )


def classifier_free(
    conditional: Denoiser, unconditional: Denoiser, scale: float | Array
) -> Denoiser:
    """The combination of two denoisers."""
    return lambda xt, logsnr: combine(conditional(xt, logsnr), unconditional(xt, logsnr), scale)


def limited(guided: Denoiser, plain: Denoiser, low: float, high: float) -> Denoiser:
    """`guided` where low <= logsnr <= high, else `plain` (Kynkaanniemi et al. 2024)."""

    def denoise(xt, logsnr):
        inside = (low <= logsnr) & (logsnr <= high)
        return jax.lax.cond(inside, guided, plain, xt, logsnr)

    return denoise


def rescaled(
    guided: Prediction, conditional: Prediction, xt: Float[Array, "..."], logsnr: Array,
    share: float = 0.7,
) -> Prediction:  # fmt: skip
    """Guided x0 scaled back, image by image, to the conditional one's deviation.

    x0 = share (std_conditional / std_guided) x0 + (1 - share) x0 (Lin et al. 2024, eq. 14-16).
    An image of one value has no deviation (but for rounding) and stays as it is.
    """

    def one(x0, target):
        rounding = 10 * jnp.finfo(x0.dtype).eps * jnp.abs(x0).max()
        varied, target_varied = x0.var() > jnp.square(rounding), target.var() > 0
        std = jnp.sqrt(jnp.where(varied, x0.var(), 1.0))
        target_std = jnp.where(
            target_varied, jnp.sqrt(jnp.where(target_varied, target.var(), 1)), 0
        )
        return jnp.where(varied, x0 * (share * target_std / std + 1 - share), x0)

    return with_x0(guided, jax.vmap(one)(guided.x0, conditional.x0), xt, logsnr)


def classifier(
    denoise: Denoiser,
    log_likelihood: Callable[[Array, Array], Float[Array, "batch"]],
    scale: float | Array,
) -> Denoiser:
    """eps - scale sigma grad_x log p(y | x_t) (Dhariwal & Nichol 2021, alg. 2).

    Args:
      log_likelihood: (xt, logsnr) -> log p(y | x_t) of each image.
    """

    def guided(xt, logsnr):
        prediction = denoise(xt, logsnr)
        slope = jax.grad(lambda xt: log_likelihood(xt, logsnr).sum())(xt)
        alpha, sigma = alpha_sigma(logsnr)
        x0 = prediction.x0 + scale * jnp.square(sigma) / alpha * slope
        return with_x0(prediction, x0, xt, logsnr)

    return guided
