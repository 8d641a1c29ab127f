"""Sampling with a trained denoising network: the sampler, its grid of noise levels, guidance."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion.grids import Spacing, grid, grid_from
from ddpm_jax.diffusion.guidance import ClassifierFree, Guidance, GuidingNetwork, Method
from ddpm_jax.diffusion.prediction import (
    Denoiser,
    Prediction,
    PredictionType,
    clip_x0,
    inpaint,
    threshold_x0,
)
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.diffusion.schedules import PURE_NOISE_LOGSNR, Schedule
from ddpm_jax.errors import suggestion
from ddpm_jax.fields import PATH, AtLeast, AtMost, FieldError, SampleSteps
from ddpm_jax.progress import log_once
from ddpm_jax.system.record import Record
from ddpm_jax.task import GuidanceModel, SampleRequest

# Numbers that are folded into the key of an image. The steps of a sampler use 0, 1, 2, ...
FIRST_NOISE = 2**31 - 1  # for the noise x_T
RANDOM_CLASS = FIRST_NOISE - 1  # for a random class
MIN_LOGSNR_OF_EPS = -15.0  # an error of eps causes an error of x0 that is 1,800 times as large

Thresholding = Literal["clip", "dynamic", "none"]
THRESHOLDINGS: dict[Thresholding, Callable[[Denoiser], Denoiser]] = {
    "clip": clip_x0,
    "dynamic": threshold_x0,
    "none": lambda denoise: denoise,
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of sampling, which a request can override.

    Attributes:
      sampler: Sampler: ancestral, ancestral_beta, ancestral_learned, ddim, heun, edm, dpmpp_2m,
        dpmpp_2m_sde or unipc; some take a number after a colon, such as ddim:0.5 for eta 0.5.
      steps: Number of steps of the sampler; with a table of T betas, it must be at most T.
      spacing: Spacing of the steps from noise to data: in t (leading, trailing, linspace or
        quadratic) or in the noise level (logsnr or rho7).
      guidance: Guidance scale; 1 means no guidance, and larger values are stronger. For a
        classifier as the guidance model, 0 means no guidance.
      guidance_interval: Lowest and highest logSNR at which guidance acts, as LOW,HIGH; with "none",
        it acts at every noise level.
      guidance_rescale: Share, from 0 to 1, by which the standard deviation of the guided x0 is set
        back to that of the conditional x0 (Lin et al. 2024); 0 turns this off.
      x0_thresholding: Thresholding of the predicted x0: clip to [-1, 1], dynamic thresholding to a
        percentile of its values, or none.
      guidance_model: "labels" for classifier-free guidance, or the run directory of a guidance
        model: a classifier of noisy images, or a weaker diffusion model (autoguidance).
    """

    sampler: str = "ancestral"
    steps: SampleSteps = 250
    spacing: Spacing = "trailing"
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: Annotated[float, AtLeast(0.0), AtMost(1.0)] = 0.0
    x0_thresholding: Thresholding = "clip"
    guidance_model: Annotated[str, PATH] = "labels"

    def about(self) -> Record:
        """Return all fields except the guidance model, for the record of an evaluation."""
        return {name: v for name, v in dataclasses.asdict(self).items() if name != "guidance_model"}

    def requested(self, request: SampleRequest) -> "Sampling":
        """Return the settings with the sampler and the steps of a request, if it has them."""
        sampler = self.sampler if request.sampler is None else request.sampler
        steps = self.steps if request.steps is None else request.steps
        return dataclasses.replace(self, sampler=sampler, steps=steps)

    def make_guidance(
        self, scale: float | None, model: GuidanceModel | None, conditional: bool
    ) -> Guidance:
        """Return the guidance, which has no method if the scale is neutral.

        Args:
          scale: The guidance scale; if None, the scale of the settings.
          model: The guidance model; if None, guidance is classifier-free.
          conditional: True if the network has conditioning, which classifier-free guidance needs.
        """
        scale = self.guidance if scale is None else scale
        method: Method | None = ClassifierFree(scale) if conditional else None
        if model is not None:
            method = model.task.guidance_method(model.params, scale)
        if method is None or scale == method.neutral:
            return Guidance()
        return Guidance(method, self.guidance_interval, self.guidance_rescale)


@runtime_checkable
class DenoisingModel(GuidingNetwork, Protocol):
    """A denoising network with its schedule: a hashable value, so that it can be static to `jit`.

    Parameters are arguments of its methods.
    """

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """The shape of one example: of an image or of latents."""

    def noise_schedule(self, params: PyTree) -> Schedule:
        """Return the schedule, which may depend on the parameters."""


