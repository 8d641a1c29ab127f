"""The interface between training and the models that are trained.

A `Task` is a model together with its loss. It is a frozen dataclass without arrays, so that it can
be a static argument of `jax.jit`. The methods of a task are pure functions. They do not call
`jax.jit` and do not depend on devices: the callers compile the methods, or pass a `Compile`.
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
      params: Parameters with respect to which the training step differentiates the loss.
      extra: Extra variables: arrays that are not trained by gradients, such as the parameters of
        frozen networks and moving averages.
    """

    params: PyTree
    extra: PyTree


class LossOutput(NamedTuple):
    """Losses and metrics of the examples of a batch.

    Attributes:
      losses: The loss [B] of each example.
      metrics: A dictionary from the name of a metric to its values [B], one for each example.
      statistics: Arrays [B, ...] from which `Task.update_extra` computes the new extra variables.
    """

    losses: Float[Array, "batch"]
    metrics: dict[str, Float[Array, "batch"]]
    statistics: PyTree


@runtime_checkable
class Compile(Protocol):
    """A replacement of `jax.jit`: compiles once per set of static arguments and array shapes."""

    def __call__(
        self, fn: Callable[P, R], static_argnums: int | tuple[int, ...] = ()
    ) -> Callable[P, R]:
        """Return `fn` in compiled form; `static_argnums` are the positions of static arguments."""


class SampleRequest(NamedTuple):
    """Options of sampling that a caller of `SamplingTask.sample` can set.

    Attributes:
      labels: Class [B] of each image. If None, the images are not conditioned on a class.
      sampler: Name of the sampler. If None, the sampler in the task's config is used.
      steps: Number of sampling steps. If None, the number in the task's config is used.
      prompt: Caption on which all images are conditioned; None for a task without captions.
      negative_prompt: Caption that replaces the null conditioning in classifier-free guidance. If
        None, the null conditioning (the empty caption) is used.
    """

    labels: Int[Array, "batch"] | Int[np.ndarray, "batch"] | None = None
    sampler: str | None = None
    steps: int | None = None
    prompt: str | None = None
    negative_prompt: str | None = None


