"""A generation model by diffusion in an autoencoder's latents (Rombach et al. 2022)."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion.grids import step_time
from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.diffusion.prediction import Prediction, PredictionType
from ddpm_jax.diffusion.schedules import CosineBetas, NoiseSchedule, Schedule, shifted
from ddpm_jax.diffusion.times import StratifiedTimes
from ddpm_jax.fields import BOUND, MAY_CHANGE, Few, Positive, section
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.denoising_networks import DenoisingNetwork
from ddpm_jax.nn.layers import Context
from ddpm_jax.nn.unet import UNet
from ddpm_jax.rng import split_keys
from ddpm_jax.system.record import Record
from ddpm_jax.task import Compile, SampleRequest
from ddpm_jax.tasks.autoencoder import Latents
from ddpm_jax.tasks.denoising import corrupt, predict, weighted_error
from ddpm_jax.tasks.image_sampler import (
    ImageSampler,
    Sampling,
    check_sampling,
    check_start,
    sampler_of,
)


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """A generation model by diffusion in an autoencoder's latents.

    The loss is the mean squared error of eps, weighted. Each training image is seen at
    `times_per_image` times and noises, whose caption and latents are encoded once. Its times are
    1 / times_per_image apart, each in its own of `batch_size * times_per_image` equal parts of
    [0, 1): at two times, a gradient varies as little as that of twice as many images (variances
    0.091 and 0.086; 0.113 where the times of an image are neighbours).

    Attributes:
      network: The denoising network, conditioned on captions.
      schedule: The noise schedule.
      noise_shift: Factor of alpha / sigma at every t; below 1, more of the times are noisy.
      prediction: What the network predicts.
      loss_weight: Weight of the squared error of eps, a function of logsnr.
      times_per_image: Times and noises at which training sees each image of a batch.
      sampling: How latents are sampled.
      latents: The autoencoder's latents.
      batch_size: Training images of one step.
    """

    network: DenoisingNetwork = UNet()
    schedule: NoiseSchedule = CosineBetas()
    noise_shift: Positive = 1.0
    prediction: PredictionType = "v"
    loss_weight: losses.Weight = "v"
    times_per_image: Few = 1
    sampling: Annotated[Sampling, MAY_CHANGE] = Sampling(x0_thresholding="none")
    latents: Annotated[Latents, BOUND] = Latents(Autoencoder(), 0)
    batch_size: Annotated[int, BOUND] = 0

    def bind(self, latents: Latents, precision: str, batch_size: int) -> "LatentDiffusion":
        """Return the generation model for the latents of an autoencoder."""
        network = self.network.clone(
            outputs=latents.shape[-1], dtype=jnp.dtype(precision), parent=None
        )
        return dataclasses.replace(self, network=network, latents=latents, batch_size=batch_size)

    def check(self) -> None:
        """Check that the fields of the bound model fit each other and the latents.

        Raises:
          FieldError: they do not.
        """
        with section("schedule"):
            schedule = self.noise_schedule(None)
        with section("network"):
            self.network.check(self.event_shape)
        with section("sampling"):
            check_sampling(self.sampling, schedule.steps, learned_variance=False)
        check_start(self.prediction, schedule, self.sampling)

    @property
    def request_fields(self) -> tuple[str, ...]:
        """Names of what can be asked for, besides captions."""
        return ("sampler", "steps", "guidance")

    def check_request(self, request: SampleRequest) -> None:
        """Check that there is such a sampler, for this schedule.

        Raises:
          FieldError: there is not.
        """
        steps = self.noise_schedule(None).steps
        check_sampling(self.sampling.requested(request), steps, learned_variance=False)

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """Shape of the latents of an image."""
        return self.latents.shape

    def noise_schedule(self, params: PyTree) -> Schedule:
        """Return the schedule, which does not depend on the parameters."""
        del params
        return shifted(self.schedule.make(), self.noise_shift)

    def predict(
        self,
        params: PyTree,
        xt: Array,
        logsnr: Float[Array, "batch"],
        conditioning: Context,
        keys: Key[Array, "batch"] | None = None,
    ) -> Prediction:
        """Return x0 and eps of noisy latents.

        Args:
          params: parameters of the network.
          xt: noisy latents.
          logsnr: of each of them.
          conditioning: features of the captions.
          keys: of dropout; None: there is none.
        """
        time = self.noise_schedule(params).time(logsnr)
        return predict(
            self.network,
            self.prediction,
            params,
            xt,
            logsnr,
            time,
            context=conditioning,
            keys=keys,
        )

    def init(self, key: Key[Array, ""], context: Context) -> PyTree:
        """Return the first parameters; `context` has the shapes of captions' features."""
        size = len(context.mask)
        z = jnp.zeros((size, *self.event_shape))
        return self.network.init(key, z, jnp.zeros(size), None, None, context)

    def target(self, frozen: PyTree, images: Float[Array, "batch h w c"]) -> Array:
        """Return the latents of images in [-1, 1], of unit variance."""
        return self.latents.encode(frozen, images)

    def loss(
        self,
        params: PyTree,
        target: Float[Array, "batch rows columns d"],
        context: Context,
        index: Int[Array, "batch"],
        keys: Key[Array, "batch"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "batch"], dict[str, Float[Array, "batch"]]]:
        """Return the weighted mean squared error of eps of every example, and the plain one.

        Args:
          params: parameters of the network.
          target: latents.
          context: features of the captions.
          index: number of every example in its batch.
          keys: one for every example.
          train: whether dropout is used, and an image is seen at several times.
        """
        count = self.times_per_image if train else 1
        if count > 1:
            keys = jax.vmap(lambda key: jax.random.split(key, count))(keys).reshape(-1)
            index = (index[:, None] + self.batch_size * jnp.arange(count)).reshape(-1)
            target = target.repeat(count, 0)
        t_keys, eps_keys, drop_keys = split_keys(keys, 3)
        schedule = self.noise_schedule(params)
        t, _ = StratifiedTimes().sample({}, t_keys, index, self.batch_size * count)
        logsnr = schedule.logsnr(step_time(schedule, t))
        noisy = corrupt(target, eps_keys, logsnr)
        prediction = self.predict(params, noisy.xt, logsnr, context, drop_keys if train else None)
        errors = weighted_error(prediction, noisy, losses.WEIGHTS[self.loss_weight])
        weighted, mse = (error.reshape(-1, count).mean(1) for error in errors)
        return weighted, {"mse": mse}

    @property
    def guidance_scale(self) -> float:
        """The scale of guidance of the settings."""
        return self.sampling.guidance

    def make_guidance(self, scale: float | None) -> Guidance:
        """Return the guidance by captions; None: at the scale of the settings."""
        return self.sampling.make_guidance(scale, None, conditional=True)

    def sample(
        self,
        params: PyTree,
        frozen: PyTree,
        keys: Key[Array, "batch"],
        context: Context,
        null_context: Context,
        guidance: Guidance,
        request: SampleRequest,
        compile: Compile,
    ) -> Float[Array, "batch h w c"]:
        """Return images in [-1, 1], one for every key.

        Args:
          params: parameters of the network.
          frozen: {"params", "extra"} of the autoencoder.
          keys: one for every image.
          context: features of the captions.
          null_context: features of what guidance leads away from.
          guidance: as `make_guidance` returns it.
          request: how latents are sampled.
          compile: compiles functions.
        """
        sampler = sampler_of(self, self.sampling.requested(request))
        sample = compile(ImageSampler.sample, static_argnums=(0, 1))
        z, _ = sample(sampler, 0, params, guidance, keys, context, null_context)
        return compile(Latents.decode, static_argnums=0)(self.latents, frozen, z)

    def about(self) -> Record:
        """Return how latents are sampled by the settings, for the record."""
        return self.sampling.about()
