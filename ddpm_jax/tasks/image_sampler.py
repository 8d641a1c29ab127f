"""Sampling with a trained denoising network: sampler, grid of noise levels, guidance, editing."""

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

# Numbers that are folded into the random key of an image. Sampling steps use 0, 1, 2, ...
FIRST_NOISE = 2**31 - 1  # for the noise x_T
RANDOM_CLASS = FIRST_NOISE - 1  # for a random class
MIN_LOGSNR_OF_EPS = -15.0  # at this logsnr, sigma / alpha = 1,800 multiplies errors of eps

Thresholding = Literal["clip", "dynamic", "none"]
THRESHOLDINGS: dict[Thresholding, Callable[[Denoiser], Denoiser]] = {
    "clip": clip_x0,
    "dynamic": threshold_x0,
    "none": lambda denoise: denoise,
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Fields of sampling. A sampling option of the command line overrides a field.

    Attributes:
      sampler: Name of the sampler: ancestral, ancestral_beta, ancestral_learned, ddim, heun, edm,
        dpmpp_2m, dpmpp_2m_sde or unipc; some take a parameter after a colon, such as ddim:0.5 for
        eta = 0.5.
      steps: Number of sampling steps; at most T if the noise schedule has T discrete steps.
      spacing: Spacing of the sampling steps: in the time t (leading, trailing, linspace or
        quadratic) or in the noise level (logsnr or rho7).
      guidance: Guidance scale; 1 means no guidance, and larger values make guidance stronger. If
        the guidance model is a classifier, 0 means no guidance.
      guidance_interval: Lowest and highest logSNR at which guidance is applied, as LOW,HIGH; with
        "none", guidance is applied at every noise level.
      guidance_rescale: Weight, from 0 (off) to 1, of the guided x0 after rescaling to the standard
        deviation of the x0 without guidance (Lin et al. 2024, eq. 14-16).
      x0_thresholding: Limit on the predicted x0: clip (to [-1, 1]), dynamic (to a percentile of its
        absolute values), or none.
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
        """Return all fields except the guidance model by name; an evaluation stores them."""
        return {name: v for name, v in dataclasses.asdict(self).items() if name != "guidance_model"}

    def requested(self, request: SampleRequest) -> "Sampling":
        """Return the fields, with the sampler and the steps of a request if they are not None."""
        sampler = self.sampler if request.sampler is None else request.sampler
        steps = self.steps if request.steps is None else request.steps
        return dataclasses.replace(self, sampler=sampler, steps=steps)

    def make_guidance(
        self, scale: float | None, model: GuidanceModel | None, conditional: bool
    ) -> Guidance:
        """Return the guidance; its method is None if the scale means no guidance.

        Args:
          scale: The guidance scale; if None, the field `guidance`.
          model: The guidance model; if None, guidance is classifier-free.
          conditional: True if the network is conditioned on labels or captions, which
            classifier-free guidance needs.
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
    """A denoising network with its noise schedule, without parameters.

    It is hashable, so that it can be a static argument of `jax.jit`. Its methods take the
    parameters as an argument.
    """

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """The shape of one example, which is an image or the latents of one."""

    def noise_schedule(self, params: PyTree) -> Schedule:
        """Return the noise schedule; it depends on `params` if it is learned."""


@dataclasses.dataclass(frozen=True)
class ImageSampler:
    """A sampler for a denoising model; hashable, to be a static argument of `jax.jit`.

    Attributes:
      model: The network with its noise schedule.
      sampler: The name of the sampler, such as "ddim" or, with a parameter, "ddim:0.5".
      steps: The number of sampling steps.
      spacing: The spacing of the sampling steps (`diffusion.grids.grid`).
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
        """Return the denoiser that the sampler calls, with guidance and thresholding of x0.

        Args:
          params: The parameters of the model.
          guidance: The guidance method with its scale.
          conditioning: Class labels [B] or text features; None for an unconditional network.
          null: The null conditioning of classifier-free guidance, shaped like `conditioning`.
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
        """Return samples [B, *event], and the trace (x_t and x0 at all steps) of the first ones.

        Args:
          trace: The number of samples in the trace; if 0, the trace is None.
          params: The parameters of the model.
          guidance: The guidance method with its scale.
          keys: Random keys, one for each image.
          conditioning: Class labels [B] or text features; None for an unconditional network.
          null: The null conditioning of classifier-free guidance, shaped like `conditioning`.
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
        """Return images that are edited by SDEdit (Meng et al. 2022), [B, *event].

        Noise of the time t is added to the images, and sampling starts at t. With a mask, this is
        inpainting: the pixels whose `mask` is 1 have the values `known` at every step.

        Args:
          params: The parameters of the model.
          guidance: The guidance method with its scale.
          keys: Random keys, one for each image.
          conditioning: Class labels [B] or text features; None for an unconditional network.
          null: The null conditioning of classifier-free guidance, shaped like `conditioning`.
          t: The time in [0, 1] at which sampling starts. At t = 1, pixels whose `mask` is 0 start
            from pure noise and do not depend on `images`.
          images: The images [B, *event] in [-1, 1] to which noise is added.
          known: The values in [-1, 1] of the pixels whose `mask` is 1, [B, *event].
          mask: 1 for pixels that are set to `known`, 0 for pixels that are sampled [B, *event].
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
    """Return the sampler for a model, with the sampler, steps and spacing of `sampling`."""
    return ImageSampler(
        model, sampling.sampler, sampling.steps, sampling.spacing, sampling.x0_thresholding
    )


def random_classes(keys: Key[Array, "batch"], classes: int) -> Int[Array, "batch"]:
    """Return a random class in 0 ... classes - 1 for every image [B]."""

    def random_class(key: Key[Array, ""]) -> Array:
        return jax.random.randint(jax.random.fold_in(key, RANDOM_CLASS), (), 0, classes)

    return jax.vmap(random_class)(keys)


def check_guidance_is_trained(field: str, scale: float) -> None:
    """Raise an error if the guidance scale of a network trained without label dropout is not 1.

    Args:
      field: The field that turns label dropout off, with its value, such as "label_dropout=0".
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
    """Check that the network's output determines x0 at the noise level where sampling starts.

    For prediction type eps, x0 = (x_t - sigma eps) / alpha. Where alpha is near 0, a small error of
    eps is a large error of x0 (Lin et al. 2024, sec. 3.2), unless x0 is thresholded. A warning is
    logged if the noise schedule does not end in pure noise.

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
    """Check that the fields of sampling fit the network and the noise schedule.

    Args:
      sampling: The fields of sampling.
      steps: The number of steps T of a discrete noise schedule; None for a continuous one.
      learned_variance: True if the network also predicts the variance of p(x_s | x_t).

    Raises:
      FieldError: If the sampler does not exist or a field does not fit.
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