@dataclasses.dataclass(frozen=True)
class ImageSampler:
    """A sampler of a denoising model's images: a hashable value, static to `jax.jit`.

    Attributes:
      model: The network with its schedule.
      sampler: The name of the sampler, with its number after a colon if it has one.
      steps: The number of steps.
      spacing: The spacing of the steps (`diffusion.grids.grid`).
      x0_thresholding: The thresholding of the predicted x0: clip, dynamic or none.
    """

    model: DenoisingModel
    sampler: str = "ancestral"
    steps: int = 250
    spacing: Spacing = "trailing"
    x0_thresholding: Thresholding = "clip"

    def denoiser(
        self, params: PyTree, guidance: Guidance, conditioning: PyTree, null: PyTree
    ) -> Denoiser:
        """Return the guided denoiser with thresholding of x0.

        Args:
          params: The parameters of the model.
          guidance: The guidance of sampling.
          conditioning: Class labels [B] or features of captions; if None, there are none.
          null: The null conditioning, which replaces `conditioning` in an unconditional call.
        """

        def predict(xt: Array, logsnr: Array, conditioning: PyTree) -> Prediction:
            return self.model.predict(params, xt, logsnr, conditioning)

        return THRESHOLDINGS[self.x0_thresholding](guidance.denoiser(predict, conditioning, null))

    def sample(
        self,
        trace: int,
        params: PyTree,
        guidance: Guidance,
        keys: Key[Array, "batch"],
        conditioning: PyTree,
        null: PyTree,
    ) -> tuple[Float[Array, "batch *event"], samplers.Trace | None]:
        """Return samples, and the trace of the first `trace` samples.

        Args:
          trace: The number of images whose x_t and x0 are returned at every step; if 0, the trace
            is None.
          params: The parameters of the model.
          guidance: The guidance of sampling.
          keys: Random keys, one for each image.
          conditioning: Class labels [B] or features of captions; if None, there are none.
          null: The null conditioning, which replaces `conditioning` in an unconditional call.
        """
        logsnrs = grid(self.model.noise_schedule(params), self.steps, self.spacing)
        denoise = self.denoiser(params, guidance, conditioning, null)
        xT = self._first_noise(keys)
        sampler = samplers.named(self.sampler, self.steps)
        if trace:
            return samplers.sample_and_trace(sampler, denoise, logsnrs, keys, xT, trace)
        return samplers.sample(sampler, denoise, logsnrs, keys, xT), None

    def sdedit(
        self,
        params: PyTree,
        guidance: Guidance,
        keys: Key[Array, "batch"],
        conditioning: PyTree,
        null: PyTree,
        t: Float[Array, ""] | float,
        images: Float[Array, "batch *event"],
        known: Float[Array, "batch *event"],
        mask: Float[Array, "batch *event"],
    ) -> Float[Array, "batch *event"]:
        """Return edited images: sampling starts from images with the noise of time t.

        This is SDEdit (Meng et al. 2022); with a mask it is inpainting.

        Args:
          params: The parameters of the model.
          guidance: The guidance of sampling.
          keys: Random keys, one for each image.
          conditioning: Class labels [B] or features of captions; if None, there are none.
          null: The null conditioning, which replaces `conditioning` in an unconditional call.
          t: The time in [0, 1] at which sampling starts; at 1, pixels whose `mask` is 0 start from
            noise alone and do not depend on `images`.
          images: The images [B, *event] in [-1, 1] to which noise is added.
          known: The values in [-1, 1] of the pixels whose `mask` is 1 (inpainting).
          mask: 1 for pixels that are set to `known`, else 0 [B, *event].
        """
        schedule = self.model.noise_schedule(params)
        first_time = 1 / schedule.steps if schedule.steps else 0.0
        start = schedule.logsnr(jnp.maximum(t, first_time))
        noise = self._first_noise(keys)
        # At t = 1 logsnr is finite, so that x_t would still contain a small part of the image.
        x0 = jnp.where(mask > 0, known, images)
        xt = jax.vmap(q_sample, (0, 0, None))(x0, noise, start)
        xt = jnp.where((mask == 0) & (t >= 1), noise, xt)
        logsnrs = grid(schedule, self.steps, self.spacing)
        logsnrs, first = grid_from(logsnrs, jnp.asarray(start, logsnrs.dtype))
        denoise = inpaint(self.denoiser(params, guidance, conditioning, null), known, mask)
        sampler = samplers.named(self.sampler, self.steps)
        edited: Array = samplers.sample(sampler, denoise, logsnrs, keys, xt, first=first)
        return edited

    def _first_noise(self, keys: Key[Array, "batch"]) -> Float[Array, "batch *event"]:
        def normal(key: Key[Array, ""]) -> Array:
            return jax.random.normal(jax.random.fold_in(key, FIRST_NOISE), self.model.event_shape)

        return jax.vmap(normal)(keys)


