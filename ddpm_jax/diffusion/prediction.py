"""The one currency of losses, bounds, samplers and guidance: `Prediction(x0, eps)`.

    eps:  x0 = (x_t - sigma eps) / alpha
    x0:   eps = (x_t - alpha x0) / sigma
    v:    v = alpha eps - sigma x0;  x0 = alpha x_t - sigma v,  eps = sigma x_t + alpha v

EDM's preconditioned network F with sigma_data = 1 is -v: its D = c_skip x + c_out F is
alpha x_t + sigma F in these coordinates (Karras et al. 2022, eq. 7; Salimans & Ho 2022).
Data of another sigma_data is divided by it first.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpm_jax.diffusion.process import alpha_sigma, q_posterior, step_beta

PredictionType = Literal["eps", "x0", "v"]
Variance = Literal["posterior", "beta", "learned"]


class Prediction(NamedTuple):
    """What a denoiser says of x_t: the data and the noise in it, alpha x0 + sigma eps = x_t.

    `variance_fraction` interpolates log posterior variance -> log beta (Nichol & Dhariwal
    2021, eq. 15), where the network learns it.
    """

    x0: Float[Array, "..."]
    eps: Float[Array, "..."]
    variance_fraction: Float[Array, "..."] | None = None


Denoiser = Callable[[Array, Array], Prediction]  # (xt, logsnr), parameters and condition bound


def to_prediction(
    prediction_type: PredictionType,
    out: Float[Array, "*event"],
    xt: Float[Array, "*event"],
    logsnr: Array,
) -> Prediction:
    """Return a network's output as a `Prediction`.

    Args:
      prediction_type: what the network predicts.
      out: its output.
      xt: its input x_t.
      logsnr: of x_t.

    Raises:
      ValueError: an unknown prediction_type.
    """
    alpha, sigma = alpha_sigma(logsnr)
    if prediction_type == "eps":
        return Prediction((xt - sigma * out) / alpha, out)
    if prediction_type == "x0":
        return Prediction(out, (xt - alpha * out) / sigma)
    if prediction_type == "v":
        return Prediction(alpha * xt - sigma * out, sigma * xt + alpha * out)
    raise ValueError(f"a network predicts eps, x0 or v, not {prediction_type}")


def from_prediction(
    prediction_type: PredictionType, prediction: Prediction, logsnr: Array
) -> Float[Array, "..."]:
    """Return the network's output that would be read as `prediction`: the inverse of `read`.

    Raises:
      ValueError: an unknown prediction_type.
    """
    alpha, sigma = alpha_sigma(logsnr)
    if prediction_type == "eps":
        return prediction.eps
    if prediction_type == "x0":
        return prediction.x0
    if prediction_type == "v":
        return alpha * prediction.eps - sigma * prediction.x0
    raise ValueError(f"a network predicts eps, x0 or v, not {prediction_type}")


def with_x0(
    prediction: Prediction, x0: Float[Array, "..."], xt: Float[Array, "..."], logsnr: Array
) -> Prediction:
    """Return the prediction with another x0 and the eps that goes with it.

    Args:
      prediction: its learned variance, if any, is kept.
      x0: the new x0.
      xt: the input x_t of the denoiser.
      logsnr: of x_t.
    """
    alpha, sigma = alpha_sigma(logsnr)
    return prediction._replace(x0=x0, eps=(xt - alpha * x0) / sigma)


def clip_x0(denoise: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Return `denoise` with x0 clipped and eps made consistent again."""

    def clipped(xt: Array, logsnr: Array) -> Prediction:
        prediction = denoise(xt, logsnr)
        return with_x0(prediction, jnp.clip(prediction.x0, low, high), xt, logsnr)

    return clipped


def threshold_x0(denoise: Denoiser, percentile: float = 99.5, most: float = 1.0) -> Denoiser:
    """Return `denoise` with dynamic thresholding (Saharia et al. 2022, sec. 2.3), image by image.

    x0 is clipped to its own percentile of |x0|, where that exceeds `most`, and divided by it.
    """

    def threshold(x0: Array) -> Array:
        threshold = jnp.maximum(jnp.percentile(jnp.abs(x0), percentile), most)
        return jnp.clip(x0, -threshold, threshold) * (most / threshold)

    def thresholded(xt: Array, logsnr: Array) -> Prediction:
        prediction = denoise(xt, logsnr)
        return with_x0(prediction, jax.vmap(threshold)(prediction.x0), xt, logsnr)

    return thresholded


def inpaint(denoise: Denoiser, known: Float[Array, "..."], mask: Float[Array, "..."]) -> Denoiser:
    """Return `denoise` that knows the pixels where `mask` is 1: its x0 is `known` there."""

    def informed(xt: Array, logsnr: Array) -> Prediction:
        prediction = denoise(xt, logsnr)
        return with_x0(prediction, mask * known + (1 - mask) * prediction.x0, xt, logsnr)

    return informed


def reverse_log_variance(
    prediction: Prediction, variance: Variance, logsnr_t: Array, logsnr_s: Array
) -> Array:
    """Return log of the variance of p(x_s | x_t): the posterior's, beta, or between as learned.

    Args:
      prediction: read where the variance is learned.
      variance: "posterior", "beta" or "learned".
      logsnr_t, logsnr_s: of the noisier and the cleaner time; both finite.

    Raises:
      ValueError: "learned", and the network has learned none; an unknown variance.
    """
    _, posterior = q_posterior(jnp.zeros(()), jnp.zeros(()), logsnr_t, logsnr_s)
    log_posterior = jnp.log(posterior)
    log_beta = jnp.log(step_beta(logsnr_t, logsnr_s))
    if variance == "posterior":
        return log_posterior
    if variance == "beta":
        return log_beta
    if variance != "learned":
        raise ValueError(f"a variance is posterior, beta or learned, not {variance}")
    if prediction.variance_fraction is None:
        raise ValueError("this network has not learned a variance: use posterior or beta")
    return log_posterior + prediction.variance_fraction * (log_beta - log_posterior)
