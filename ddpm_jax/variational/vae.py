"""The variational autoencoder's equations, for one example (Kingma & Welling 2014).

    log p(x) >= ELBO = E_{q(z|x)}[log p(x|z)] - KL(q(z|x) || p(z))                       (1)
    z = mean + exp(logvar / 2) eps,  eps ~ N(0, I)                                       (2)
    log p(x) >= E[log (1/k) sum_i p(x|z_i) p(z_i) / q(z_i|x)] >= ELBO                    (3)

Everything is in nats and summed over dimensions, so that (1) is a bound; `jax.vmap` makes
batches of it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOG_2PI = 1.8378770664093453


def reparameterize(
    mean: Float[Array, "*latent"], logvar: Float[Array, "*latent"], eps: Float[Array, "*latent"]
) -> Float[Array, "*latent"]:
    """Return a draw of q(z|x) as a differentiable function of its parameters, eq. (2).

    Args:
      mean, logvar: of the diagonal Gaussian q(z|x).
      eps: standard normal noise, already drawn.
    """
    return mean + jnp.exp(0.5 * logvar) * eps


def kl_to_standard_normal(
    mean: Float[Array, "*latent"], logvar: Float[Array, "*latent"]
) -> Float[Array, ""]:
    """KL(N(mean, exp(logvar)) || N(0, I)) in nats (Kingma & Welling 2014, app. B).

    1/2 sum(mean^2 + exp(logvar) - 1 - logvar)
    """
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.expm1(logvar) - logvar)


def bernoulli_nll(logits: Float[Array, "*event"], x: Float[Array, "*event"]) -> Float[Array, ""]:
    """-log p(x) of independent Bernoulli pixels in nats, summed.

    x softplus(-logit) + (1 - x) softplus(logit), as log(1 + exp(-|logit|)) and |logit| times
    the share that it is wrong about, which cancels nothing: exact for any logit, infinite ones
    that are right about a pixel included.

    Args:
      logits: log-odds of a 1.
      x: 0 or 1 (between them, the cross-entropy).
    """
    largest = jnp.finfo(logits.dtype).max
    logits = jnp.clip(logits, -largest, largest)  # 0 * inf is not 0
    positive = logits > 0
    size = jnp.where(positive, logits, -logits)  # whose slope at 0 is not 0, as abs's would be
    wrong = jnp.where(positive, 1 - x, x) * size
    return jnp.sum(wrong + jnp.log1p(jnp.exp(-size)))


def gaussian_nll(
    mean: Float[Array, "*event"], logvar: Float[Array, "..."], x: Float[Array, "*event"]
) -> Float[Array, ""]:
    """-log N(x; mean, exp(logvar)) in nats, summed over dimensions.

    With a fixed logvar this is the squared error over 2 exp(logvar), up to a constant.

    Args:
      mean: of the event's shape.
      logvar: of a shape that broadcasts to it: a scalar is one variance for all.
    """
    return 0.5 * jnp.sum(jnp.square(x - mean) * jnp.exp(-logvar) + logvar + LOG_2PI)


def elbo(
    nll: Float[Array, "*batch"], kl: Float[Array, "*batch"], beta: float = 1.0
) -> Float[Array, "*batch"]:
    """ELBO = -nll - beta kl in nats, eq. (1); with beta != 1 the objective of the beta-VAE.

    beta = 1 alone is the variational bound (beta > 1 lies below it); beta = 0 is the
    autoencoder (Higgins et al. 2017).
    """
    return -nll - beta * kl


def log_weight(
    nll: Float[Array, ""],
    z: Float[Array, "*latent"],
    mean: Float[Array, "*latent"],
    logvar: Float[Array, "*latent"],
) -> Float[Array, ""]:
    """log p(x|z) p(z) / q(z|x), whose mean over q(z|x) is the ELBO.

    Args:
      nll: -log p(x|z) in nats.
      z: a draw of q(z|x) = N(mean, exp(logvar)).
    """
    return -nll - gaussian_nll(jnp.zeros_like(z), jnp.zeros(()), z) + gaussian_nll(mean, logvar, z)


def iwae_bound(log_weights: Float[Array, "samples"]) -> Float[Array, ""]:
    """Return the importance-weighted bound log (1/k) sum_i w_i in nats, eq. (3).

    It is the ELBO's estimate for k = 1, does not fall with k in expectation, and tends to
    log p(x) (Burda et al. 2016, eq. 8).
    """
    return jax.nn.logsumexp(log_weights) - jnp.log(log_weights.shape[0])


def density_to_bits_per_dim(
    nats: Float[Array, "*batch"], dims: int, levels: int
) -> Float[Array, "*batch"]:
    """Bits per dimension of grey values in `levels` steps from a density on [-1, 1].

    With uniform dequantisation noise of a bin's width, 2 / levels, the density's
    -log p in nats bounds the discrete code's length: -log P <= nats + dims log(levels / 2)
    (Theis et al. 2016, sec. 3.1).
    """
    return (nats / dims + jnp.log(levels / 2.0)) / jnp.log(2.0)