class Samples(NamedTuple):
    """Sampled images.

    Attributes:
      images: The sampled images, [N, H, W, C] in [-1, 1].
      labels: The class [N] on which each image is conditioned; None for a model without classes.
      trace: The pair (x_t, predicted x0) of the first n images at every sampling step, two arrays
        [steps, n, H, W, C]. None for a task whose samples are not produced step by step.
    """

    images: Float[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n"] | None = None
    trace: tuple[np.ndarray, np.ndarray] | None = None


class Evaluation(NamedTuple):
    """Results of an evaluation.

    Attributes:
      metrics: A dictionary from the name of a metric to its value. The caller adds the name of the
        split, as in "test/loss".
      images: A dictionary from a name to an image, uint8 [H, W, C], or to an animation of F frames,
        uint8 [F, H, W, C]. An image whose values are not finite is replaced by an error object.
      about: Information that is written to the run directory with the metrics, such as the sampler.
    """

    metrics: dict[str, float] = {}  # noqa: RUF012
    images: dict[str, np.ndarray | NonFinite] = {}  # noqa: RUF012
    about: Record = {}  # noqa: RUF012


class Needs(NamedTuple):
    """The trained networks of other runs that a task uses, as its config names them.

    A network is named by its run directory. "" means that the task does not use such a network.

    Attributes:
      features: The feature networks whose features are compared in metrics such as FID. Each is the
        name of a classifier experiment, the run directory of a classifier, or "inception".
      guidance_model: Run directory of the guidance model; "labels" if no second model is used.
      text_encoder: Run directory of the frozen text encoder of a text-to-image task.
      autoencoder: Run directory of the frozen autoencoder of a text-to-image task.
      dual_encoder: Run directory of the text and image encoders for metrics such as the CLIP score.
      dual_encoder_field: Path, within the task's config, of the field that names `dual_encoder`.
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
      task: Task with which the network was trained. Its `guidance_method` returns a method.
      params: Parameters of the network.
      about: Description of the training run of the network. Evaluations of samples store it.
    """

    task: "Task"
    params: PyTree
    about: str = ""


class Resources(NamedTuple):
    """Functions that load the networks of other runs, which `Needs` names.

    Attributes:
      features: One function for each feature network, which loads the network.
      guidance: Loads the guidance model. It returns None if the task has no guidance model.
      parts: Loads the parameters of the frozen networks of a new text-to-image run: the text
        encoder and the autoencoder. None if the task has no frozen networks.
      dual_encoder: Loads the text and image encoders for metrics, as (network, parameters). None if
        the evaluation does not use these encoders of another run.
    """

    features: tuple[Callable[[], FeatureNetwork], ...] = ()
    guidance: Callable[[], GuidanceModel | None] = lambda: None
    parts: Callable[[], PyTree] | None = None
    dual_encoder: Callable[[], tuple[nn.Module, PyTree]] | None = None


@runtime_checkable
class Task(Protocol):
    """A model and its loss: a frozen dataclass, which is the section `task` of a config.

    Tasks subclass this protocol. Some fields of a task depend on the data set, such as the image
    shape. `bind` sets these fields; a bound task is a task after `bind`. Methods with a body have a
    default for tasks that have no classes and no frozen networks and use no other runs.

    Attributes:
      run_type: Name of what a run of this task provides to other runs, such as "classifier".
      init_examples: Number of training examples in the batch that `init` gets.
    """

    run_type: ClassVar[str]
    init_examples: ClassVar[int] = 1

    @property
    def info(self) -> DataInfo:
        """Image shape, number of classes and other properties of the data set, set by `bind`."""

    @property
    def classes(self) -> int:
        """Number of classes that the network predicts or is conditioned on; 0 without labels."""
        return 0

    def needs(self) -> Needs:
        """Return the names of the trained networks of other runs that the task uses."""
        return Needs()

    def adapt_to(self: TaskT, data: Data) -> TaskT:
        """Return a copy of the task without the options that the data set does not support.

        Raises:
          UserError: If the task cannot be trained on the data set.
        """
        del data
        return self

    def prepare_data(self, data: Data) -> Data:
        """Return the part of `data` on which the task is trained, such as the labelled images."""
        return data

    def bind(self: TaskT, info: DataInfo, precision: str, batch_size: int) -> TaskT:
        """Return the task with values for the fields that depend on the data set (mark `BOUND`).

        Args:
          info: Image shape, number of classes and other properties of the data set.
          precision: Name of the number type of the computation, such as "bfloat16".
          batch_size: Number of examples in a training batch, summed over all devices.
        """

    def check(self) -> None:
        """Check, after `bind`, that the fields agree with each other and with the data set.

        Raises:
          FieldError: If two fields, or a field and the data set, contradict each other.
        """
        return None

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return initial variables; `batch` contains `init_examples` training examples."""

    def load_extra(self, extra: PyTree, load: Callable[[], PyTree] | None) -> PyTree:
        """Return the extra variables with the trained parameters of the frozen networks.

        Args:
          extra: The extra variables that `init` returns (arrays that are not trained by gradients).
            The parameters of frozen networks are zeros in them.
          load: The function `Resources.parts`, which loads these parameters; None if the task has
            no frozen networks.
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
          variables: Parameters and extra variables (arrays that are not trained by gradients).
          batch: A batch, or the part of a batch on one device or of one accumulation step.
          keys: One key for each example.
          train: If True, dropout, augmentation and label dropout are used.
          all_gather: A function that concatenates the arrays [B, ...] of all devices, for losses
            that compare the examples of a batch. It raises an error if gradients are accumulated.
        """

    def update_extra(self, extra: PyTree, statistics: PyTree) -> PyTree:
        """Return new values of the arrays that are not trained by gradients, after a training step.

        `statistics` has the arrays `LossOutput.statistics` [B, ...] of the entire batch.
        """
        del statistics
        return extra

    def evaluations(self: TaskT) -> "tuple[Evaluate[TaskT], ...]":
        """Return the functions that evaluate the task.

        One of the functions returns the metric "loss": the mean of `loss` with `train` = False. The
        checkpoint with the lowest "loss" on the validation split is the best checkpoint. A metric
        of an evaluation and a metric of `loss` with the same name are the same quantity.
        """

    def guidance_method(self, params: PyTree, scale: float | Array) -> PyTree | None:
        """Return the guidance method by which the network guides another network.

        Args:
          params: Parameters of the network.
          scale: Guidance scale.

        Returns:
          A `diffusion.guidance.Method`, or None if the network cannot guide another network.
        """
        del params, scale
        return None


@runtime_checkable
class SamplingTask(Task, Protocol):
    """A task whose trained network samples images.

    Attributes:
      request_fields: Names of the sampling options that the task supports, such as "steps".
    """

    @property
    def request_fields(self) -> tuple[str, ...]:
        """Names of the supported sampling options: label, sampler, steps, guidance or prompt."""
        return ()

    def check_request(self, request: SampleRequest) -> None:
        """Check that the task supports the sampling options of a request.

        Raises:
          FieldError: If the task does not support an option or its value.
        """
        del request

    def guidance(self, scale: float | None, model: GuidanceModel | None) -> PyTree:
        """Return the guidance that `sample` applies, with its scale and its networks.

        Args:
          scale: The guidance scale. If None, the scale in the task's config is used.
          model: The guidance model. If None, guidance is classifier-free, by labels or captions.

        Returns:
          A `diffusion.guidance.Guidance`, or None if samples are not guided.

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
          request: Options of sampling.
          guidance: The result of the method `guidance`.
          compile: Compiles functions for the devices; the task is a static argument of them.
        """

    def sample_for_evaluation(
        self, keys: Key[Array, "batch"], index: Array, context: "Context"
    ) -> tuple[Float[Array, "batch h w c"], tuple[Array, Array] | None]:
        """Return a batch of the samples of an evaluation.

        Args:
          keys: One key for each image.
          index: Index [B] of each sample; index modulo number of classes is the sample's class.
          context: Arguments and cached results of the evaluation.

        Returns:
          Images [B, H, W, C] in [-1, 1], and their trace (see `Samples`) or None.
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
        """Return the metrics and images of the split `context.split`."""


class Context(abc.ABC):
    """Arguments and cached results of the functions of one evaluation.

    The class is not a protocol, because the run-time check of a protocol reads all properties, and
    properties of this class load networks.

    Attributes:
      task: The task.
      variables: Variables of the task.
      data: The data set.
      split: Name of the split that is evaluated, "validation" or "test".
      seed: Seed of all random numbers of the evaluation.
      full: True in the final evaluation. The evaluations during training are shorter.
      resources: Functions that load the networks of other runs.
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
        """The examples of the split that is evaluated."""

    def examples(self, quick: int = 1000) -> Split:
        """Return the held-out examples: all of them if `full`, else the first `quick`."""
        return self.held_out if self.full else self.held_out.first(quick)

    @property
    @abc.abstractmethod
    def compile(self) -> Compile:
        """A function that compiles other functions for the devices of the evaluation."""

    @property
    @abc.abstractmethod
    def guidance_model(self) -> GuidanceModel | None:
        """The guidance model; None if the task's config does not name a guidance model."""

    @property
    @abc.abstractmethod
    def guidance(self) -> PyTree:
        """The guidance of all samples of the evaluation: the result of `SamplingTask.guidance`."""

    @property
    @abc.abstractmethod
    def classes(self) -> int:
        """Number of classes on which samples are conditioned; 0 without classes."""

    @abc.abstractmethod
    def cached(self, compute: "Callable[[Context], R]") -> R:
        """Return `compute(self)`; it is computed at the first call and then cached."""

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
          compute: A function (task, *arguments, batch, keys) that returns a dictionary of arrays
            [B, ...]. It must be a top-level function of a module, so that it is compiled only once.
            The task is a static argument.
          split: The examples.
          batch_size: Number of examples in a batch. The results do not depend on this number.
          arguments: Further arguments of `compute`, such as parameters.

        Returns:
          A dictionary of float64 arrays [N, ...] with the names that `compute` returns.
        """

    @abc.abstractmethod
    def samples(self, count: int) -> Samples:
        """Return the first `count` samples, with the sampling options of the task's config.

        The class of sample i is i modulo the number of classes. Samples are cached, so that a
        second call returns the same samples.
        """

    @abc.abstractmethod
    def round_up(self, batch_size: int) -> int:
        """Return `batch_size`, rounded up to a multiple of the number of devices."""

    @abc.abstractmethod
    def place(self, tree: PyTree) -> PyTree:
        """Partition a batch, arrays [B, ...] that every process has in full, across devices."""

    @abc.abstractmethod
    def check_preemption(self) -> None:
        """End the evaluation in all processes if one of them received a stop signal.

        The functions of an evaluation call this method between two batches.
        """


def sample_classes(task: SamplingTask, model: GuidanceModel | None) -> int:
    """Return the number of classes of the task, or those of its guidance model if that is 0."""
    return task.classes if task.classes or model is None else model.task.classes
