"""The interface between training and the models that are trained.

A `Task` is a frozen dataclass of settings, without arrays, so that it can be a static argument of
`jax.jit`. Its methods are pure functions. They do not call `jax.jit` and do not depend on devices:
their callers compile them, or pass a `Compile`.
"""

import abc
from collections.abc import Callable
from typing import (
    ClassVar,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeVar,
    TypeVarTuple,
    runtime_checkable,
)

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.data.types import Batch, Data, DataInfo, Split
from ddpm_jax.errors import NonFinite
from ddpm_jax.metrics.features import FeatureNetwork
from ddpm_jax.system.record import Record

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
TaskT = TypeVar("TaskT", bound="Task")  # beartype does not support `Self`
Ts = TypeVarTuple("Ts")
T_contra = TypeVar("T_contra", contravariant=True)

AllGather = Callable[[PyTree], PyTree]  # concatenates arrays [B, ...] of all devices


class Variables(NamedTuple):
    """Parameters and other arrays of a task.

    Attributes:
      params: Parameters that the training step differentiates the loss by.
      extra: Arrays without gradients: parameters of frozen parts, and running statistics.
    """

    params: PyTree
    extra: PyTree


class LossOutput(NamedTuple):
    """Losses and metrics of the examples of a batch.

    Attributes:
      losses: The loss [B] of each example.
      metrics: Metrics [B] of each example by name.
      statistics: Statistics of the batch for `Task.update_extra`.
    """

    losses: Float[Array, "batch"]
    metrics: dict[str, Float[Array, "batch"]]
    statistics: PyTree


@runtime_checkable
class Compile(Protocol):
    """A `jax.jit` that compiles once for all calls with equal static arguments and shapes."""

    def __call__(
        self, fn: Callable[P, R], static_argnums: int | tuple[int, ...] = ()
    ) -> Callable[P, R]:
        """Return the compiled function."""


class SampleRequest(NamedTuple):
    """Settings of sampling; a field that is None has the value in the config of the task.

    Attributes:
      labels: Class of each image; None for a model without classes.
      sampler: Name of the sampler.
      steps: Number of steps of the sampler.
      prompt: Caption that the images are conditioned on.
      negative_prompt: Caption in the place of the null conditioning of guidance.
    """

    labels: Int[Array, "batch"] | Int[np.ndarray, "batch"] | None = None
    sampler: str | None = None
    steps: int | None = None
    prompt: str | None = None
    negative_prompt: str | None = None


