"""What all tasks of denoising share: corrupt, predict, and measure the error of eps."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion.prediction import Prediction, PredictionType, to_prediction
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.nn.denoising_networks import DenoisingNetwork
from ddpm_jax.nn.layers import Context


class Corrupted(NamedTuple):
    """Noisy examples x_t = alpha x0 + sigma eps.

    Attributes:
      x0: The data [B, *event].
      eps: The noise [B, *event].
      xt: The noisy data [B, *event].
      logsnr: [B].
    """

    x0: Float[Array, "batch *event"]
    eps: Float[Array, "batch *event"]
    xt: Float[Array, "batch *event"]
    logsnr: Float[Array, "batch"]


def normal(keys: Key[Array, "batch"], shape: tuple[int, ...]) -> Float[Array, "batch *event"]:
    """Return standard normal noise, of every example from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def corrupt(
    x0: Float[Array, "batch *event"], keys: Key[Array, "batch"], logsnr: Float[Array, "batch"]
) -> Corrupted:
    """Return q(x_t | x0) of every example (Ho et al. 2020, eq. 4).

    Args:
      x0: the data.
      keys: of the noise.
      logsnr: of every example.
    """
    return add_noise(x0, normal(keys, x0.shape[1:]), logsnr)


def add_noise(
    x0: Float[Array, "batch *event"],
    eps: Float[Array, "batch *event"],
    logsnr: Float[Array, "batch"],
) -> Corrupted:
    """Return every example with its noise, each at its own logsnr."""
    return Corrupted(x0, eps, jax.vmap(q_sample)(x0, eps, logsnr), logsnr)


def predict(
    network: DenoisingNetwork,
    prediction: PredictionType,
    params: PyTree,
    xt: Float[Array, "batch h w c"],
    logsnr: Float[Array, "batch"],
    time: Float[Array, "batch"],
    *,
    labels: Int[Array, "batch"] | None = None,
    context: Context | None = None,
    keys: Key[Array, "batch"] | None = None,
) -> Prediction:
    """Return x0 and eps by a network, of each example at its own logsnr.

    A network with twice the channels of `xt` has learned a variance, too, whose fraction is its
    second half (Nichol & Dhariwal 2021, eq. 15).

    Args:
      network: the denoising network.
      prediction: what it predicts.
      params: its parameters.
      xt: noisy examples.
      logsnr: of every example.
      time: of every example, as the network is given it.
      labels: classes, of a class-conditional network.
      context: features of captions, of a network that is conditioned on them.
      keys: of dropout; None: there is none.
    """
    out = network.apply(params, xt, time, labels, keys, context)
    assert isinstance(out, jax.Array)
    fraction = None
    if out.shape[-1] == 2 * xt.shape[-1]:
        out, between = jnp.split(out, 2, -1)
        fraction = (between + 1) / 2

    def convert(out: Array, xt: Array, logsnr: Array) -> Prediction:
        return to_prediction(prediction, out, xt, logsnr)

    return jax.vmap(convert)(out, xt, logsnr)._replace(variance_fraction=fraction)


def weighted_error(
    prediction: Prediction, noisy: Corrupted, weight: Callable[[Array], Array]
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
    """Return the weighted and the plain mean squared error of eps of every example.

    Args:
      prediction: of the noisy examples.
      noisy: the examples.
      weight: of the squared error, a function of logsnr.
    """
    mse = jax.vmap(losses.simple)(prediction, noisy.eps)
    return jax.vmap(weight)(noisy.logsnr) * mse, mse
