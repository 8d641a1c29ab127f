"""The type `Prediction` (x0 and eps), which losses, bounds, samplers and guidance use.

A network predicts one of eps, x0 and v. `to_prediction` converts its output to x0 and eps:

    eps:  x0 = (x_t - sigma eps) / alpha
    x0:   eps = (x_t - alpha x0) / sigma
    v:    v = alpha eps - sigma x0;  x0 = alpha x_t - sigma v,  eps = sigma x_t + alpha v

EDM's preconditioned network F with sigma_data = 1 predicts -v, because EDM's denoiser
D = c_skip x + c_out F is alpha x_t + sigma F for x = x_t / alpha (Karras et al. 2022, eq. 7;
Salimans & Ho 2022). Data with another sigma_data must be divided by sigma_data first.
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
    """The data x0 and the noise eps that a denoiser predicts, with alpha x0 + sigma eps = x_t.

    Attributes:
      x0: The predicted data, of the shape of x_t.
      eps: The predicted noise, of the shape of x_t.
      variance_fraction: The learned variance of p(x_s | x_t), as a fraction: 0 is the posterior
        variance, 1 is beta, and the log of the variance is interpolated (Nichol & Dhariwal 2021,
        eq. 15). If None, the variance is not learned.
    """

    x0: Float[Array, "..."]
    eps: Float[Array, "..."]
    variance_fraction: Float[Array, "..."] | None = None


# A function (x_t [B, *event], logsnr) -> Prediction, which includes parameters and conditioning.
Denoiser = Callable[[Array, Array], Prediction]


def to_prediction(
    prediction_type: PredictionType,
    out: Float[Array, "*event"],
    xt: Float[Array, "*event"],
    logsnr: Array,
) -> Prediction:
    """Convert the output of a network (eps, x0 or v) to a `Prediction` of x0 and eps.

    >>> xt, v = jnp.array([2**0.5]), jnp.array([0.0])
    >>> x0, eps, _ = to_prediction("v", v, xt, jnp.array(0.0))  # alpha = sigma = sqrt(1 / 2)
    >>> print(f"{x0[0]:.3f} {eps[0]:.3f}")
    1.000 1.000

    Args:
      prediction_type: The quantity that the network predicts: "eps", "x0" or "v".
      out: The output of the network, [*event].
      xt: The input x_t of the network, [*event].
      logsnr: The log signal-to-noise ratio of x_t.

    Raises:
      ValueError: If the prediction type is unknown.
    """
    alpha, sigma = alpha_sigma(logsnr)
    if prediction_type == "eps":
        return Prediction((xt - sigma * out) / alpha, out)
    if prediction_type == "x0":
        return Prediction(out, (xt - alpha * out) / sigma)
    if prediction_type == "v":
        return Prediction(alpha * xt - sigma * out, sigma * xt + alpha * out)
    raise ValueError(_unknown(prediction_type))


def from_prediction(
    prediction_type: PredictionType, prediction: Prediction, logsnr: Array
) -> Float[Array, "..."]:
    """Convert a `Prediction` to the output of a network (eps, x0 or v).

    This is the inverse of `to_prediction`.

    >>> prediction = Prediction(x0=jnp.array([0.0]), eps=jnp.array([2.0]))
    >>> print(from_prediction("v", prediction, -jnp.log(3.0)).round(3))  # alpha = 1 / 2
    [1.]

    Raises:
      ValueError: If the prediction type is unknown.
    """
    alpha, sigma = alpha_sigma(logsnr)
    if prediction_type == "eps":
        return prediction.eps
    if prediction_type == "x0":
        return prediction.x0
    if prediction_type == "v":
        return alpha * prediction.eps - sigma * prediction.x0
    raise ValueError(_unknown(prediction_type))


def _unknown(prediction_type: str) -> str:
    return f'the prediction type must be "eps", "x0" or "v", not "{prediction_type}"'


def with_x0(
    prediction: Prediction, x0: Float[Array, "..."], xt: Float[Array, "..."], logsnr: Array
) -> Prediction:
    """Return a prediction with a new x0 and with eps = (x_t - alpha x0) / sigma.

    Args:
      prediction: The old prediction, whose `variance_fraction` does not change.
      x0: The new x0, [*event].
      xt: The input x_t of the denoiser, [*event].
      logsnr: The log signal-to-noise ratio of x_t.
    """
    alpha, sigma = alpha_sigma(logsnr)
    return prediction._replace(x0=x0, eps=(xt - alpha * x0) / sigma)


def clip_x0(denoise: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """Return a denoiser that clips the predicted x0 to [low, high] and recomputes eps from x0."""

    def clipped(xt: Array, logsnr: Array) -> Prediction:
        prediction = denoise(xt, logsnr)
        return with_x0(prediction, jnp.clip(prediction.x0, low, high), xt, logsnr)

    return clipped


def threshold_x0(denoise: Denoiser, percentile: float = 99.5, max_value: float = 1.0) -> Denoiser:
    """Return a denoiser with dynamic thresholding of x0 (Saharia et al. 2022, sec. 2.3).

    The predicted x0 of each image is clipped to [-s, s] and multiplied by max_value / s, where s
    is the maximum of `max_value` and the percentile of |x0| over the pixels of the image.
    """

    def threshold(x0: Array) -> Array:
        s = jnp.maximum(jnp.percentile(jnp.abs(x0), percentile), max_value)
        return jnp.clip(x0, -s, s) * (max_value / s)

    def thresholded(xt: Array, logsnr: Array) -> Prediction:
        prediction = denoise(xt, logsnr)
        return with_x0(prediction, jax.vmap(threshold)(prediction.x0), xt, logsnr)

    return thresholded


def inpaint(denoise: Denoiser, images: Float[Array, "..."], mask: Float[Array, "..."]) -> Denoiser:
    """Return a denoiser whose x0 is mask * images + (1 - mask) * predicted x0, for inpainting.

    `images` has the shape of x_t; `mask` is 1 at given pixels and 0 at pixels to be sampled.
    """

    def constrained(xt: Array, logsnr: Array) -> Prediction:
        prediction = denoise(xt, logsnr)
        return with_x0(prediction, mask * images + (1 - mask) * prediction.x0, xt, logsnr)

    return constrained


def reverse_log_variance(
    prediction: Prediction, variance: Variance, logsnr_t: Array, logsnr_s: Array
) -> Array:
    """Return the log of the variance of p(x_s | x_t) (Ho et al. 2020, sec. 3.2).

    "posterior" is the variance of q(x_s | x_t, x_0), "beta" is the variance of the forward step
    from s to t, and "learned" interpolates between the logs of these two variances (Nichol &
    Dhariwal 2021, eq. 15).

    Args:
      prediction: The prediction at x_t, of which only `variance_fraction` is used.
      variance: The choice of the variance: "posterior", "beta" or "learned".
      logsnr_t: The log signal-to-noise ratio of the noisier x_t; it must be finite.
      logsnr_s: The log signal-to-noise ratio of the cleaner x_s; it must be finite.

    Raises:
      ValueError: If `variance` is "learned" and the prediction has no `variance_fraction`, or if
        `variance` is unknown.
    """
    _, posterior = q_posterior(jnp.zeros(()), jnp.zeros(()), logsnr_t, logsnr_s)
    log_posterior = jnp.log(posterior)
    log_beta = jnp.log(step_beta(logsnr_t, logsnr_s))
    if variance == "posterior":
        return log_posterior
    if variance == "beta":
        return log_beta
    if variance != "learned":
        raise ValueError(f'variance must be "posterior", "beta" or "learned", not "{variance}"')
    if prediction.variance_fraction is None:
        raise ValueError(
            'variance is "learned", but this network has not learned a variance; use "posterior" '
            'or "beta"'
        )
    return log_posterior + prediction.variance_fraction * (log_beta - log_posterior)
