"""The forward process and its posterior, for one example (Ho et al. 2020, sec. 2).

    x_t = alpha x_0 + sigma eps,  alpha^2 = S(logsnr),  sigma^2 = S(-logsnr)             (1)
    q(x_s | x_t, x_0) = N(mean, variance),  where x_s is cleaner than x_t                (2)
    mean = (alpha_t sigma_s^2 / alpha_s sigma_t^2) x_t + alpha_s c x_0,
    variance = sigma_s^2 c,  c = 1 - exp(logsnr_t - logsnr_s)
    beta = 1 - alpha_t^2 / alpha_s^2, the variance that the step from s to t adds        (3)

S(x) = 1 / (1 + exp(-x)) is the logistic function.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = Float[Array, ""]


def alpha_sigma(logsnr: Float[Array, "*batch"]) -> tuple[Float[Array, "*batch"], ...]:
    """Return (alpha, sigma) of eq. (1), which are exact also at logsnr +inf and -inf.

    >>> alpha, sigma = alpha_sigma(jnp.log(3.0))  # SNR = alpha^2 / sigma^2 = 3
    >>> print(f"{alpha**2:.2f} {sigma**2:.2f}")
    0.75 0.25
    """
    log_sigmoid = jax.nn.log_sigmoid
    return jnp.exp(0.5 * log_sigmoid(logsnr)), jnp.exp(0.5 * log_sigmoid(-logsnr))


def q_sample(
    x0: Float[Array, "*event"], eps: Float[Array, "*event"], logsnr: Scalar
) -> Float[Array, "*event"]:
    """Return the x_t of eq. (1) for given noise eps (Ho et al. 2020, eq. 4).

    >>> xt = q_sample(jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0]), jnp.log(3.0))
    >>> print(f"{xt[0]:.3f} {xt[1]:.3f}")  # sigma = sqrt(1 / 4), alpha = sqrt(3 / 4)
    0.500 0.866
    """
    alpha, sigma = alpha_sigma(logsnr)
    return alpha * x0 + sigma * eps


def q_posterior(
    x0: Float[Array, "*event"], xt: Float[Array, "*event"], logsnr_t: Scalar, logsnr_s: Scalar
) -> tuple[Float[Array, "*event"], Scalar]:
    """Return (mean, variance) of q(x_s | x_t, x_0), eq. (2) (Ho et al. 2020, eq. 6-7).

    >>> mean, variance = q_posterior(jnp.ones(1), jnp.zeros(1), jnp.array(0.0), jnp.array(jnp.inf))
    >>> print(mean, variance)  # x_s is x_0
    [1.] 0.0

    Args:
      x0: The clean data, [*event].
      xt: The noisy data, [*event].
      logsnr_t: The log signal-to-noise ratio of x_t, less than `logsnr_s`.
      logsnr_s: The log signal-to-noise ratio of x_s; +inf for the clean data.
    """
    log_sigmoid = jax.nn.log_sigmoid
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    c = -jnp.expm1(logsnr_t - logsnr_s)
    log_alphas = 0.5 * (log_sigmoid(logsnr_t) - log_sigmoid(logsnr_s))
    weight = jnp.exp(log_alphas + log_sigmoid(-logsnr_s) - log_sigmoid(-logsnr_t))
    return weight * xt + alpha_s * c * x0, jnp.square(sigma_s) * c


def step_beta(logsnr_t: Scalar, logsnr_s: Scalar) -> Scalar:
    """Return beta, the variance that the forward step from s to t adds, eq. (3)."""
    return -jnp.expm1(jax.nn.log_sigmoid(logsnr_t) - jax.nn.log_sigmoid(logsnr_s))
