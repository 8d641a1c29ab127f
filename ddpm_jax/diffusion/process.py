"""The forward process and its posterior, for one example (Ho et al. 2020, sec. 2).

x_t = alpha x_0 + sigma eps,  alpha^2 = S(logsnr),  sigma^2 = S(-logsnr)             (1)
q(x_s | x_t, x_0) = N(mean, variance), s cleaner than t                              (2)
mean = (alpha_t sigma_s^2 / alpha_s sigma_t^2) x_t + alpha_s c x_0,
variance = sigma_s^2 c,  c = 1 - exp(logsnr_t - logsnr_s)
beta = 1 - alpha_t^2 / alpha_s^2, the variance that the forward step adds            (3)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = Float[Array, ""]


def alpha_sigma(logsnr: Float[Array, "*batch"]) -> tuple[Float[Array, "*batch"], ...]:
    """Return (alpha, sigma) of eq. (1), right at +inf and -inf too."""
    log_sigmoid = jax.nn.log_sigmoid
    return jnp.exp(0.5 * log_sigmoid(logsnr)), jnp.exp(0.5 * log_sigmoid(-logsnr))


def q_sample(
    x0: Float[Array, "*event"], eps: Float[Array, "*event"], logsnr: Scalar
) -> Float[Array, "*event"]:
    """Return a draw of q(x_t | x_0), eq. (1) (Ho et al. 2020, eq. 4)."""
    alpha, sigma = alpha_sigma(logsnr)
    return alpha * x0 + sigma * eps


def q_posterior(
    x0: Float[Array, "*event"], xt: Float[Array, "*event"], logsnr_t: Scalar, logsnr_s: Scalar
) -> tuple[Float[Array, "*event"], Scalar]:
    """Return (mean, variance) of q(x_s | x_t, x_0), eq. (2) (Ho et al. 2020, eq. 6-7).

    Args:
      logsnr_t, logsnr_s: of the noisier and the cleaner time; +inf is the data itself.
    """
    log_sigmoid = jax.nn.log_sigmoid
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    share = -jnp.expm1(logsnr_t - logsnr_s)
    log_alphas = 0.5 * (log_sigmoid(logsnr_t) - log_sigmoid(logsnr_s))
    keep = jnp.exp(log_alphas + log_sigmoid(-logsnr_s) - log_sigmoid(-logsnr_t))
    return keep * xt + alpha_s * share * x0, jnp.square(sigma_s) * share


def step_beta(logsnr_t: Scalar, logsnr_s: Scalar) -> Scalar:
    """Return the variance that the forward step from s to t adds, eq. (3)."""
    return -jnp.expm1(jax.nn.log_sigmoid(logsnr_t) - jax.nn.log_sigmoid(logsnr_s))
