"""The variational bound's terms, for one example, in nats (Ho et al. 2020, eq. 5).

-log p(x_0) <= L_T + sum_{t > 1} L_{t-1} + L_0                                       (1)
L_T = KL(q(x_T | x_0) || N(0, I)),  L_{t-1} = KL(q(x_s | x_t, x_0) || p(x_s | x_t)),
L_0 = -log p(x_0 | x_1), of discrete grey values
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float

from ddpm_jax.diffusion.prediction import Prediction, Variance, reverse_log_variance
from ddpm_jax.diffusion.process import alpha_sigma, q_posterior

Scalar = Float[Array, ""]


def prior_kl(x0: Float[Array, "*event"], logsnr_1: Scalar) -> Scalar:
    """L_T = KL(N(alpha x_0, sigma^2) || N(0, I)) at the noisiest time, in nats."""
    alpha, sigma = alpha_sigma(logsnr_1)
    log_variance = jax.nn.log_sigmoid(-logsnr_1)
    constant = jnp.square(sigma) - 1 - log_variance
    return 0.5 * jnp.sum(jnp.square(alpha * x0) + constant)


def step_kl(
    prediction: Prediction,
    x0: Float[Array, "*event"],
    xt: Float[Array, "*event"],
    logsnr_t: Scalar,
    logsnr_s: Scalar,
    variance: Variance = "posterior",
) -> Scalar:
    """L_{t-1} = KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of two Gaussians, in nats.

    Args:
      prediction: the denoiser's, of x_t.
      x0, xt: the data and x_t.
      logsnr_t, logsnr_s: of the noisier and the cleaner time; both finite.
      variance: of p(x_s | x_t).

    Raises:
      ValueError: `variance` is "learned" and the prediction has none.
    """
    mean_q, variance_q = q_posterior(x0, xt, logsnr_t, logsnr_s)
    mean_p, _ = q_posterior(prediction.x0, xt, logsnr_t, logsnr_s)
    log_p = reverse_log_variance(prediction, variance, logsnr_t, logsnr_s)
    log_ratio = jnp.log(variance_q) - log_p
    error = jnp.square(mean_q - mean_p) * jnp.exp(-log_p)
    return 0.5 * jnp.sum(error + jnp.expm1(log_ratio) - log_ratio)


def decoder_nll(
    prediction: Prediction, x0: Float[Array, "*event"], std: Array | float, levels: int = 256
) -> Scalar:
    """L_0 = -log p(x_0 | x_1) of discretised grey values, in nats (Ho et al. 2020, eq. 13).

    The Gaussian N(prediction.x0, std^2)'s mass in the bin around each value; the first and
    last bins reach to infinity, so that the masses of all values sum to one.

    Args:
      x0: multiples of 2 / (levels - 1) from -1 to 1.
      std: of the last step, a scalar or of the event's shape.
    """
    half = 1 / (levels - 1)
    low = jnp.where(x0 < -1 + half, -jnp.inf, (x0 - half - prediction.x0) / std)
    high = jnp.where(x0 > 1 - half, jnp.inf, (x0 + half - prediction.x0) / std)
    # By symmetry both edges are moved to the lower tail, where nothing cancels.
    flip = low + high > 0
    low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    log_low, log_high = _log_ndtr(low), _log_ndtr(high)
    # log(exp(log_high) - exp(log_low)); the mask keeps gradients of -inf away.
    inner = jnp.isfinite(log_low)
    difference = jnp.where(inner, jnp.where(inner, log_low, 0) - log_high, -1.0)
    difference = jnp.minimum(difference, -jnp.finfo(difference.dtype).eps)  # far out it rounds to 0
    log_mass = log_high + jnp.where(inner, jnp.log(-jnp.expm1(difference)), 0.0)
    return -jnp.sum(log_mass)


def _log_ndtr(x: Float[Array, "*event"]) -> Float[Array, "*event"]:
    """Return `log_ndtr`; below -16 its asymptotic series, whose derivative does not cancel."""
    far = x < -16
    tail, near = jnp.where(far, x, -16.0), jnp.where(far, 0.0, x)
    u = 1 / jnp.square(tail)
    series = jnp.log1p(-u * (1 - 3 * u * (1 - 5 * u * (1 - 7 * u))))
    log_tail = -0.5 * jnp.square(tail) - jnp.log(-tail) - 0.5 * jnp.log(2 * jnp.pi) + series
    return jnp.where(far, log_tail, log_ndtr(near))


def step_nats(
    prediction: Prediction,
    x0: Float[Array, "*event"],
    xt: Float[Array, "*event"],
    logsnr_t: Scalar,
    logsnr_s: Scalar,
    least: Scalar,
    variance: Variance = "posterior",
    levels: int = 256,
) -> Scalar:
    """L_{t-1}, or L_0 where `logsnr_s` is +inf: a step's part of the bound, in nats.

    Args:
      least: log of the variance that stands for the posterior's, which is 0, in the last step:
        the second step's (Ho et al. 2020's code; Nichol & Dhariwal 2021).  A fixed variance
        is this one there; a learned one lies between it and beta.

    Raises:
      ValueError: as `step_kl`.
    """
    # The branch that is not taken gets x0 itself for a prediction, so that its gradient, which is
    # multiplied by 0, is finite.
    clean = jnp.isposinf(logsnr_s)
    finite = jnp.where(clean, logsnr_t + 1.0, logsnr_s)
    at_step = prediction._replace(x0=jnp.where(clean, x0, prediction.x0))
    inner = step_kl(at_step, x0, xt, logsnr_t, finite, variance)
    log_variance = least
    if prediction.variance_fraction is not None and variance == "learned":
        log_beta = jax.nn.log_sigmoid(-logsnr_t)
        log_variance = least + prediction.variance_fraction * (log_beta - least)
    at_data = prediction._replace(x0=jnp.where(clean, prediction.x0, x0))
    last = decoder_nll(at_data, x0, jnp.exp(0.5 * log_variance), levels)
    return jnp.where(clean, last, inner)


def continuous_kl(prediction: Prediction, eps: Float[Array, "*event"], slope: Scalar) -> Scalar:
    """Return the integrand over t of the continuous-time diffusion loss, in nats.

    1/2 (-dlogsnr/dt) |eps - eps_hat|^2 (Kingma et al. 2021, eq. 17)

    Args:
      slope: dlogsnr/dt at t.
    """
    return -0.5 * slope * jnp.sum(jnp.square(eps - prediction.eps))


def bits_per_dim(nats: Float[Array, "*batch"], dims: int) -> Float[Array, "*batch"]:
    """Return nats / (dims log 2)."""
    return nats / (dims * jnp.log(2.0))
