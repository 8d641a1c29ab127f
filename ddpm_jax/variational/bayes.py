"""Bayes' rule for models whose posterior and evidence are known exactly.

    p(z|x) = p(x|z) p(z) / p(x)                                                          (1)
    log p(x) = ELBO(q) + KL(q(z) || p(z|x))                                              (2)

The tests and `notebooks/tour.ipynb` compare the ELBO with these exact values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import betaln
from jaxtyping import Array, Float


class Beta(NamedTuple):
    """The distribution Beta(a, b) of the probability that a coin shows heads."""

    a: float
    b: float


def coin_posterior(prior: Beta, heads: int, tails: int) -> Beta:
    """Return the posterior of the probability of heads after heads + tails tosses, eq. (1).

    >>> coin_posterior(Beta(1, 1), heads=7, tails=3)  # the prior is uniform
    Beta(a=8, b=4)
    """
    return Beta(prior.a + heads, prior.b + tails)


def coin_log_evidence(prior: Beta, heads: int, tails: int) -> Float[Array, ""]:
    """Return the log probability of `heads` heads in n = heads + tails tosses, in nats.

    log C(n, heads) + log B(a + heads, b + tails) - log B(a, b), where C is the binomial
    coefficient and B the beta function. If the prior is uniform, all n + 1 results are equally
    probable:

    >>> print(f"{1 / jnp.exp(coin_log_evidence(Beta(1, 1), heads=7, tails=3)):.2f}")  # n + 1
    11.00
    """
    after = coin_posterior(prior, heads, tails)
    log_choose = -jnp.log(heads + tails + 1.0) - betaln(heads + 1.0, tails + 1.0)
    return log_choose + betaln(after.a, after.b) - betaln(prior.a, prior.b)


class LinearGaussian(NamedTuple):
    """The model z ~ N(0, I), x | z ~ N(W z + bias, variance I), whose posterior is known exactly.

    W is the field `weights`.

    >>> model = LinearGaussian(jnp.eye(1), jnp.zeros(1), jnp.array(1.0))
    >>> mean, covariance = linear_gaussian_posterior(model, x=jnp.array([2.0]))
    >>> print(mean, covariance)  # N(x / 2, 1 / 2)
    [1.] [[0.5]]
    """

    weights: Float[Array, "x z"]
    bias: Float[Array, "x"]
    variance: Float[Array, ""]


def linear_gaussian_log_evidence(model: LinearGaussian, x: Float[Array, "x"]) -> Float[Array, ""]:
    """Return log p(x) = log N(x; bias, W W^T + variance I) in nats (Bishop 2006, eq. 12.35)."""
    dims = x.shape[0]
    covariance = model.weights @ model.weights.T + model.variance * jnp.eye(dims)
    logpdf = jax.scipy.stats.multivariate_normal.logpdf(x, model.bias, covariance)
    return jnp.asarray(logpdf)


def linear_gaussian_posterior(
    model: LinearGaussian, x: Float[Array, "x"]
) -> tuple[Float[Array, "z"], Float[Array, "z z"]]:
    """Return (mean, covariance) of p(z|x) (Bishop 2006, eq. 12.42).

    M = W^T W + variance I;  mean = M^-1 W^T (x - bias);  covariance = variance M^-1
    """
    inner = model.weights.T @ model.weights
    inner = inner + model.variance * jnp.eye(inner.shape[0])
    mean = jnp.linalg.solve(inner, model.weights.T @ (x - model.bias))
    return mean, model.variance * jnp.linalg.inv(inner)


def gaussian_kl(
    mean_q: Float[Array, "d"],
    covariance_q: Float[Array, "d d"],
    mean_p: Float[Array, "d"],
    covariance_p: Float[Array, "d d"],
) -> Float[Array, ""]:
    """Return KL(q || p) of two Gaussians with full covariances, in nats.

    1/2 (tr(P^-1 Q) + (m_p - m_q)^T P^-1 (m_p - m_q) - d + log det P - log det Q)

    Args:
      mean_q: The mean of q, [d].
      covariance_q: The covariance Q of q, [d, d].
      mean_p: The mean of p, [d].
      covariance_p: The covariance P of p, [d, d], which must be invertible.
    """
    shift = mean_p - mean_q
    trace = jnp.trace(jnp.linalg.solve(covariance_p, covariance_q))
    quadratic = shift @ jnp.linalg.solve(covariance_p, shift)
    log_dets = jnp.linalg.slogdet(covariance_p)[1] - jnp.linalg.slogdet(covariance_q)[1]
    kl: Array = 0.5 * (trace + quadratic - mean_q.shape[0] + log_dets)
    return kl
