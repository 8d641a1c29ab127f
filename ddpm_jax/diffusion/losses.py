"""Training losses of one example, and the times they are taken at.

Every loss here is a weight times the mean squared error of eps:

    |v - v_hat|^2 = |eps - eps_hat|^2 / alpha^2,  |x0 - x0_hat|^2 = |eps - eps_hat|^2 / SNR  (1)
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.diffusion.elbo import bits_per_dim, step_nats
from ddpm_jax.diffusion.grids import within
from ddpm_jax.diffusion.prediction import Prediction

Scalar = Float[Array, ""]


def simple(prediction: Prediction, eps: Float[Array, "*event"]) -> Scalar:
    """L_simple: the mean over dimensions of |eps - eps_hat|^2 (Ho et al. 2020, eq. 14)."""
    return jnp.mean(jnp.square(eps - prediction.eps))


def variance_bound(
    prediction: Prediction,
    x0: Float[Array, "*event"],
    xt: Float[Array, "*event"],
    logsnr_t: Scalar,
    logsnr_s: Scalar,
    least: Scalar,
    steps: int,
    levels: int = 256,
) -> Scalar:
    """L_vlb in bits per dimension, whose gradient reaches the learned variance alone.

    `steps` times one step's part, the estimate of the whole sum from one step; its last step
    is the decoder's (Nichol & Dhariwal 2021, sec. 3.1: a stop-gradient on the mean).
    """
    still = jax.lax.stop_gradient
    fixed = prediction._replace(x0=still(prediction.x0), eps=still(prediction.eps))
    nats = step_nats(fixed, x0, xt, logsnr_t, logsnr_s, least, "learned", levels)
    return steps * bits_per_dim(nats, x0.size)


def hybrid(
    prediction: Prediction,
    x0: Float[Array, "*event"],
    eps: Float[Array, "*event"],
    xt: Float[Array, "*event"],
    logsnr_t: Scalar,
    logsnr_s: Scalar,
    least: Scalar,
    steps: int,
    levels: int = 256,
    scale: float = 1e-3,
) -> Scalar:
    """L_simple + scale L_vlb (Nichol & Dhariwal 2021, eq. 16); arguments as `variance_bound`'s."""
    bound = variance_bound(prediction, x0, xt, logsnr_t, logsnr_s, least, steps, levels)
    return simple(prediction, eps) + scale * bound


# Weights of the squared error of eps.


def one(logsnr: Scalar) -> Scalar:
    """L_simple's weight."""
    return jnp.ones_like(logsnr)


def v_weight(logsnr: Scalar) -> Scalar:
    """1 / alpha^2: the error of v (SNR + 1 on x0), eq. (1); EDM's with sigma_data = 1."""
    return 1 / jax.nn.sigmoid(logsnr)


def min_snr(logsnr: Scalar, most: float = 5.0) -> Scalar:
    """min(SNR, most) / SNR (Hang et al. 2023, eq. 8 for eps)."""
    return jnp.exp(jnp.minimum(jnp.log(most) - logsnr, 0.0))


def sigmoid_weight(logsnr: Scalar, bias: float = -1.0) -> Scalar:
    """S(bias - logsnr) (Kingma & Gao 2023, sec. 3; Hoogeboom et al. 2024, eq. 8)."""
    return jax.nn.sigmoid(bias - logsnr)


def edm_weight(logsnr: Scalar, sigma_data: float = 0.5) -> Scalar:
    """(sigma^2 + sigma_data^2) / sigma_data^2 with sigma^2 = 1 / SNR (Karras et al. 2022, tab. 1).

    EDM weighs the error of x0 by (sigma^2 + sigma_data^2) / (sigma sigma_data)^2; by eq. (1)
    that of eps by as much over SNR.
    """
    return 1 + jnp.exp(-logsnr) / sigma_data**2


# Times.


def uniform_times(
    keys: Key[Array, "batch"], index: Int[Array, "batch"], size: int
) -> Float[Array, "batch"]:
    """t ~ U(0, 1), each its own."""
    del index, size
    return jax.vmap(jax.random.uniform)(keys)


def stratified_times(
    keys: Key[Array, "batch"], index: Int[Array, "batch"], size: int
) -> Float[Array, "batch"]:
    """t_i = (i + u_i) / B < 1: each uniform, together evenly spread over the batch.

    It serves as VDM's antithetic sampling does (Kingma et al. 2021, app. I.1, one u for all)
    with a draw of each example's own, so that the batch can lie on many devices.
    """
    return within(index, jax.vmap(jax.random.uniform)(keys), size)


class LossHistory(NamedTuple):
    """The last losses at each of `bins` times, for `importance_times`."""

    losses: Float[Array, "bins kept"]
    counts: Int[Array, "bins"]


def empty_history(bins: int, kept: int = 10) -> LossHistory:
    """A history of nothing."""
    return LossHistory(jnp.zeros((bins, kept)), jnp.zeros(bins, jnp.int32))


def importance_times(
    history: LossHistory, keys: Key[Array, "batch"]
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
    """(t, weight) with t drawn where losses are large (Nichol & Dhariwal 2021, eq. 18).

    p_i ~ sqrt(mean of the last squared losses), once every bin has as many as it keeps, else
    uniform; 0.1 % is uniform always.  weight = 1 / (p_i bins) keeps the loss unbiased.
    """
    bins, kept = history.losses.shape
    root = jnp.sqrt(jnp.mean(jnp.square(history.losses), -1))
    warm = jnp.all(history.counts >= kept)
    share = jnp.where(warm, root / jnp.maximum(root.sum(), 1e-30), 1 / bins)
    share = 0.999 * share + 0.001 / bins

    def draw(key):
        which, where = jax.random.split(key)
        row = jax.random.categorical(which, jnp.log(share))
        return within(row, jax.random.uniform(where), bins), 1 / (share[row] * bins)

    return jax.vmap(draw)(keys)


def record(
    history: LossHistory, times: Float[Array, "batch"], losses: Float[Array, "batch"]
) -> LossHistory:
    """The history with a batch's (unweighted) losses in it, the oldest gone."""
    bins, kept = history.losses.shape

    def add(history, pair):
        time, loss = pair
        row = jnp.clip((time * bins).astype(jnp.int32), 0, bins - 1)
        place = history.counts[row] % kept
        return LossHistory(
            history.losses.at[row, place].set(loss), history.counts.at[row].add(1)
        ), None

    return jax.lax.scan(add, history, (times, losses))[0]


WEIGHTS = {
    "simple": one,
    "v": v_weight,
    "min_snr": min_snr,
    "sigmoid": sigmoid_weight,
    "edm": edm_weight,
}
Weight = Literal["simple", "v", "min_snr", "sigmoid", "edm"]
