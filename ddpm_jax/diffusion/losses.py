"""Training losses of one example, and weights of the squared error of eps.

The squared errors of v and x0 are multiples of the squared error of eps:

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
    """Return L_simple, the mean over dimensions of |eps - eps_hat|^2 (Ho et al. 2020, eq. 14).

    >>> prediction = Prediction(x0=jnp.zeros(2), eps=jnp.zeros(2))
    >>> print(simple(prediction, jnp.array([3.0, 4.0])))
    12.5
    """
    return jnp.mean(jnp.square(eps - prediction.eps))


def variance_bound(
    prediction: Prediction,
    x0: Float[Array, "*event"],
    xt: Float[Array, "*event"],
    logsnr_t: Scalar,
    logsnr_s: Scalar,
    min_log_variance: Scalar,
    steps: int,
    levels: int = 256,
) -> Scalar:
    """Return an estimate of the variational bound that trains only the learned variance.

    The estimate, in bits per dimension, is T times one term of the bound, and unbiased if t is
    uniform. The predicted mean has a stop-gradient (Nichol & Dhariwal 2021, sec. 3.1).

    Args:
      prediction: The prediction of the denoiser at x_t, with a learned variance.
      x0: The clean data, [*event]: multiples of 2 / (levels - 1) from -1 to 1.
      xt: The noisy data, [*event].
      logsnr_t: The log signal-to-noise ratio of x_t.
      logsnr_s: The log signal-to-noise ratio of the cleaner x_s; +inf if x_s is x_0.
      min_log_variance: The log of the smallest variance of p(x_0 | x_1); see `elbo.step_nats`.
      steps: The number of steps T of the noise schedule.
      levels: The number of grey values of the data.
    """
    stop = jax.lax.stop_gradient
    constant = prediction._replace(x0=stop(prediction.x0), eps=stop(prediction.eps))
    nats = step_nats(constant, x0, xt, logsnr_t, logsnr_s, min_log_variance, "learned", levels)
    return steps * bits_per_dim(nats, x0.size)


def hybrid(mse: Array, vlb: Array, vlb_weight: float = 1e-3) -> Array:
    """Return L_hybrid = L_simple + vlb_weight L_vlb (Nichol & Dhariwal 2021, eq. 16).

    `mse` is L_simple or a weighted squared error, and `vlb` is the result of `variance_bound`.
    """
    return mse + vlb_weight * vlb


# Weights of the squared error of eps; logsnr is the log signal-to-noise ratio of x_t.


def unit_weight(logsnr: Scalar) -> Scalar:
    """Return 1, the weight of the squared error of eps in L_simple."""
    return jnp.ones_like(logsnr)


def v_weight(logsnr: Scalar) -> Scalar:
    """Return the weight 1 / alpha^2 of the squared error of eps, which gives that of v, eq. (1).

    For the squared error of x0 the same weight is SNR + 1, which is EDM's for sigma_data = 1.

    >>> print(f"{v_weight(jnp.array(0.0)):.2f}")  # alpha^2 = 1/2
    2.00
    """
    return 1 / jax.nn.sigmoid(logsnr)


def min_snr(logsnr: Scalar, gamma: float = 5.0) -> Scalar:
    """Return the min-SNR weight of the squared error of eps (Hang et al. 2023, eq. 8).

    min(SNR, gamma) / SNR, which is min(SNR, gamma) for the squared error of x0.

    >>> print(f"{min_snr(jnp.log(10.0)):.2f}")
    0.50
    """
    return jnp.exp(jnp.minimum(jnp.log(gamma) - logsnr, 0.0))


def sigmoid_weight(logsnr: Scalar, bias: float = -1.0) -> Scalar:
    """Return the sigmoid weight 1 / (1 + exp(logsnr - bias)) of the squared error of eps.

    See Kingma & Gao 2023, sec. 3, and Hoogeboom et al. 2024, eq. 8.
    """
    return jax.nn.sigmoid(bias - logsnr)


def edm_weight(logsnr: Scalar, sigma_data: float = 0.5) -> Scalar:
    """Return EDM's weight of the squared error of eps (Karras et al. 2022, tab. 1).

    EDM multiplies the squared error of x0 by w = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2,
    with sigma^2 = 1 / SNR. By eq. (1) the weight for eps is w / SNR = 1 + sigma^2 / sigma_data^2.
    """
    return 1 + jnp.exp(-logsnr) / sigma_data**2


WEIGHTS: dict[str, Callable[[Scalar], Scalar]] = {
    "simple": unit_weight,
    "v": v_weight,
    "min_snr": min_snr,
    "sigmoid": sigmoid_weight,
    "edm": edm_weight,
}
Weight = Literal["simple", "v", "min_snr", "sigmoid", "edm"]
