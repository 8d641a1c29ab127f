"""The protocol of tasks that train a denoising network of images and sample from it."""

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

DEFAULT_REQUEST = SampleRequest()  # leaves every field to the settings of the task

TRACED = 10  # number of an evaluation's samples whose trajectories are recorded


@dataclasses.dataclass(frozen=True)
class SampleEvaluation:
    """Settings of the evaluation of a denoising network and its samples.

    Attributes:
      batch_size: Number of images in one batch of an evaluation.
      times_per_image: Number of noise levels per image over which the loss and the bound are
        averaged.
      num_samples: Number of samples that the final evaluation compares with held-out images, with
        the classes in turn.
      num_samples_between: Number of samples that each evaluation during training compares with
        held-out images; 0 leaves the comparison out.
      features: Networks in whose features samples are compared with images, separated by commas:
        the experiment of a classifier (trained once if needed), the run directory of a classifier,
        or inception for FID (with weights that the user provides); "none" for no comparison.
    """

    batch_size: EvalBatch = 256
    times_per_image: EvalTimes = 8
    num_samples: NumSamples = 1000
    num_samples_between: NumSamplesBetween = 0
    features: Annotated[tuple[str, ...], EMPTY_ALLOWED, MAY_CHANGE] = ()


def class_labels(labels: Int[Array, "batch"], classes: int) -> Int[Array, "batch"]:
    """Return labels with -1 replaced by `classes`, the network's label for "no class"."""
    return jnp.where(labels < 0, classes, labels)


@runtime_checkable
class ImageDenoiser(SamplingTask, DenoisingModel, Protocol):
    """A task that trains a denoising network of images, unconditional or class-conditional.

    Attributes:
      network: The denoising network.
      sampling: The settings of sampling.
      evaluation: The settings of the evaluation.
    """

    run_type: ClassVar[str] = "diffusion"

    @property
    def network(self) -> DenoisingNetwork:
        """The denoising network."""

    @property
    def sampling(self) -> Sampling:
        """The settings of sampling."""

    @property
    def evaluation(self) -> SampleEvaluation:
        """The settings of the evaluation."""

    @property
    def learned_variance(self) -> bool:
        """True if the network predicts the variance of p(x_s | x_t), too."""
        return False

    @property
    def no_label_dropout(self) -> str:
        """The field that an error about guidance names if training never drops labels.

        It is "" if training drops labels, as classifier-free guidance needs.
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
        """The names of the fields of a request that have an effect."""
        return "label", "sampler", "steps", "guidance"

    def needs(self) -> Needs:
        """Return the names of the runs of feature networks and of a guidance model."""
        return Needs(self.evaluation.features, self.sampling.guidance_model)

    def conditioning(self, labels: Int[Array, "batch"]) -> Int[Array, "batch"] | None:
        """Return the labels that the network is conditioned on, or None if it is unconditional."""
        return class_labels(labels, self.classes) if self.classes else None

    def check_denoiser(self) -> None:
        """Check that the settings of sampling fit the network and the schedule.

        Raises:
          FieldError: If a setting does not fit the network or the schedule.
        """
        with section("sampling"):
            check_sampling(self.sampling, self.table_steps, self.learned_variance)
        if self.sampling.guidance_model == "labels":
            self._check_scale(self.sampling.guidance)

    def check_request(self, request: SampleRequest) -> None:
        """Check that the sampler and the steps of a request fit the network and the schedule.

        Raises:
          FieldError: If the sampler or the number of steps does not fit.
        """
        check_sampling(self.sampling.requested(request), self.table_steps, self.learned_variance)

    @property
    def table_steps(self) -> int | None:
        """The number of steps of the schedule's table; None for a continuous schedule."""
        return None

    def guidance(self, scale: float | None, model: GuidanceModel | None) -> Guidance:
        """Return the guidance of sampling.

        Args:
          scale: The guidance scale; if None, the scale of the settings.
          model: The guidance model; if None, class labels guide (classifier-free guidance).

        Raises:
          FieldError: If labels should guide, but are never dropped in training.
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
        """Return the sampler of the settings, with the fields that a request overrides."""
        return sampler_of(self, self.sampling.requested(request))

    def null(self, labels: PyTree) -> PyTree:
        """Return the null conditioning of class labels: the label "no class" for each image."""
        return None if labels is None else jnp.full_like(labels, self.classes)

    def denoiser(
        self, variables: Variables, request: SampleRequest, guidance: Guidance
    ) -> Denoiser:
        """Return the guided denoiser of sampling, with thresholding of x0.

        Args:
          variables: The variables of the trained task.
          request: The labels that the network is conditioned on, and the sampler.
          guidance: The guidance of sampling.
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
        """Return images in [-1, 1], one for each key.

        Args:
          variables: The variables of the trained task.
          keys: Random keys, one for each image.
          request: The labels, the sampler and the number of steps.
          guidance: The guidance of sampling.
          compile: The function that compiles functions of the task.
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
        """Return samples of an evaluation, with the classes in turn, and the trace of the first.

        Args:
          keys: Random keys, one for each image.
          index: The index [B] of each sample, which determines its class: index mod classes.
          context: The context of the evaluation.
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
    """Return a network with the fields that follow from the data set and the precision.

    Args:
      network: The denoising network.
      info: The description of the data set.
      precision: The dtype of the network's computation, such as "bfloat16".
      conditional: If true, the network is conditioned on the data set's classes.
      learned: If true, the network predicts the variance of p(x_s | x_t), too.
    """
    return network.clone(
        outputs=info.shape[-1] * (2 if learned else 1),
        classes=info.classes if conditional else 0,
        dtype=jnp.dtype(precision),
        parent=None,
    )
