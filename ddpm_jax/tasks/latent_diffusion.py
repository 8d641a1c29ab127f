"""A generation model by diffusion in an autoencoder's latents (Rombach et al. 2022)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddpm_jax.diffusion import losses as loss
from ddpm_jax.diffusion.grids import step_time
from ddpm_jax.diffusion.prediction import Prediction, PredictionType, read
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.diffusion.schedules import CosineBetas, NoiseSchedule, Schedule, shifted
from ddpm_jax.fields import MAY_CHANGE, Few, Positive, section
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.layers import Context
from ddpm_jax.nn.unet import UNet
from ddpm_jax.parallel.sharding import Parallel
from ddpm_jax.tasks.autoencoder import Latents
from ddpm_jax.tasks.generation import Generator
from ddpm_jax.tasks.image_sampler import Sampling, check_start, drawing


def diffusion(
    net: UNet | DiT,
    schedule: Schedule,
    latents: Latents,
    *,
    kind: PredictionType = "v",
    weight: Callable[[Array], Array] = loss.one,
    sampling: Sampling,
    batch_size: int,
    draws: int = 1,
) -> Generator:
    """Denoising diffusion of latents: the loss is the mean squared error of eps, weighted.

    Args:
      net: with as many inputs and outputs as the latents have channels.
      sampling: how latents are drawn unless a request says otherwise.
      batch_size: images of a training step.
      draws: times and noises at which it sees each of them, whose caption and latents are read
        once.  Its times are 1 / draws apart, each in its own of `batch_size * draws` even parts:
        of two, a gradient varies as little as of twice as many images (variances 0.091 and 0.086,
        0.113 where an image's times are neighbours).

    Raises:
      FieldError: the network cannot be built for latents of this shape, or what it predicts says
        nothing of them where drawing starts.
    """
    shape = latents.shape
    with section("network"):
        net.check(shape)

    def init(key, context: Context):
        size = len(context.mask)
        return net.init(key, jnp.zeros((size, *shape)), jnp.zeros(size), None, None, context)

    def predict(params, zt, logsnr, told, keys=None) -> Prediction:
        out: Any = net.apply(params, zt, schedule.time(logsnr), None, keys, told[0])
        return jax.vmap(functools.partial(read, kind))(out, zt, logsnr)

    draw_latents = drawing(
        predict,
        lambda params: schedule,
        shape,
        0,
        sampling,
        steps=schedule.steps,
        nothing=lambda told: (told[1], told[1]),
    )
    check_start(kind, schedule, sampling)

    def loss_of(params, z, context, index, keys, train):
        count = draws if train else 1
        if count > 1:
            keys = jax.vmap(lambda key: jax.random.split(key, count))(keys).reshape(-1)
            index = (index[:, None] + batch_size * jnp.arange(count)).reshape(-1)
            z = z.repeat(count, 0)
        split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
        times = batch_size * count
        t = loss.stratified_times(split[:, 0], index % times, times)
        logsnr = schedule.logsnr(step_time(schedule, t))
        eps = jax.vmap(lambda key: jax.random.normal(key, shape))(split[:, 1])
        zt = jax.vmap(q_sample)(z, eps, logsnr)
        found = predict(params, zt, logsnr, (context, None), split[:, 2] if train else None)
        mse = jax.vmap(loss.simple)(found, eps)
        weighted = jax.vmap(weight)(logsnr) * mse
        weighted, mse = (a.reshape(-1, count).mean(1) for a in (weighted, mse))
        return weighted, {"mse": mse}

    def draw(params, frozen, keys, context, instead, how: Sampling, spread: Parallel):
        z = draw_latents.told(params, keys, (context, instead), how, spread)
        return spread.compile(latents.decode)(frozen, z)

    return Generator(init, latents.encode, loss_of, draw, draw_latents.requested, sampling.about())


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """A generation model by diffusion in an autoencoder's latents; see `diffusion`.

    Attributes:
      network: The denoising network, conditioned on captions.
      schedule: The noise schedule.
      noise_shift: Factor of alpha / sigma at every t; below 1, more of the times are noisy.
      prediction: What the network predicts.
      loss_weight: Weight of the squared error of eps, a function of logsnr.
      times_per_image: Times and noises at which training sees each image of a batch.
      sampling: How latents are sampled.
    """

    network: UNet | DiT = UNet()
    schedule: NoiseSchedule = CosineBetas()
    noise_shift: Positive = 1.0
    prediction: PredictionType = "v"
    loss_weight: loss.Weight = "v"
    times_per_image: Few = 1
    sampling: Annotated[Sampling, MAY_CHANGE] = Sampling(x0_thresholding="none")

    def bind(self, autoencoder: Autoencoder, codes: int, precision: str) -> "LatentDiffusion":
        """Return the generation model for the latents of an autoencoder."""
        del codes
        network = self.network.clone(
            outputs=autoencoder.latent_channels, dtype=jnp.dtype(precision), parent=None
        )
        return dataclasses.replace(self, network=network)

    def build(self, latents: Latents, batch_size: int) -> Generator:
        """Return the functions of the bound generation model.

        Raises:
          FieldError: fields contradict each other or the latents.
        """
        with section("schedule"):
            schedule = self.schedule.make()
        return diffusion(
            self.network,
            shifted(schedule, self.noise_shift),
            latents,
            kind=self.prediction,
            weight=loss.WEIGHTS[self.loss_weight],
            sampling=self.sampling,
            batch_size=batch_size,
            draws=self.times_per_image,
        )
