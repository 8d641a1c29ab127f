"""Training losses of one example.

Every loss in this module is a weight times the mean squared error of eps:

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
    """Return an estimate of L_vlb in bits per dimension that trains only the learned variance.

    It is `steps` times the term of one step, which is unbiased for a uniformly sampled step. The
    predicted mean has a stop-gradient (Nichol & Dhariwal 2021, sec. 3.1).

    Args:
      prediction: The prediction of the denoiser at x_t, with a learned variance.
      x0: The clean data, [*event].
      xt: The noisy data, [*event].
      logsnr_t: The log signal-to-noise ratio at the noisier time t.
      logsnr_s: The log signal-to-noise ratio at the cleaner time s; +inf for the last step.
      min_log_variance: The log of the variance that replaces the posterior variance in the last
        step; see `elbo.step_nats`.
      steps: The number of steps of the table of betas.
      levels: The number of grey values of the data.
    """
    stop = jax.lax.stop_gradient
    constant = prediction._replace(x0=stop(prediction.x0), eps=stop(prediction.eps))
    nats = step_nats(constant, x0, xt, logsnr_t, logsnr_s, min_log_variance, "learned", levels)
    return steps * bits_per_dim(nats, x0.size)


def hybrid(mse: Array, vlb: Array, vlb_weight: float = 1e-3) -> Array:
    """Return L_hybrid = L_simple + vlb_weight L_vlb (Nichol & Dhariwal 2021, eq. 16).

    `mse` is L_simple, which may be weighted, and `vlb` is the result of `variance_bound`.
    """
    return mse + vlb_weight * vlb


# Weights of the squared error of eps.


def unit_weight(logsnr: Scalar) -> Scalar:
    """Return 1, the weight of L_simple."""
    return jnp.ones_like(logsnr)


def v_weight(logsnr: Scalar) -> Scalar:
    """Return 1 / alpha^2, which makes the loss the squared error of v, eq. (1).

    It weights the error of x0 by SNR + 1 and is EDM's weight for sigma_data = 1.

    >>> print(f"{v_weight(jnp.array(0.0)):.2f}")  # alpha^2 = 1/2
    2.00
    """
    return 1 / jax.nn.sigmoid(logsnr)


def min_snr(logsnr: Scalar, gamma: float = 5.0) -> Scalar:
    """Return min(SNR, gamma) / SNR (Hang et al. 2023, eq. 8, for eps).

    >>> print(f"{min_snr(jnp.log(10.0)):.2f}")
    0.50
    """
    return jnp.exp(jnp.minimum(jnp.log(gamma) - logsnr, 0.0))


def sigmoid_weight(logsnr: Scalar, bias: float = -1.0) -> Scalar:
    """Return S(bias - logsnr) (Kingma & Gao 2023, sec. 3; Hoogeboom et al. 2024, eq. 8)."""
    return jax.nn.sigmoid(bias - logsnr)


def edm_weight(logsnr: Scalar, sigma_data: float = 0.5) -> Scalar:
    """Return 1 + sigma^2 / sigma_data^2, sigma^2 = 1 / SNR (Karras et al. 2022, tab. 1).

    EDM multiplies the error of x0 by (sigma^2 + sigma_data^2) / (sigma sigma_data)^2. By eq. (1)
    the error of eps then has this weight divided by SNR.
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
