"""The protocol of tasks that train a denoising network and sample images with it."""

import dataclasses
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.data.types import DataInfo
from ddpm_jax.diffusion.guidance import Autoguidance, Guidance
from ddpm_jax.diffusion.prediction import Denoiser
from ddpm_jax.fields import (
    EMPTY_ALLOWED,
    MAY_CHANGE,
    EvalBatch,
    EvalTimes,
    NumSamples,
    NumSamplesBetween,
    section,
)
from ddpm_jax.nn.denoising_networks import DenoisingNetwork
from ddpm_jax.task import (
    Compile,
    GuidanceModel,
    Needs,
    SampleRequest,
    SamplingTask,
    Variables,
)
from ddpm_jax.task import Context as EvaluationContext
from ddpm_jax.tasks.image_sampler import (
    DenoisingModel,
    ImageSampler,
    Sampling,
    check_guidance_is_trained,
    check_sampling,
    sampler_of,
)

DEFAULT_REQUEST = SampleRequest()  # all sampling options have the values in the config

TRACED = 10  # number of samples of an evaluation whose trajectories are stored


@dataclasses.dataclass(frozen=True)
class SampleEvaluation:
    """Fields of the evaluation of a denoising network and its samples.

    Attributes:
      batch_size: Number of images in one batch of an evaluation.
      times_per_image: Number of times t per image at which the loss and the variational bound are
        computed; the metrics are averages over these times.
      num_samples: Number of samples that the final evaluation compares with held-out images; the
        class of sample i is i modulo the number of classes.
      num_samples_between: Number of samples that each evaluation during training compares with
        held-out images; 0 turns this comparison off.
      features: Feature networks of the metrics of samples, separated by commas: the experiment of a
        classifier (which is trained once if needed), the run directory of a classifier, or
        inception for FID (the user provides the weights); "none" turns these metrics off.
    """

    batch_size: EvalBatch = 256
    times_per_image: EvalTimes = 8
    num_samples: NumSamples = 1000
    num_samples_between: NumSamplesBetween = 0
    features: Annotated[tuple[str, ...], EMPTY_ALLOWED, MAY_CHANGE] = ()


def class_labels(labels: Int[Array, "batch"], classes: int) -> Int[Array, "batch"]:
    """Replace the label -1 (no class) by `classes`, the label of the network for "no class"."""
    return jnp.where(labels < 0, classes, labels)


