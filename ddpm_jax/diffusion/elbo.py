"""The terms of the variational bound, for one example, in nats (Ho et al. 2020, eq. 5).

    -log p(x_0) <= L_T + sum_{t > 1} L_{t-1} + L_0                                       (1)
    L_T = KL(q(x_T | x_0) || N(0, I)),  L_{t-1} = KL(q(x_s | x_t, x_0) || p(x_s | x_t)),
    L_0 = -log p(x_0 | x_1), for discrete grey values x_0

x_t is noisier than x_s, and s is one step of the noise schedule before t.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float

from ddpm_jax.diffusion.prediction import Prediction, Variance, reverse_log_variance
from ddpm_jax.diffusion.process import alpha_sigma, q_posterior

Scalar = Float[Array, ""]


def prior_kl(x0: Float[Array, "*event"], logsnr_1: Scalar) -> Scalar:
    """Return L_T = KL(N(alpha x_0, sigma^2 I) || N(0, I)) in nats.

    alpha and sigma belong to `logsnr_1`, the log signal-to-noise ratio at the noisiest time t = 1.

    >>> print(f"{prior_kl(jnp.ones(1), jnp.array(0.0)):.4f}")  # alpha^2 = 1/2: log(2) / 2
    0.3466
    """
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
    """Return L_{t-1} = KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats, where q and p are Gaussian.

    If q and p have equal variances, L_{t-1} is 1/2 (SNR_s - SNR_t) |x0 - x0_hat|^2 (Kingma et al.
    2021):

    >>> prediction, xt = Prediction(x0=jnp.ones(1), eps=jnp.zeros(1)), jnp.zeros(1)
    >>> nats = step_kl(prediction, jnp.zeros(1), xt, jnp.log(1.0), jnp.log(3.0))
    >>> print(f"{nats:.4f}")
    1.0000

    Args:
      prediction: The prediction of the denoiser at x_t.
      x0: The clean data, [*event].
      xt: The noisy data, [*event].
      logsnr_t: The log signal-to-noise ratio of x_t; it must be finite.
      logsnr_s: The log signal-to-noise ratio of the cleaner x_s; it must be finite.
      variance: The variance of p(x_s | x_t): "posterior", "beta" or "learned" (see
        `reverse_log_variance`).

    Raises:
      ValueError: If `variance` is "learned" and the prediction has no learned variance.
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
    """Return L_0 = -log p(x_0 | x_1) of discrete grey values, in nats (Ho et al. 2020, eq. 13).

    p is the probability of the bin around each grey value under N(prediction.x0, std^2). The first
    and the last bin extend to infinity, so that the probabilities of all grey values sum to 1.

    >>> prediction = Prediction(x0=jnp.zeros(1), eps=jnp.zeros(1))
    >>> print(f"{decoder_nll(prediction, jnp.ones(1), 0.1, levels=2):.4f}")  # log 2
    0.6931

    Args:
      prediction: The prediction of the denoiser at x_1; only its x0 is used.
      x0: The clean data, [*event]: multiples of 2 / (levels - 1) from -1 to 1.
      std: The standard deviation of the Gaussian, a scalar or [*event].
      levels: The number of grey values.
    """
    half = 1 / (levels - 1)
    low = jnp.where(x0 < -1 + half, -jnp.inf, (x0 - half - prediction.x0) / std)
    high = jnp.where(x0 > 1 - half, jnp.inf, (x0 + half - prediction.x0) / std)
    # By symmetry, both edges are moved to the lower tail, where the difference does not cancel.
    flip = low + high > 0
    low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    log_low, log_high = _log_ndtr(low), _log_ndtr(high)
    # log(exp(log_high) - exp(log_low)), masked so that no gradient of -inf is computed.
    inner = jnp.isfinite(log_low)
    difference = jnp.where(inner, jnp.where(inner, log_low, 0) - log_high, -1.0)
    # In the far tail the difference can round to 0.
    difference = jnp.minimum(difference, -jnp.finfo(difference.dtype).eps)
    log_mass = log_high + jnp.where(inner, jnp.log(-jnp.expm1(difference)), 0.0)
    return -jnp.sum(log_mass)


