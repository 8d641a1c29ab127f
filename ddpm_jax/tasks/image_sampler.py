"""How a trained denoising network samples: the sampler, its grid and its guidance."""

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
from ddpm_jax.diffusion.schedules import NOISE, Schedule
from ddpm_jax.errors import nearest
from ddpm_jax.fields import PATH, AtLeast, AtMost, FieldError, SampleSteps
from ddpm_jax.progress import log_once
from ddpm_jax.system.record import Record
from ddpm_jax.task import GuidanceModel, SampleRequest

FIRST_NOISE = 2**31 - 1  # the number of x_T's noise; the steps' are 0, 1, 2, ...
CLASS_NUMBER = FIRST_NOISE - 1  # the number of a random class
NOTHING_LEFT = -15.0  # logsnr below which an error of eps is 1,800 times one of x0

Thresholding = Literal["clip", "dynamic", "none"]
THRESHOLDINGS: dict[Thresholding, Callable[[Denoiser], Denoiser]] = {
    "clip": clip_x0,
    "dynamic": threshold_x0,
    "none": lambda denoise: denoise,
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are sampled, unless a request says otherwise.

    Attributes:
      sampler: Name of a sampler (`diffusion.samplers.SAMPLERS`), with its argument: ddim:0.5.
      steps: Steps of the sampler.
      spacing: Where the steps lie (`diffusion.grids.grid`).
      guidance: Scale of guidance; 1: none, or 0 where a classifier guides.
      guidance_interval: LOW,HIGH: logSNR between which guidance acts; none: everywhere.
      guidance_rescale: Share of the standard deviation of x0 that is set back to that of the
        conditional prediction without guidance.
      x0_thresholding: What keeps x0 within the range of images.
      guidance_model: labels: classifier-free guidance. A run's directory: that of a classifier of
        noisy images, or of a weaker diffusion model (autoguidance).
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
        """Return every field but the guidance model, for the record."""
        return {name: v for name, v in dataclasses.asdict(self).items() if name != "guidance_model"}

    def requested(self, request: SampleRequest) -> "Sampling":
        """Return the settings with the sampler and the steps that a request names."""
        sampler = self.sampler if request.sampler is None else request.sampler
        steps = self.steps if request.steps is None else request.steps
        return dataclasses.replace(self, sampler=sampler, steps=steps)

    def make_guidance(
        self, scale: float | None, model: GuidanceModel | None, conditional: bool
    ) -> Guidance:
        """Return the guidance; of a neutral scale, none.

        Args:
          scale: of guidance; None: that of the settings.
          model: the guidance model; None: the network's conditioning guides.
          conditional: whether the network has any.
        """
        scale = self.guidance if scale is None else scale
        method: Method | None = ClassifierFree(scale) if conditional else None
        if model is not None:
            method = model.task.guide(model.params, scale)
        if method is None or scale == method.neutral:
            return Guidance()
        return Guidance(method, self.guidance_interval, self.guidance_rescale)


@runtime_checkable
class DenoisingModel(GuidingNetwork, Protocol):
    """A denoising network with its schedule: a hashable value, whose arrays are arguments."""

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """Shape of what is denoised: an image, or latents."""

    def noise_schedule(self, params: PyTree) -> Schedule:
        """Return the schedule, which the parameters may hold."""


@dataclasses.dataclass(frozen=True)
class ImageSampler:
    """A sampler of a denoising model's images: a hashable value, static to `jax.jit`.

    Attributes:
      model: The network with its schedule.
      sampler: Name of the sampler, with its argument.
      steps: Its steps.
      spacing: Where they lie.
      x0_thresholding: What keeps x0 within the range of images.
    """

    model: DenoisingModel
    sampler: str = "ancestral"
    steps: int = 250
    spacing: Spacing = "trailing"
    x0_thresholding: Thresholding = "clip"

    def denoiser(
        self, params: PyTree, guidance: Guidance, conditioning: PyTree, null: PyTree
    ) -> Denoiser:
        """Return the guided denoiser, its x0 within the range of images.

        Args:
          params: parameters of the model.
          guidance: how it is guided.
          conditioning: what the network is given: labels [B], or features of captions.
          null: what an unconditional network is given in its place.
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
        """Return samples, and the trace of the first of them.

        Args:
          trace: number of images whose x_t and x0 are returned at every step; 0: no trace.
          params: parameters of the model.
          guidance: how it is guided.
          keys: one for every image.
          conditioning: what the network is given.
          null: what an unconditional network is given in its place.
        """
        logsnrs = grid(self.model.noise_schedule(params), self.steps, self.spacing)
        denoise = self.denoiser(params, guidance, conditioning, null)
        xT = self._first_noise(keys)
        walker = samplers.named(self.sampler, self.steps)
        if trace:
            return samplers.sample_and_trace(walker, denoise, logsnrs, keys, xT, trace)
        return samplers.sample(walker, denoise, logsnrs, keys, xT), None

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
        """Return images that are noised to time t and sampled from there (Meng et al. 2022).

        Args:
          params: parameters of the model.
          guidance: how it is guided.
          keys: one for every image.
          conditioning: what the network is given.
          null: what an unconditional network is given in its place.
          t: in [0, 1]; at 1 sampling starts from noise alone where `mask` is 0, whatever `images`
            are there.
          images: in [-1, 1].
          known: what pixels are kept to where `mask` is 1, in [-1, 1].
          mask: 1 where pixels are known, else 0.
        """
        schedule = self.model.noise_schedule(params)
        least = 1 / schedule.steps if schedule.steps else 0.0  # step 1
        start = schedule.logsnr(jnp.maximum(t, least))
        noise = self._first_noise(keys)
        # At t = 1 x_t would still contain a little of the image, since logsnr is finite there.
        hidden = jnp.where(mask > 0, known, images)
        xt = jax.vmap(q_sample, (0, 0, None))(hidden, noise, start)
        xt = jnp.where((mask == 0) & (t >= 1), noise, xt)
        logsnrs = grid(schedule, self.steps, self.spacing)
        logsnrs, first = grid_from(logsnrs, jnp.asarray(start, logsnrs.dtype))
        denoise = inpaint(self.denoiser(params, guidance, conditioning, null), known, mask)
        walker = samplers.named(self.sampler, self.steps)
        edited: Array = samplers.sample(walker, denoise, logsnrs, keys, xt, first=first)
        return edited

    def _first_noise(self, keys: Key[Array, "batch"]) -> Float[Array, "batch *event"]:
        def normal(key: Key[Array, ""]) -> Array:
            return jax.random.normal(jax.random.fold_in(key, FIRST_NOISE), self.model.event_shape)

        return jax.vmap(normal)(keys)


def sampler_of(model: DenoisingModel, sampling: Sampling) -> ImageSampler:
    """Return the sampler of a model by its settings."""
    return ImageSampler(
        model, sampling.sampler, sampling.steps, sampling.spacing, sampling.x0_thresholding
    )


def random_classes(keys: Key[Array, "batch"], classes: int) -> Int[Array, "batch"]:
    """Return a random class for every image."""

    def random_class(key: Key[Array, ""]) -> Array:
        return jax.random.randint(jax.random.fold_in(key, CLASS_NUMBER), (), 0, classes)

    return jax.vmap(random_class)(keys)


def check_guidance_is_trained(untrained: str, scale: float) -> None:
    """Check that a scale of classifier-free guidance is neutral where it was not trained.

    Raises:
      FieldError: it is not; the message begins with `untrained`.
    """
    if scale != 1.0:
        raise FieldError(
            f"{untrained}: the network is never trained without labels or captions, so that they "
            "cannot guide it; give sampling.guidance=1, or a dropout above 0",
            "sampling.guidance",
        )


def check_start(prediction: PredictionType, schedule: Schedule, how: Sampling) -> None:
    """Check that the network's prediction means something where sampling starts.

    x0 = (x_t - sigma eps) / alpha is the network's error divided by next to nothing where there is
    nearly no signal (Lin et al. 2024, sec. 3.2); thresholding of x0 keeps that from mattering. A
    schedule that does not end in noise, from which sampling starts, is logged.

    Raises:
      FieldError: sampling starts at so much noise that eps determines nothing of x0.
    """
    end = float(schedule.logsnr(jnp.asarray(1.0)))
    if end > NOISE:
        log_once(
            f"the noise schedule ends at logsnr {end:.1f}, which is above {NOISE:g} and not pure "
            "noise, but sampling starts with pure noise: images will be worse than the network's"
        )
    if prediction != "eps" or how.x0_thresholding != "none":
        return
    start = float(grid(schedule, how.steps, how.spacing)[0])
    if start < NOTHING_LEFT:
        raise FieldError(
            f"prediction=eps: sampling starts at logsnr {start:.0f}, where eps determines nothing "
            "of the image; give prediction=v, schedule=linear_betas or sampling.spacing=leading",
            "schedule",
            "sampling.spacing",
            "sampling.x0_thresholding",
        )


def check_sampling(how: Sampling, steps: int | None, learned_variance: bool) -> None:
    """Check that there is such a sampler, for such a network and schedule.

    Args:
      how: sampler, steps and the interval of guidance.
      steps: of the schedule's table; None: it is continuous.
      learned_variance: whether the network predicts a variance.

    Raises:
      FieldError: there is not.
    """
    name = how.sampler
    base = name.partition(":")[0]
    if base not in samplers.SAMPLERS:
        raise FieldError(f'sampler: there is no "{base}"{nearest(base, samplers.SAMPLERS)}')
    try:
        samplers.named(name, how.steps)
    except ValueError as error:
        raise FieldError(f"sampler={name}: {error}") from None
    if base == "ancestral_learned" and not learned_variance:
        raise FieldError(
            f"sampler={name}: this run's network has not learned a variance; use ancestral or "
            "ancestral_beta"
        )
    if how.guidance_interval is not None and how.guidance_interval[0] > how.guidance_interval[1]:
        low, high = how.guidance_interval
        raise FieldError(
            f"guidance_interval={low:g},{high:g}: must be LOW,HIGH with LOW <= HIGH, in logSNR"
        )
    if steps is not None and how.steps > steps:
        raise FieldError(f"steps={how.steps}: this run's schedule has {steps} steps", "sampler")
