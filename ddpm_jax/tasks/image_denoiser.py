"""A task that trains a denoising network of images: its settings, and how it samples."""

import dataclasses
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.data.types import DataInfo
from ddpm_jax.diffusion.guidance import Autoguidance, Guidance
from ddpm_jax.diffusion.prediction import Denoiser
from ddpm_jax.fields import (
    MAY_CHANGE,
    OR_NONE,
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

DEFAULT = SampleRequest()  # the settings of a task

TRACED = 10  # samples of an evaluation whose trajectories are kept


@dataclasses.dataclass(frozen=True)
class SampleEvaluation:
    """How a denoiser and its samples are evaluated.

    Attributes:
      batch_size: Images of one batch of an evaluation.
      times_per_image: Noise levels at which the loss and the bound of each image are averaged.
      num_samples: Samples of the final evaluation, the classes in turn.
      num_samples_between: The same of every evaluation before; 0: none.
      features: Networks in whose features samples are compared with images: the name of a
        classifier's experiment, which is trained once on the same data; a trained classifier's run
        directory; inception, for FID, whose weights the user has. Empty: none.
    """

    batch_size: EvalBatch = 256
    times_per_image: EvalTimes = 8
    num_samples: NumSamples = 1000
    num_samples_between: NumSamplesBetween = 0
    features: Annotated[tuple[str, ...], OR_NONE, MAY_CHANGE] = ()


def class_labels(labels: Int[Array, "batch"], classes: int) -> Int[Array, "batch"]:
    """Return the labels of a class-conditional network: `classes`, "no class", in place of -1."""
    return jnp.where(labels < 0, classes, labels)


@runtime_checkable
class ImageDenoiser(SamplingTask, DenoisingModel, Protocol):
    """A task that trains a denoising network of images, unconditional or class-conditional.

    Attributes:
      network: The network.
      sampling: How images are sampled.
      evaluation: What is evaluated.
    """

    provides: ClassVar[str] = "diffusion"

    @property
    def network(self) -> DenoisingNetwork:
        """The denoising network."""

    @property
    def sampling(self) -> Sampling:
        """How images are sampled."""

    @property
    def evaluation(self) -> SampleEvaluation:
        """What is evaluated."""

    @property
    def learned_variance(self) -> bool:
        """Whether the network has learned the variance of a step."""
        return False

    @property
    def only_conditional(self) -> str:
        """The field, with its value, by which the network is never trained without its labels.

        They cannot guide it then; "": it is.
        """

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """Shape of an image."""
        return self.info.shape

    @property
    def classes(self) -> int:
        """Number of classes that the network is conditioned on; 0: none."""
        return self.network.classes

    @property
    def request_fields(self) -> tuple[str, ...]:
        """Names of what can be asked for."""
        return "label", "sampler", "steps", "guidance"

    def needs(self) -> Needs:
        """Return the names of other runs: feature networks and a guidance model."""
        return Needs(self.evaluation.features, self.sampling.guidance_model)

    def conditioning(self, labels: Int[Array, "batch"]) -> Int[Array, "batch"] | None:
        """Return what the network is given of the labels of a batch; None: it has no classes."""
        return class_labels(labels, self.classes) if self.classes else None

    def check_denoiser(self) -> None:
        """Check how the network is sampled from.

        Raises:
          FieldError: it does not fit the network or the schedule.
        """
        with section("sampling"):
            check_sampling(self.sampling, self.table_steps, self.learned_variance)
        if self.sampling.guidance_model == "labels":
            self._check_scale(self.sampling.guidance)

    def check_request(self, request: SampleRequest) -> None:
        """Check that there is the sampler, for this network.

        Raises:
          FieldError: there is not.
        """
        check_sampling(self.sampling.requested(request), self.table_steps, self.learned_variance)

    @property
    def table_steps(self) -> int | None:
        """Steps of the schedule's table; None: it is continuous."""
        return None

    def guidance(self, scale: float | None, model: GuidanceModel | None) -> Guidance:
        """Return the guidance of sampling.

        Args:
          scale: its scale; None: that of the settings.
          model: the guidance model; None: the labels guide, if there are any.

        Raises:
          FieldError: the network is never trained without labels.
        """
        if model is None:
            self._check_scale(self.sampling.guidance if scale is None else scale)
        return self.sampling.make_guidance(scale, model, self.classes > 0)

    def _check_scale(self, scale: float) -> None:
        if self.classes and self.only_conditional:
            check_guidance_is_trained(self.only_conditional, scale)

    def guide(self, params: PyTree, scale: float | Array) -> Autoguidance:
        """Return autoguidance by the trained network, as the worse model (Karras et al. 2024)."""
        return Autoguidance(scale, params, self)

    def sampler(self, request: SampleRequest = DEFAULT) -> ImageSampler:
        """Return the sampler of the settings, or of what a request names."""
        return sampler_of(self, self.sampling.requested(request))

    def null(self, labels: PyTree) -> PyTree:
        """Return what an unconditional network is given: the label "no class"."""
        return None if labels is None else jnp.full_like(labels, self.classes)

    def denoiser(
        self, variables: Variables, request: SampleRequest, guidance: Guidance
    ) -> Denoiser:
        """Return the denoiser that sampling uses, with its x0 in range.

        Args:
          variables: of the trained task.
          request: whose labels the network is given.
          guidance: how it is guided.
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
        """Return images in [-1, 1], one for every key.

        Args:
          variables: of the trained task.
          keys: one for every image.
          request: how images are sampled.
          guidance: how the network is guided.
          compile: compiles functions.
        """
        walk = compile(ImageSampler.sample, static_argnums=(0, 1))
        labels, sampler = request.labels, self.sampler(request)
        images, _ = walk(sampler, 0, variables.params, guidance, keys, labels, self.null(labels))
        return images

    def sample_in_turn(
        self,
        keys: Key[Array, "batch"],
        place: Int[Array, "batch"],
        context: EvaluationContext,
    ) -> tuple[Float[Array, "batch h w c"], tuple[Array, Array] | None]:
        """Return the images of an evaluation, the classes in turn, and the trace of the first.

        Args:
          keys: one for every image.
          place: the number of every image, which chooses its class.
          context: of the evaluation.
        """
        labels = place % context.classes if context.classes else None
        walk = context.compile(ImageSampler.sample, static_argnums=(0, 1))
        return walk(
            self.sampler(),
            TRACED,
            context.variables.params,
            context.guidance,
            keys,
            labels,
            self.null(labels),
        )


def bound_network(
    network: DenoisingNetwork,
    info: DataInfo,
    precision: str,
    *,
    conditional: bool,
    learned: bool = False,
) -> DenoisingNetwork:
    """Return a network for images.

    Args:
      network: the network.
      info: the data set.
      precision: type of its computation.
      conditional: whether it is given classes.
      learned: whether it learns the variance of a step, too.
    """
    return network.clone(
        outputs=info.shape[-1] * (2 if learned else 1),
        classes=info.classes if conditional else 0,
        dtype=jnp.dtype(precision),
        parent=None,
    )