@runtime_checkable
class ImageDenoiser(SamplingTask, DenoisingModel, Protocol):
    """A task that trains a denoising network of images, unconditional or class-conditional.

    Attributes:
      network: The denoising network.
      sampling: The fields of sampling, such as the sampler and the guidance scale.
      evaluation: The fields of the evaluation.
    """

    run_type: ClassVar[str] = "diffusion"

    @property
    def network(self) -> DenoisingNetwork:
        """The denoising network."""

    @property
    def sampling(self) -> Sampling:
        """The fields of sampling, such as the sampler and the guidance scale."""

    @property
    def evaluation(self) -> SampleEvaluation:
        """The fields of the evaluation, such as the number of samples."""

    @property
    def learned_variance(self) -> bool:
        """True if the network also predicts the variance of p(x_s | x_t)."""
        return False

    @property
    def no_label_dropout(self) -> str:
        """The first words of the error about guidance if training never drops labels.

        It is an empty string if training drops labels, so that guidance is possible.
        """

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """The shape (height, width, channels) of an image."""
        return self.info.shape

    @property
    def classes(self) -> int:
        """The number of classes that the network is conditioned on; 0 if it is unconditional."""
        return self.network.classes

    @property
    def request_fields(self) -> tuple[str, ...]:
        """The names of the sampling options that the task supports."""
        return "label", "sampler", "steps", "guidance"

    def needs(self) -> Needs:
        """Return the feature networks and the guidance model that the config names."""
        return Needs(self.evaluation.features, self.sampling.guidance_model)

    def conditioning(self, labels: Int[Array, "batch"]) -> Int[Array, "batch"] | None:
        """Return the labels [B] for the network, where `classes` is the label "no class".

        Return None if the network is unconditional.
        """
        return class_labels(labels, self.classes) if self.classes else None

    def check_denoiser(self) -> None:
        """Check that the fields of sampling fit the network and the noise schedule.

        Raises:
          FieldError: If a field does not fit the network or the noise schedule.
        """
        with section("sampling"):
            check_sampling(self.sampling, self.table_steps, self.learned_variance)
        if self.sampling.guidance_model == "labels":
            self._check_scale(self.sampling.guidance)

    def check_request(self, request: SampleRequest) -> None:
        """Check that the requested sampler and number of steps fit the network and the schedule.

        Raises:
          FieldError: If the sampler or the number of steps does not fit.
        """
        check_sampling(self.sampling.requested(request), self.table_steps, self.learned_variance)

    @property
    def table_steps(self) -> int | None:
        """The number of steps T of a discrete noise schedule; None for a continuous one."""
        return None

    def guidance(self, scale: float | None, model: GuidanceModel | None) -> Guidance:
        """Return the guidance (method and scale) for `sample`.

        Args:
          scale: The guidance scale; if None, the scale of the config.
          model: The guidance model; if None, guidance is classifier-free, by class labels.

        Raises:
          FieldError: If guidance is classifier-free, but training never drops labels.
        """
        if model is None:
            self._check_scale(self.sampling.guidance if scale is None else scale)
        return self.sampling.make_guidance(scale, model, self.classes > 0)

    def _check_scale(self, scale: float) -> None:
        if self.classes and self.no_label_dropout:
            check_guidance_is_trained(self.no_label_dropout, scale)

    def guidance_method(self, params: PyTree, scale: float | Array) -> Autoguidance:
        """Return autoguidance with this trained network as the worse model (Karras et al. 2024)."""
        return Autoguidance(scale, params, self)

    def sampler(self, request: SampleRequest = DEFAULT_REQUEST) -> ImageSampler:
        """Return the sampler of the config, with the options of `request` that are not None."""
        return sampler_of(self, self.sampling.requested(request))

    def null(self, labels: PyTree) -> PyTree:
        """Return the label "no class" for each image, or None if `labels` is None."""
        return None if labels is None else jnp.full_like(labels, self.classes)

    def denoiser(
        self, variables: Variables, request: SampleRequest, guidance: Guidance
    ) -> Denoiser:
        """Return the denoiser that a sampler calls, with guidance and thresholding of x0.

        Args:
          variables: The parameters and the extra variables (not trained by gradients) of the task.
          request: The labels [B] that the network is conditioned on; None if unconditional.
          guidance: The guidance that the method `guidance` returns.
        """
        labels = request.labels
        return self.sampler(request).denoiser(variables.params, guidance, labels, self.null(labels))

    def sample(
        self,
        variables: Variables,
        keys: Key[Array, "batch"],
        request: SampleRequest,
        guidance: Guidance,
        compile: Compile,
    ) -> Float[Array, "batch h w c"]:
        """Sample one image in [-1, 1] for each key.

        Args:
          variables: The parameters and the extra variables (not trained by gradients) of the task.
          keys: Random keys, one for each image.
          request: The labels, the sampler and the number of steps; None selects the config value.
          guidance: The guidance that the method `guidance` returns.
          compile: Compiles a function as `jax.jit` does, once for all its calls.
        """
        sample = compile(ImageSampler.sample, static_argnums=(0, 1))
        labels, sampler = request.labels, self.sampler(request)
        images, _ = sample(sampler, 0, variables.params, guidance, keys, labels, self.null(labels))
        return images

    def sample_for_evaluation(
        self,
        keys: Key[Array, "batch"],
        index: Int[Array, "batch"],
        context: EvaluationContext,
    ) -> tuple[Float[Array, "batch h w c"], tuple[Array, Array] | None]:
        """Return samples for an evaluation, and (x_t, x0) at all steps of the first `TRACED` ones.

        Args:
          keys: Random keys, one for each image.
          index: The index [B] of each sample. Its class is the index modulo the number of classes.
          context: The evaluation context (`task.Context`).
        """
        labels = index % context.classes if context.classes else None
        sample = context.compile(ImageSampler.sample, static_argnums=(0, 1))
        return sample(
            self.sampler(),
            TRACED,
            context.variables.params,
            context.guidance,
            keys,
            labels,
            self.null(labels),
        )


def bind_network(
    network: DenoisingNetwork,
    info: DataInfo,
    precision: str,
    *,
    conditional: bool,
    learned: bool = False,
) -> DenoisingNetwork:
    """Return a network with the number of outputs, the classes and the precision set.

    Args:
      network: The denoising network.
      info: Description of the data set: image shape, number of classes and caption length.
      precision: The dtype of the network's computation, such as "bfloat16".
      conditional: If True, the network is conditioned on the data set's classes.
      learned: If True, the network also predicts the variance of p(x_s | x_t).
    """
    return network.clone(
        outputs=info.shape[-1] * (2 if learned else 1),
        classes=info.classes if conditional else 0,
        dtype=jnp.dtype(precision),
        parent=None,
    )