def sampler_of(model: DenoisingModel, sampling: Sampling) -> ImageSampler:
    """Return the sampler of a model for the settings of sampling."""
    return ImageSampler(
        model, sampling.sampler, sampling.steps, sampling.spacing, sampling.x0_thresholding
    )


def random_classes(keys: Key[Array, "batch"], classes: int) -> Int[Array, "batch"]:
    """Return a random class in 0 ... classes - 1 for every image [B]."""

    def random_class(key: Key[Array, ""]) -> Array:
        return jax.random.randint(jax.random.fold_in(key, RANDOM_CLASS), (), 0, classes)

    return jax.vmap(random_class)(keys)


def check_guidance_is_trained(field: str, scale: float) -> None:
    """Check that the scale is 1 for a network that is never trained without labels.

    Args:
      field: The field, with its value, by which labels are never dropped in training.
      scale: The scale of classifier-free guidance.

    Raises:
      FieldError: If the scale is not 1; the message begins with `field`.
    """
    if scale != 1.0:
        raise FieldError(
            f"{field}: the network is never trained without labels, so classifier-free guidance of "
            f"scale {scale:g} is not possible; give sampling.guidance=1, or train a diffusion task "
            "with label_dropout above 0",
            "sampling.guidance",
        )


def check_start(prediction: PredictionType, schedule: Schedule, sampling: Sampling) -> None:
    """Check that the prediction determines x0 at the noise level where sampling starts.

    For prediction type eps, x0 = (x_t - sigma eps) / alpha. Where alpha is near 0, a small error of
    eps is a large error of x0 (Lin et al. 2024, sec. 3.2), unless x0 is thresholded. If the
    schedule does not end in pure noise, a warning is logged.

    Raises:
      FieldError: If sampling starts at a noise level where eps does not determine x0.
    """
    end = float(schedule.logsnr(jnp.asarray(1.0)))
    if end > PURE_NOISE_LOGSNR:
        log_once(
            f"the noise schedule ends at logsnr {end:.1f}, but sampling starts from pure noise "
            f"(logsnr below {PURE_NOISE_LOGSNR:g}), which makes samples worse; give a schedule "
            "that ends at a lower logsnr"
        )
    if prediction != "eps" or sampling.x0_thresholding != "none":
        return
    start = float(grid(schedule, sampling.steps, sampling.spacing)[0])
    if start < MIN_LOGSNR_OF_EPS:
        raise FieldError(
            f"prediction=eps: sampling starts at logsnr {start:.0f}, where eps does not determine "
            "the image; give prediction=v, schedule=linear_betas or sampling.spacing=leading",
            "schedule",
            "sampling.spacing",
            "sampling.x0_thresholding",
        )


def check_sampling(sampling: Sampling, steps: int | None, learned_variance: bool) -> None:
    """Check that the settings of sampling fit the network and the schedule.

    Args:
      sampling: The settings of sampling.
      steps: The number of steps of the schedule's table; None for a continuous schedule.
      learned_variance: True if the network predicts the variance of p(x_s | x_t), too.

    Raises:
      FieldError: If the sampler does not exist or a setting does not fit.
    """
    name = sampling.sampler
    base = name.partition(":")[0]
    if base not in samplers.SAMPLERS:
        raise FieldError(f'sampler: there is no "{base}"{suggestion(base, samplers.SAMPLERS)}')
    try:
        samplers.named(name, sampling.steps)
    except ValueError as error:
        raise FieldError(f"sampler={name}: {error}") from None
    if base == "ancestral_learned" and not learned_variance:
        raise FieldError(
            f"sampler={name}: this run's network has not learned a variance; give "
            "sampler=ancestral or sampler=ancestral_beta"
        )
    low, high = sampling.guidance_interval or (0.0, 0.0)
    if low > high:
        raise FieldError(
            f"guidance_interval={low:g},{high:g}: must be LOW,HIGH with LOW <= HIGH, in logSNR"
        )
    if steps is not None and sampling.steps > steps:
        raise FieldError(
            f"steps={sampling.steps}: this run's schedule has {steps} steps; give at most {steps}",
            "sampler",
        )
