"""Vector quantisation (van den Oord et al. 2017): the codebook's equations.

    i(z) = argmin_k |z - e_k|^2,  z_q = e_i(z)                                    (1)
    forward z_q, backward as if it were z: z + stop(z_q - z)                      (2)
    commitment  |z - stop(z_q)|^2                                                 (3)
    N_k <- g N_k + (1 - g) n_k,  m_k <- g m_k + (1 - g) sum of the z with i(z) = k,
    e_k = m_k / N_k                                                               (4)

(4), its appendix A.1, trains the codebook without gradients: it is carried, not trained.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DEAD = 0.1  # a code that fewer vectors of a batch fall to, on average, starts anew


class Codebook(NamedTuple):
    """The codes e_k, and eq. (4)'s moving averages N_k and m_k."""

    codes: Float[Array, "codes d"]
    sizes: Float[Array, "codes"]
    sums: Float[Array, "codes d"]


def codebook(codes: Float[Array, "codes d"]) -> Codebook:
    """Return a codebook to which no vector has been assigned yet."""
    return Codebook(codes, jnp.zeros(len(codes)), jnp.zeros_like(codes))


def nearest(z: Float[Array, "*places d"], codes: Float[Array, "codes d"]) -> Int[Array, "*places"]:
    """Eq. (1): which code is nearest."""
    squares = jnp.square(codes).sum(-1) - 2 * z @ codes.T  # but for |z|^2, the same for all
    return squares.argmin(-1)


def straight_through(z: Float[Array, "*z"], quantised: Float[Array, "*z"]) -> Float[Array, "*z"]:
    """Eq. (2): the value of `quantised`, whose gradient goes to z unchanged."""
    return z + jax.lax.stop_gradient(quantised - z)


def commitment(z: Float[Array, "*z"], quantised: Float[Array, "*z"]) -> Float[Array, ""]:
    """Eq. (3), the mean over dimensions."""
    return jnp.square(z - jax.lax.stop_gradient(quantised)).mean()


def update(book: Codebook, z: Float[Array, "vectors d"], keep: float = 0.99) -> Codebook:
    """Eq. (4) of one batch's vectors.

    A code that is (almost) never used becomes one of the batch's V vectors, spread over it: code k
    takes vector k s modulo V, with the s of `_stride`, and so those of every row and column.

    Args:
      keep: g, the share of the old averages that is kept.
    """
    count, vectors = len(book.codes), len(z)
    mine = jax.nn.one_hot(nearest(z, book.codes), count, dtype=z.dtype)
    sizes = keep * book.sizes + (1 - keep) * mine.sum(0)
    sums = keep * book.sums + (1 - keep) * mine.T @ z
    dead = (sizes < DEAD)[:, None]
    stride = _stride(vectors)
    fresh = z[jnp.array([code * stride % vectors for code in range(count)])]
    # One that starts anew counts as used once more than that, so that it has time to be found.
    alive = jnp.maximum(sizes, DEAD)
    codes = jnp.where(dead, fresh, sums / alive[:, None])
    sizes = jnp.where(dead[:, 0], 2 * DEAD, sizes)
    return Codebook(codes, sizes, jnp.where(dead, 2 * DEAD * fresh, sums))


def _stride(vectors: int) -> int:
    """Return the next number above V / golden ratio that has no factor in common with V.

    Its multiples modulo V are all of 0 ... V - 1, the first few of them evenly spread.
    """
    stride = round(vectors * 2 / (1 + 5**0.5))
    while any(stride % d == vectors % d == 0 for d in range(2, stride + 1)):
        stride += 1
    return stride


def perplexity(counts: Float[Array, "codes"]) -> Float[Array, ""]:
    """exp of the entropy of how often each code is used: 1 ... the number of codes."""
    shares = counts / jnp.maximum(counts.sum(), 1)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(shares, shares)))