def _log_ndtr(x: Float[Array, "*event"]) -> Float[Array, "*event"]:
    """Return the log of the standard normal's distribution function, with an accurate derivative.

    Below -16 the result is an asymptotic series, because the derivative of jax's `log_ndtr` is
    inaccurate there.
    """
    tail = x < -16
    x_tail, x_body = jnp.where(tail, x, -16.0), jnp.where(tail, 0.0, x)
    u = 1 / jnp.square(x_tail)
    series = jnp.log1p(-u * (1 - 3 * u * (1 - 5 * u * (1 - 7 * u))))
    log_tail = -0.5 * jnp.square(x_tail) - jnp.log(-x_tail) - 0.5 * jnp.log(2 * jnp.pi) + series
    return jnp.where(tail, log_tail, log_ndtr(x_body))


def step_nats(
    prediction: Prediction,
    x0: Float[Array, "*event"],
    xt: Float[Array, "*event"],
    logsnr_t: Scalar,
    logsnr_s: Scalar,
    min_log_variance: Scalar,
    variance: Variance = "posterior",
    levels: int = 256,
) -> Scalar:
    """Return one term of the variational bound, in nats.

    The term is L_0 if `logsnr_s` is +inf, else L_{t-1}.

    Args:
      prediction: The prediction of the denoiser at x_t.
      x0: The clean data, [*event]: multiples of 2 / (levels - 1) from -1 to 1.
      xt: The noisy data, [*event].
      logsnr_t: The log signal-to-noise ratio of x_t.
      logsnr_s: The log signal-to-noise ratio of the cleaner x_s; +inf in L_0, where x_s is x_0.
      min_log_variance: The log of the variance of p(x_0 | x_1) in L_0, where the posterior
        variance is 0. Callers use the log of the posterior variance at t = 2 (code of Ho et al.
        2020 and of Nichol & Dhariwal 2021). If the variance is learned, its log in L_0 is between
        `min_log_variance` and log beta.
      variance: The variance of p(x_s | x_t) in L_{t-1}: "posterior", "beta" or "learned" (see
        `reverse_log_variance`).
      levels: The number of grey values.

    Raises:
      ValueError: If `variance` is "learned" and the prediction has no learned variance.
    """
    # The term that is not selected is computed with x0 instead of the prediction, so that its
    # gradient, which is multiplied by 0, is finite.
    clean = jnp.isposinf(logsnr_s)
    finite = jnp.where(clean, logsnr_t + 1.0, logsnr_s)
    for_kl = prediction._replace(x0=jnp.where(clean, x0, prediction.x0))
    kl = step_kl(for_kl, x0, xt, logsnr_t, finite, variance)
    log_variance = min_log_variance
    if prediction.variance_fraction is not None and variance == "learned":
        log_beta = jax.nn.log_sigmoid(-logsnr_t)
        log_variance += prediction.variance_fraction * (log_beta - min_log_variance)
    for_decoder = prediction._replace(x0=jnp.where(clean, prediction.x0, x0))
    nll = decoder_nll(for_decoder, x0, jnp.exp(0.5 * log_variance), levels)
    return jnp.where(clean, nll, kl)


def continuous_kl(prediction: Prediction, eps: Float[Array, "*event"], slope: Scalar) -> Scalar:
    """Return the integrand of the continuous-time diffusion loss at time t, in nats.

    The loss is the integral over t of 1/2 (-dlogsnr/dt) |eps - eps_hat|^2 (Kingma et al. 2021,
    eq. 17). `slope` is dlogsnr/dt at t.

    >>> prediction = Prediction(x0=jnp.zeros(2), eps=jnp.zeros(2))
    >>> print(continuous_kl(prediction, jnp.array([3.0, 4.0]), jnp.array(-2.0)))
    25.0
    """
    return -0.5 * slope * jnp.sum(jnp.square(eps - prediction.eps))


def bits_per_dim(nats: Float[Array, "*batch"], dims: int) -> Float[Array, "*batch"]:
    """Convert nats to bits per dimension, nats / (dims log 2), for `dims` dimensions per example.

    >>> print(f"{bits_per_dim(10 * jnp.log(2.0), dims=5):.1f}")
    2.0
    """
    return nats / (dims * jnp.log(2.0))
