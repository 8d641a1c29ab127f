"""Vector quantisation with a codebook (van den Oord et al. 2017).

    i(z) = argmin_k |z - e_k|^2,  z_q = e_i(z)                                    (1)
    forward z_q, backward as if it were z: z + stop(z_q - z)                      (2)
    commitment  |z - stop(z_q)|^2                                                 (3)
    N_k <- g N_k + (1 - g) n_k,  m_k <- g m_k + (1 - g) sum of the z with i(z) = k,
    e_k = m_k / N_k                                                               (4)

z is a vector of the encoder's output, and e_k is vector k of the codebook. Eq. (4) (app. A.1)
updates the codebook by moving averages (n_k: number of vectors z of the batch with i(z) = k)
instead of gradients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

DEAD = 0.1  # a codebook vector e_k with N_k below this number is replaced


class Codebook(NamedTuple):
    """A codebook with its moving averages, eq. (4).

    Attributes:
      codes: The codebook vectors e_k.
      sizes: N_k, the average number of vectors z of a batch whose nearest codebook vector is e_k.
      sums: m_k, the average sum of these vectors z.
    """

    codes: Float[Array, "codes d"]
    sizes: Float[Array, "codes"]
    sums: Float[Array, "codes d"]


def codebook(codes: Float[Array, "codes d"]) -> Codebook:
    """Return a codebook with the given vectors e_k and with all moving averages 0."""
    return Codebook(codes, jnp.zeros(len(codes)), jnp.zeros_like(codes))


def nearest(
    z: Float[Array, "*positions d"], codes: Float[Array, "codes d"]
) -> Int[Array, "*positions"]:
    """Return the index of the codebook vector that is nearest to each vector z, eq. (1).

    >>> print(nearest(jnp.array([[0.2, 0.9]]), codes=jnp.array([[0.0, 0.0], [1.0, 1.0]])))
    [1]
    """
    # |z|^2 is omitted, since it is the same for all codebook vectors.
    squares = jnp.square(codes).sum(-1) - 2 * z @ codes.T
    return squares.argmin(-1)


def straight_through(z: Float[Array, "*z"], quantised: Float[Array, "*z"]) -> Float[Array, "*z"]:
    """Return `quantised`, with the gradient of the identity function of z, eq. (2)."""
    return z + jax.lax.stop_gradient(quantised - z)


def commitment(z: Float[Array, "*z"], quantised: Float[Array, "*z"]) -> Float[Array, ""]:
    """Return the commitment loss, eq. (3), averaged over the elements of z."""
    return jnp.square(z - jax.lax.stop_gradient(quantised)).mean()


def update(book: Codebook, z: Float[Array, "vectors d"], decay: float = 0.99) -> Codebook:
    """Return the codebook after an update with the V vectors z of a batch, eq. (4), g = `decay`.

    If N_k falls below `DEAD`, e_k is replaced by the vector z with index k s modulo V, where s is
    `_stride(V)`. The replacements are then evenly distributed over the images of the batch, and
    over the rows and columns of an image.
    """
    count, vectors = len(book.codes), len(z)
    assigned = jax.nn.one_hot(nearest(z, book.codes), count, dtype=z.dtype)
    sizes = decay * book.sizes + (1 - decay) * assigned.sum(0)
    sums = decay * book.sums + (1 - decay) * assigned.T @ z
    dead = (sizes < DEAD)[:, None]
    stride = _stride(vectors)
    fresh = z[jnp.array([code * stride % vectors for code in range(count)])]
    # A new codebook vector starts with N_k = 2 DEAD, so that it is not replaced at once.
    alive = jnp.maximum(sizes, DEAD)
    codes = jnp.where(dead, fresh, sums / alive[:, None])
    sizes = jnp.where(dead[:, 0], 2 * DEAD, sizes)
    return Codebook(codes, sizes, jnp.where(dead, 2 * DEAD * fresh, sums))


def _stride(vectors: int) -> int:
    """Return the smallest integer >= round(V / golden ratio) without a common factor with V.

    The multiples of this integer modulo V are all of 0 ... V - 1, and the first multiples are
    evenly distributed.
    """
    stride = round(vectors * 2 / (1 + 5**0.5))
    while any(stride % d == vectors % d == 0 for d in range(2, stride + 1)):
        stride += 1
    return stride


def perplexity(counts: Float[Array, "codes"]) -> Float[Array, ""]:
    """Return exp(entropy) of the frequencies of codebook indices.

    `counts` is the number of vectors with each index. The result is from 1 to the size of the
    codebook.

    >>> print(f"{perplexity(jnp.array([3.0, 3.0, 3.0, 0.0])):.2f}")
    3.00
    """
    shares = counts / jnp.maximum(counts.sum(), 1)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(shares, shares)))
