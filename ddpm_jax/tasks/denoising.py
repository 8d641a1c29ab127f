"""Functions of all denoising tasks: add noise, predict x0 and eps, weight the squared error."""

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
    """Noisy examples x_t = alpha x0 + sigma eps (Kingma et al. 2021, eq. 1).

    Attributes:
      x0: The data [B, *event].
      eps: The standard normal noise [B, *event].
      xt: The noisy data [B, *event].
      logsnr: The log signal-to-noise ratio log(alpha^2 / sigma^2) of each example [B].
    """

    x0: Float[Array, "batch *event"]
    eps: Float[Array, "batch *event"]
    xt: Float[Array, "batch *event"]
    logsnr: Float[Array, "batch"]


def normal(keys: Key[Array, "batch"], shape: tuple[int, ...]) -> Float[Array, "batch *event"]:
    """Return standard normal noise [B, *shape], with one random key for each example."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def corrupt(
    x0: Float[Array, "batch *event"], keys: Key[Array, "batch"], logsnr: Float[Array, "batch"]
) -> Corrupted:
    """Return a sample of q(x_t | x0) for every example (Ho et al. 2020, eq. 4).

    Args:
      x0: The data [B, *event].
      keys: Random keys of the noise, one for each example.
      logsnr: The log signal-to-noise ratio of each example [B].
    """
    return add_noise(x0, normal(keys, x0.shape[1:]), logsnr)


def add_noise(
    x0: Float[Array, "batch *event"],
    eps: Float[Array, "batch *event"],
    logsnr: Float[Array, "batch"],
) -> Corrupted:
    """Return x_t = alpha x0 + sigma eps for every example; logsnr determines alpha and sigma."""
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
    """Return a network's prediction of x0 and eps for every example.

    If the output has twice the channels of `xt`, its second half v determines the learned
    variance, by the fraction (v + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).

    Args:
      network: The denoising network.
      prediction: The prediction type, which is the quantity that the network predicts.
      params: The parameters of the network.
      xt: Noisy examples [B, H, W, C].
      logsnr: The log signal-to-noise ratio of each example [B].
      time: The time [B] that the network is conditioned on.
      labels: Class labels [B]; if None, the network is not class-conditional.
      context: Text features of captions; if None, the network is not conditioned on captions.
      keys: Random keys of dropout, one for each example; if None, dropout is off.
    """
    out = network.apply(params, xt, time, labels, keys, context)
    assert isinstance(out, jax.Array)
    fraction = None
    if out.shape[-1] == 2 * xt.shape[-1]:
        out, raw_fraction = jnp.split(out, 2, -1)
        fraction = (raw_fraction + 1) / 2

    def convert(out: Array, xt: Array, logsnr: Array) -> Prediction:
        return to_prediction(prediction, out, xt, logsnr)

    return jax.vmap(convert)(out, xt, logsnr)._replace(variance_fraction=fraction)


def weighted_error(
    prediction: Prediction, noisy: Corrupted, weight: Callable[[Array], Array]
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
    """Return the weighted and the unweighted mean squared error of eps, both [B].

    Args:
      prediction: The prediction for the noisy examples.
      noisy: The noisy examples.
      weight: A function that returns the weight of the squared error for a logsnr.
    """
    mse = jax.vmap(losses.simple)(prediction, noisy.eps)
    return jax.vmap(weight)(noisy.logsnr) * mse, mse
