"""Training losses of one example.

Every loss here is a weight times the mean squared error of eps:

    |v - v_hat|^2 = |eps - eps_hat|^2 / alpha^2,  |x0 - x0_hat|^2 = |eps - eps_hat|^2 / SNR  (1)
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpm_jax.diffusion.elbo import bits_per_dim, step_nats
from ddpm_jax.diffusion.prediction import Prediction

Scalar = Float[Array, ""]


def simple(prediction: Prediction, eps: Float[Array, "*event"]) -> Scalar:
    """L_simple: the mean over dimensions of |eps - eps_hat|^2 (Ho et al. 2020, eq. 14)."""
    return jnp.mean(jnp.square(eps - prediction.eps))


def variance_bound(
    prediction: Prediction,
    x0: Float[Array, "*event"],
    xt: Float[Array, "*event"],
    logsnr_t: Scalar,
    logsnr_s: Scalar,
    least: Scalar,
    steps: int,
    levels: int = 256,
) -> Scalar:
    """L_vlb in bits per dimension, whose gradient reaches the learned variance alone.

    `steps` times one step's part, the estimate of the whole sum from one step; its last step
    is the decoder's (Nichol & Dhariwal 2021, sec. 3.1: a stop-gradient on the mean).

    Args:
      prediction: the denoiser's, of x_t, with a learned variance.
      x0, xt: the data and x_t.
      logsnr_t, logsnr_s: of the noisier and the cleaner time; the cleaner one may be +inf.
      least: log of the variance that stands for the posterior's in the last step.
      steps: steps of the table of betas.
      levels: grey values of the data.
    """
    still = jax.lax.stop_gradient
    fixed = prediction._replace(x0=still(prediction.x0), eps=still(prediction.eps))
    nats = step_nats(fixed, x0, xt, logsnr_t, logsnr_s, least, "learned", levels)
    return steps * bits_per_dim(nats, x0.size)


def hybrid(mse: Array, vlb: Array, vlb_weight: float = 1e-3) -> Array:
    """Return L_simple + vlb_weight L_vlb (Nichol & Dhariwal 2021, eq. 16).

    Args:
      mse: `simple`, weighted or not.
      vlb: `variance_bound`.
      vlb_weight: lambda of the paper.
    """
    return mse + vlb_weight * vlb


# Weights of the squared error of eps.


def one(logsnr: Scalar) -> Scalar:
    """L_simple's weight, 1."""
    return jnp.ones_like(logsnr)


def v_weight(logsnr: Scalar) -> Scalar:
    """1 / alpha^2: the error of v (SNR + 1 on x0), eq. (1); EDM's with sigma_data = 1."""
    return 1 / jax.nn.sigmoid(logsnr)


def min_snr(logsnr: Scalar, most: float = 5.0) -> Scalar:
    """min(SNR, most) / SNR (Hang et al. 2023, eq. 8 for eps)."""
    return jnp.exp(jnp.minimum(jnp.log(most) - logsnr, 0.0))


def sigmoid_weight(logsnr: Scalar, bias: float = -1.0) -> Scalar:
    """S(bias - logsnr) (Kingma & Gao 2023, sec. 3; Hoogeboom et al. 2024, eq. 8)."""
    return jax.nn.sigmoid(bias - logsnr)


def edm_weight(logsnr: Scalar, sigma_data: float = 0.5) -> Scalar:
    """(sigma^2 + sigma_data^2) / sigma_data^2 with sigma^2 = 1 / SNR (Karras et al. 2022, tab. 1).

    EDM weighs the error of x0 by (sigma^2 + sigma_data^2) / (sigma sigma_data)^2; by eq. (1)
    that of eps by as much over SNR.
    """
    return 1 + jnp.exp(-logsnr) / sigma_data**2


WEIGHTS: dict[str, Callable[[Scalar], Scalar]] = {
    "simple": one,
    "v": v_weight,
    "min_snr": min_snr,
    "sigmoid": sigmoid_weight,
    "edm": edm_weight,
}
Weight = Literal["simple", "v", "min_snr", "sigmoid", "edm"]
