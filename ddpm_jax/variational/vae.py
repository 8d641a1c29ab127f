"""The equations of the variational autoencoder, for one example (Kingma & Welling 2014).

    log p(x) >= ELBO = E_{q(z|x)}[log p(x|z)] - KL(q(z|x) || p(z))                       (1)
    z = mean + exp(logvar / 2) eps,  eps ~ N(0, I)                                       (2)
    log p(x) >= E[log (1/k) sum_i p(x|z_i) p(z_i) / q(z_i|x)] >= ELBO                    (3)

All terms are in nats and summed over dimensions, as (1) requires. Use `jax.vmap` for batches.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOG_2PI = 1.8378770664093453


def reparameterize(
    mean: Float[Array, "*latent"], logvar: Float[Array, "*latent"], eps: Float[Array, "*latent"]
) -> Float[Array, "*latent"]:
    """Return a sample of q(z|x) = N(mean, exp(logvar)) as a function of the noise eps, eq. (2).

    >>> print(reparameterize(jnp.ones(1), jnp.zeros(1), eps=jnp.full(1, 2.0)))
    [3.]
    """
    return mean + jnp.exp(0.5 * logvar) * eps


def kl_to_standard_normal(
    mean: Float[Array, "*latent"], logvar: Float[Array, "*latent"]
) -> Float[Array, ""]:
    """Return KL(N(mean, exp(logvar)) || N(0, I)) in nats (Kingma & Welling 2014, app. B).

    1/2 sum(mean^2 + exp(logvar) - 1 - logvar)

    >>> print(kl_to_standard_normal(jnp.array([1.0, 2.0]), jnp.zeros(2)))
    2.5
    """
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.expm1(logvar) - logvar)


def bernoulli_nll(logits: Float[Array, "*event"], x: Float[Array, "*event"]) -> Float[Array, ""]:
    """Return -log p(x) of independent Bernoulli pixels in nats, summed over pixels.

    x softplus(-logit) + (1 - x) softplus(logit), computed without cancellation as
    log(1 + exp(-|logit|)) + |logit| w, where w = 1 - x for a positive logit, else x. The result is
    exact for every finite logit, and for an infinite logit if the pixel has probability 1.

    >>> print(f"{bernoulli_nll(jnp.zeros(3), jnp.ones(3)):.4f}")  # 3 log 2
    2.0794

    Args:
      logits: The log-odds of x = 1, [*event].
      x: The pixels, 0 or 1, [*event]. For values between 0 and 1 the result is the cross-entropy.
    """
    largest = jnp.finfo(logits.dtype).max
    logits = jnp.clip(logits, -largest, largest)  # 0 * inf is not 0
    positive = logits > 0
    size = jnp.where(positive, logits, -logits)  # unlike abs, its gradient at 0 is not 0
    wrong = jnp.where(positive, 1 - x, x) * size
    return jnp.sum(wrong + jnp.log1p(jnp.exp(-size)))


def gaussian_nll(
    mean: Float[Array, "*event"], logvar: Float[Array, "..."], x: Float[Array, "*event"]
) -> Float[Array, ""]:
    """Return -log N(x; mean, exp(logvar)) in nats, summed over dimensions.

    For a constant logvar, the result is the squared error / (2 exp(logvar)) plus a constant.

    >>> print(f"{gaussian_nll(jnp.zeros(2), jnp.array(0.0), jnp.zeros(2)):.4f}")  # log(2 pi)
    1.8379

    Args:
      mean: The mean, [*event].
      logvar: The log of the variance, [*event] or a scalar, which applies to all dimensions.
      x: The data, [*event].
    """
    return 0.5 * jnp.sum(jnp.square(x - mean) * jnp.exp(-logvar) + logvar + LOG_2PI)


def elbo(
    nll: Float[Array, "*batch"], kl: Float[Array, "*batch"], beta: float = 1.0
) -> Float[Array, "*batch"]:
    """Return the evidence lower bound (ELBO), -nll - beta kl in nats, eq. (1) for beta = 1.

    For beta > 1 the result is the objective of the beta-VAE, which is less than the ELBO (Higgins
    et al. 2017). For beta = 0 it is the objective of an autoencoder.

    >>> print(elbo(nll=jnp.array(80.0), kl=jnp.array(20.0)))
    -100.0
    """
    return -nll - beta * kl


def log_weight(
    nll: Float[Array, ""],
    z: Float[Array, "*latent"],
    mean: Float[Array, "*latent"],
    logvar: Float[Array, "*latent"],
) -> Float[Array, ""]:
    """Return log p(x|z) p(z) / q(z|x) in nats, whose mean over q(z|x) is the ELBO.

    Args:
      nll: The negative log-likelihood -log p(x|z) in nats, a scalar.
      z: A sample of q(z|x) = N(mean, exp(logvar)), [*latent].
      mean: The mean of q(z|x), [*latent].
      logvar: The log of the variance of q(z|x), [*latent].
    """
    return -nll - gaussian_nll(jnp.zeros_like(z), jnp.zeros(()), z) + gaussian_nll(mean, logvar, z)


def iwae_bound(log_weights: Float[Array, "samples"]) -> Float[Array, ""]:
    """Return the importance-weighted bound log (1/k) sum_i w_i in nats, eq. (3).

    The argument contains k values log w_i from `log_weight`. With k = 1 the result is an estimate
    of the ELBO. The expectation of the result does not decrease with k and converges to log p(x)
    (Burda et al. 2016, eq. 8).

    >>> print(f"{iwae_bound(jnp.log(jnp.array([1.0, 3.0]))):.4f}")  # log 2
    0.6931
    """
    return jax.nn.logsumexp(log_weights) - jnp.log(log_weights.shape[0])


def density_to_bits_per_dim(
    nats: Float[Array, "*batch"], dims: int, levels: int
) -> Float[Array, "*batch"]:
    """Convert nats = -log p(x) of a density on [-1, 1]^dims to bits per dimension of grey values.

    x is a vector of grey values, each with uniform noise of the width 2 / levels of a bin. Then the
    probability P of the grey values satisfies -log P <= nats + dims log(levels / 2) (Theis et al.
    2016, sec. 3.1).

    >>> print(density_to_bits_per_dim(10 * jnp.log(2.0), dims=10, levels=256))  # uniform density
    8.0
    """
    return (nats / dims + jnp.log(levels / 2.0)) / jnp.log(2.0)