class Samples(NamedTuple):
    """Sampled images.

    Attributes:
      images: [N, H, W, C] in [-1, 1].
      labels: Class [N] of each image; None for a model without classes.
      trace: x_t and the predicted x0 [steps, n, H, W, C] of the first n images at every step of the
        sampler; None for a task without such steps.
    """

    images: Float[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n"] | None = None
    trace: tuple[np.ndarray, np.ndarray] | None = None


class Evaluation(NamedTuple):
    """Results of an evaluation.

    Attributes:
      metrics: Metrics by name. The caller adds the name of the split, as in "test/loss".
      images: Images uint8 [H, W, C] or animations [F, H, W, C] by name. An error stands for an
        image whose values are not finite (`plots.image_or_error`).
      about: Further information for the record, such as the settings of sampling.
    """

    metrics: dict[str, float] = {}  # noqa: RUF012
    images: dict[str, np.ndarray | NonFinite] = {}  # noqa: RUF012
    about: Record = {}  # noqa: RUF012


class Needs(NamedTuple):
    """Other runs that the settings of a task name; "" stands for no run.

    Attributes:
      features: Feature networks: experiments or runs of classifiers, or "inception".
      guidance_model: Run of the guidance model; "labels" for guidance without another model.
      text_encoder: Run of the text encoder that the task contains.
      autoencoder: Run of the autoencoder that the task contains.
      dual_encoder: Run of the text encoder and its image tower, which compute metrics.
      dual_encoder_field: Path of the field that names this run, within the section `task`.
    """

    features: tuple[str, ...] = ()
    guidance_model: str = "labels"
    text_encoder: str = ""
    autoencoder: str = ""
    dual_encoder: str = ""
    dual_encoder_field: str = ""


class GuidanceModel(NamedTuple):
    """A trained network that guides the sampling of another network.

    Attributes:
      task: Task of the network, whose `guidance_method` does not return None.
      params: Parameters of the network.
      about: Description of its run, for the record.
    """

    task: "Task"
    params: PyTree
    about: str = ""


class Resources(NamedTuple):
    """Functions that load networks of other runs, as named by `Needs`.

    Attributes:
      features: Functions that load the feature networks.
      guidance: Loads the guidance model; returns None if there is no guidance model.
      parts: Loads the parameters of the frozen parts of a new run.
      dual_encoder: Loads the network and the parameters of the dual encoder of the evaluation.
    """

    features: tuple[Callable[[], FeatureNetwork], ...] = ()
    guidance: Callable[[], GuidanceModel | None] = lambda: None
    parts: Callable[[], PyTree] | None = None
    dual_encoder: Callable[[], tuple[nn.Module, PyTree]] | None = None


@runtime_checkable
class Task(Protocol):
    """A model and its loss: the section `task` of a config, a frozen dataclass.

    Tasks subclass this protocol. The methods with a body have defaults for tasks without classes,
    frozen parts or other runs.

    Attributes:
      run_type: Type of the run for other runs that name it, such as "classifier".
      init_examples: Number of training examples that `init` needs.
    """

    run_type: ClassVar[str]
    init_examples: ClassVar[int] = 1

    @property
    def info(self) -> DataInfo:
        """Information about the data set, set by `bind`."""

    @property
    def classes(self) -> int:
        """Number of classes that the network predicts or is conditioned on; 0 without classes."""
        return 0

    def needs(self) -> Needs:
        """Return the other runs that the settings name."""
        return Needs()

    def adapt_to(self: TaskT, data: Data) -> TaskT:
        """Return the bound task with its settings adapted to a data set.

        Raises:
          UserError: If the task cannot be trained on the data set.
        """
        del data
        return self

    def prepare_data(self, data: Data) -> Data:
        """Return the data that the task is trained on, for instance only the labelled images."""
        return data

    def bind(self: TaskT, info: DataInfo, precision: str, batch_size: int) -> TaskT:
        """Return the task with its fields set that are marked as BOUND.

        Args:
          info: Information about the data set.
          precision: Name of the number type of the computation, such as "bfloat16".
          batch_size: Number of examples of a training batch, over all devices.
        """

    def check(self) -> None:
        """Check that the fields of the bound task do not contradict each other or the data.

        Raises:
          FieldError: If fields contradict each other or the data.
        """
        return None

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return initial variables; `batch` has `init_examples` training examples."""

    def load_extra(self, extra: PyTree, load: Callable[[], PyTree] | None) -> PyTree:
        """Return the extra variables of a new run, with the trained parameters of frozen parts.

        Args:
          extra: The extra variables of `init`, in which these parameters are zeros.
          load: The function `Resources.parts`, which loads the parameters.
        """
        del load
        return extra

    def loss(
        self,
        variables: Variables,
        batch: Batch,
        keys: Key[Array, "batch"],
        *,
        train: bool,
        all_gather: AllGather,
    ) -> LossOutput:
        """Return the losses and metrics of the examples of a batch.

        Args:
          variables: Parameters and extra variables.
          batch: A batch, or the part of a batch on one device or of one accumulation step.
          keys: One key for each example.
          train: Whether to use dropout, augmentation and label dropout.
          all_gather: Concatenates arrays of all devices, for losses that compare examples. With
            gradient accumulation it raises an error.
        """

    def update_extra(self, extra: PyTree, statistics: PyTree) -> PyTree:
        """Return the extra variables after a step, given the statistics of the entire batch."""
        del statistics
        return extra

    def evaluations(self: TaskT) -> "tuple[Evaluate[TaskT], ...]":
        """Return the functions that evaluate the task.

        One of them returns the metric "loss": the mean of `loss` with `train` False. Its value on
        the validation split decides which checkpoint is the best. A metric with the name of a
        metric of `loss` is the same quantity.
        """

    def guidance_method(self, params: PyTree, scale: float | Array) -> PyTree | None:
        """Return a `diffusion.guidance.Method` that guides the sampling of another task.

        None is returned if the network cannot guide another task.
        """
        del params, scale
        return None


@runtime_checkable
class SamplingTask(Task, Protocol):
    """A task whose trained network samples images.

    Attributes:
      request_fields: Names of the sampling options that the task supports.
    """

    @property
    def request_fields(self) -> tuple[str, ...]:
        """Names of supported options: label, sampler, steps, guidance, prompt, ..."""
        return ()

    def check_request(self, request: SampleRequest) -> None:
        """Check that the task supports the settings of a request.

        Raises:
          FieldError: If a setting is not supported.
        """
        del request

    def guidance(self, scale: float | None, model: GuidanceModel | None) -> PyTree:
        """Return the `diffusion.guidance.Guidance` of sampling; None without guidance.

        Args:
          scale: The guidance scale; None for the scale in the config.
          model: The guidance model; None for classifier-free guidance by labels or captions.

        Raises:
          FieldError: If the network does not support this guidance.
        """
        del scale, model
        return None

    def sample(
        self,
        variables: Variables,
        keys: Key[Array, "batch"],
        request: SampleRequest,
        guidance: PyTree,
        compile: Compile,
    ) -> Float[Array, "batch h w c"]:
        """Return sampled images [B, H, W, C] in [-1, 1].

        Args:
          variables: Variables of the trained task.
          keys: One key for each image.
          request: Settings of sampling.
          guidance: Result of the method `guidance`.
          compile: Compiles functions with the task as a static argument.
        """

    def sample_for_evaluation(
        self, keys: Key[Array, "batch"], index: Array, context: "Context"
    ) -> tuple[Float[Array, "batch h w c"], tuple[Array, Array] | None]:
        """Return the samples of an evaluation, and the trace of the first (see `Samples`).

        Args:
          keys: One key for each image.
          index: Index [B] of each sample. Its class is the index modulo the number of classes.
          context: Context of the evaluation.
        """
        del index
        images = self.sample(
            context.variables, keys, SampleRequest(), context.guidance, context.compile
        )
        return images, None


@runtime_checkable
class Evaluate(Protocol[T_contra]):
    """A function that evaluates a task and computes one or several metrics."""

    def __call__(self, task: T_contra, context: "Context") -> Evaluation:
        """Return metrics and images of the split in the context."""


class Context(abc.ABC):
    """Arguments and cached results of the functions of one evaluation.

    It is not a protocol, because a run-time check of a protocol reads its properties, and these
    load models.

    Attributes:
      task: The task.
      variables: Variables of the task.
      data: The data set.
      split: Name of the split that is evaluated, "validation" or "test".
      seed: Seed of all random numbers.
      full: Whether this is the final evaluation. The evaluations during training are shorter.
      resources: Functions that load networks of other runs.
    """

    task: Task
    variables: Variables
    data: Data
    split: str
    seed: int
    full: bool
    resources: Resources

    @property
    @abc.abstractmethod
    def held_out(self) -> Split:
        """The examples of the split."""

    def examples(self, quick: int = 1000) -> Split:
        """Return the examples of the split, only the first `quick` if `full` is False."""
        return self.held_out if self.full else self.held_out.first(quick)

    @property
    @abc.abstractmethod
    def compile(self) -> Compile:
        """Function that compiles other functions for the devices of the evaluation."""

    @property
    @abc.abstractmethod
    def guidance_model(self) -> GuidanceModel | None:
        """The guidance model; None if the settings name none."""

    @property
    @abc.abstractmethod
    def guidance(self) -> PyTree:
        """The guidance in the settings of the task, from `SamplingTask.guidance`."""

    @property
    @abc.abstractmethod
    def classes(self) -> int:
        """Number of classes that samples are conditioned on; see `sample_classes`."""

    @abc.abstractmethod
    def cached(self, compute: "Callable[[Context], R]") -> R:
        """Return `compute(context)`, which is computed once in an evaluation and cached."""

    @abc.abstractmethod
    def per_example(
        self,
        compute: Callable[[T, *Ts, Batch, Key[Array, "batch"]], dict[str, Array]],
        split: Split,
        batch_size: int,
        *arguments: *Ts,
    ) -> dict[str, np.ndarray]:
        """Return the results of a function for every example, in the order of the split.

        Args:
          compute: Maps (task, *arguments, batch, keys) to arrays [B, ...] by name. It is a function
            of a module, and is compiled with the task as a static argument.
          split: The examples.
          batch_size: Number of examples of a batch. The results do not depend on it.
          arguments: Further arguments of `compute`, such as parameters.

        Returns:
          Arrays [N, ...] in float64 by name.
        """

    @abc.abstractmethod
    def samples(self, count: int) -> Samples:
        """Return the first `count` samples, with the settings of the task.

        The class of sample i is i modulo the number of classes. Samples are cached, so that a
        second call returns the same samples.
        """

    @abc.abstractmethod
    def round_up(self, batch_size: int) -> int:
        """Return the smallest multiple of the number of devices that is not below `batch_size`."""

    @abc.abstractmethod
    def place(self, tree: PyTree) -> PyTree:
        """Partition arrays [B, ...] across devices; all processes have the entire batch."""

    @abc.abstractmethod
    def check_preemption(self) -> None:
        """Stop the evaluation in all processes on preemption; called between batches."""


def sample_classes(task: SamplingTask, model: GuidanceModel | None) -> int:
    """Return the number of classes of the task, or of its guidance model if the task has none."""
    return task.classes if task.classes or model is None else model.task.classes
