"""The contract between training and everything that is trained.

A `Task` is a frozen dataclass of settings whose methods are pure functions of their arguments: it
holds no arrays, so that it can be static to `jax.jit`. It calls no `jax.jit` and knows no device:
whoever calls it compiles, through a `Compile`.
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
TaskT = TypeVar("TaskT", bound="Task")  # in the place of `Self`, which beartype does not take
Ts = TypeVarTuple("Ts")
T_contra = TypeVar("T_contra", contravariant=True)

AllGather = Callable[[PyTree], PyTree]  # the devices' parts of arrays [B, ...] put together


class Variables(NamedTuple):
    """What a trained task computes with.

    Attributes:
      params: Parameters, by which the step differentiates.
      extra: What is not differentiated: frozen parts and carried statistics.
    """

    params: PyTree
    extra: PyTree


class LossOutput(NamedTuple):
    """The loss of every example of a batch.

    Attributes:
      losses: [B].
      metrics: Other quantities [B] by name.
      statistics: What `Task.update_extra` needs of the batch.
    """

    losses: Float[Array, "batch"]
    metrics: dict[str, Float[Array, "batch"]]
    statistics: PyTree


@runtime_checkable
class Compile(Protocol):
    """Compiles a function once for its static arguments and the other arguments' shapes."""

    def __call__(
        self, fn: Callable[P, R], static_argnums: int | tuple[int, ...] = ()
    ) -> Callable[P, R]:
        """Return the compiled function."""


class SampleRequest(NamedTuple):
    """How images are sampled; None stands for the task's own setting.

    Attributes:
      labels: Class of every image; None: the images have no classes.
      sampler: Name of the sampler.
      steps: Steps of the sampler.
      prompt: Text that the images show.
      negative_prompt: Text that guidance leads away from.
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
      labels: Class [N] of every image; None: they have no classes.
      trace: x_t and the predicted x0 [steps, n, H, W, C] of the first n images at every step;
        None: the task has no such steps.
    """

    images: Float[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n"] | None = None
    trace: tuple[np.ndarray, np.ndarray] | None = None


class Evaluation(NamedTuple):
    """What an evaluation computes.

    The caller puts the split before the name of a metric, as in "test/loss".

    Attributes:
      metrics: Numbers by name.
      images: By name uint8 [H, W, C], an animation [F, H, W, C], or an error in the place of one
        whose values are not finite (`plots.attempt`).
      about: What metrics do not express: how images were sampled, what they were compared with.
    """

    metrics: dict[str, float] = {}  # noqa: RUF012
    images: dict[str, np.ndarray | NonFinite] = {}  # noqa: RUF012
    about: Record = {}  # noqa: RUF012


class Needs(NamedTuple):
    """Names of other runs that a task's settings hold.

    Attributes:
      features: Feature networks: classifiers' experiments or runs, and inception.
      guidance_model: Run that guides sampling; "labels": none.
      text_encoder: Run of the text encoder that the task is built on; "": none.
      autoencoder: Run of the autoencoder that the task is built on; "": none.
      dual_encoder: Run of the text encoder that computes metrics, with its image tower; "": none.
      dual_encoder_field: Path of the field that names it, within the section `task`.
    """

    features: tuple[str, ...] = ()
    guidance_model: str = "labels"
    text_encoder: str = ""
    autoencoder: str = ""
    dual_encoder: str = ""
    dual_encoder_field: str = ""


class GuidanceModel(NamedTuple):
    """A trained network that guides what another one samples.

    Attributes:
      task: Its task, whose `guide` is not None.
      params: Its parameters.
      about: Which run it is, for the record.
    """

    task: "Task"
    params: PyTree
    about: str = ""


class Resources(NamedTuple):
    """What a task is given that lies in other runs; by default, nothing.

    Attributes:
      features: Functions that load the networks in whose features samples are compared.
      guidance: Loads the model that guides sampling; None of it: there is none.
      parts: Loads the parameters of the frozen parts that a new run starts from.
      dual_encoder: Loads (network, parameters) of the dual encoder of the evaluation.
    """

    features: tuple[Callable[[], FeatureNetwork], ...] = ()
    guidance: Callable[[], GuidanceModel | None] = lambda: None
    parts: Callable[[], PyTree] | None = None
    dual_encoder: Callable[[], tuple[nn.Module, PyTree]] | None = None


@runtime_checkable
class Task(Protocol):
    """What is trained: the section `task` of a config, a frozen dataclass.

    The methods with a body here are those of a task that needs nothing of the kind; a task
    subclasses this protocol to have them.

    Attributes:
      provides: What a run of the task is, for other runs that name it: `classifier`, ...
      init_examples: How many training examples `init` needs.
    """

    provides: ClassVar[str]
    init_examples: ClassVar[int] = 1

    @property
    def info(self) -> DataInfo:
        """The data set, once the task is bound."""

    @property
    def classes(self) -> int:
        """Number of classes that the network knows or is conditioned on; 0: none."""
        return 0

    def needs(self) -> Needs:
        """Return the names of other runs that the settings hold."""
        return Needs()

    def fit_to(self: TaskT, data: Data) -> TaskT:
        """Return the task adjusted to a data set, after `bind`.

        Raises:
          UserError: it cannot be trained on these data.
        """
        del data
        return self

    def adapt(self, data: Data) -> Data:
        """Return the data as the task is trained on them, such as without unlabelled images."""
        return data

    def bind(self: TaskT, info: DataInfo, precision: str, batch_size: int) -> TaskT:
        """Return the task with its BOUND fields set."""

    def check(self) -> None:
        """Check that the fields of the bound task fit each other and the data.

        Raises:
          FieldError: they do not.
        """
        return None

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return the first variables; `batch` holds `init_examples` training examples."""

    def load_extra(self, extra: PyTree, load: Callable[[], PyTree] | None) -> PyTree:
        """Return the extra variables of a new run, with frozen parts in the place of zeros.

        Args:
          extra: as `init` returns them.
          load: loads the parts (`Resources.parts`).
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
        """Return the loss of every example.

        Args:
          variables: parameters and what is not differentiated.
          batch: a batch, a device's share of it, or a part of it.
          keys: one for every example.
          train: whether dropout, augmentation and dropped labels are used.
          all_gather: puts the shares of all devices together, for losses that compare examples,
            or raises an error that it cannot.
        """

    def update_extra(self, extra: PyTree, statistics: PyTree) -> PyTree:
        """Return the extra variables after a step; `statistics` are of the whole batch."""
        del statistics
        return extra

    def evaluations(self: TaskT) -> "tuple[Evaluate[TaskT], ...]":
        """Return the functions that evaluate the task.

        Together they return the metric "loss": the mean of `loss` without dropout, augmentation and
        dropped labels; on validation images it decides which checkpoint is the best. A metric that
        `loss` returns, too, is the same quantity; another quantity has another name.
        """

    def guide(self, params: PyTree, scale: float | Array) -> PyTree | None:
        """Return how the trained task guides what another one samples; None: it cannot.

        It is a `diffusion.guidance.Method`.
        """
        del params, scale
        return None


@runtime_checkable
class SamplingTask(Task, Protocol):
    """A task whose trained network samples images.

    Attributes:
      request_fields: Fields of a request that mean something to the task.
    """

    @property
    def request_fields(self) -> tuple[str, ...]:
        """Names of what can be asked for: label, sampler, steps, guidance, prompt, ..."""
        return ()

    def check_request(self, request: SampleRequest) -> None:
        """Check that images can be sampled as a request says.

        Raises:
          FieldError: they cannot.
        """
        del request

    def guidance(self, scale: float | None, model: GuidanceModel | None) -> PyTree:
        """Return the guidance of sampling, a `diffusion.guidance.Guidance`; None: there is none.

        Args:
          scale: its scale; None: that of the settings.
          model: the guidance model; None: the labels or captions guide, if there are any.

        Raises:
          FieldError: the network cannot be guided so.
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
        """Return images in [-1, 1], one for every key.

        Args:
          variables: of the trained task.
          keys: one for every image.
          request: how images are sampled.
          guidance: as `guidance` returns it.
          compile: compiles functions of the task.
        """

    def sample_in_turn(
        self, keys: Key[Array, "batch"], place: Array, context: "Context"
    ) -> tuple[Float[Array, "batch h w c"], tuple[Array, Array] | None]:
        """Return the images of an evaluation, and the trace of the first (see `Samples`).

        Args:
          keys: one for every image.
          place: the number [B] of every image, which chooses its class, if it has one.
          context: of the evaluation.
        """
        del place
        images = self.sample(
            context.variables, keys, SampleRequest(), context.guidance, context.compile
        )
        return images, None


@runtime_checkable
class Evaluate(Protocol[T_contra]):
    """A function that evaluates a task; a new metric is one such function and its name."""

    def __call__(self, task: T_contra, context: "Context") -> Evaluation:
        """Return metrics and images of the split of the context."""


class Context(abc.ABC):
    """What the functions of one evaluation share.

    It is not a protocol: to check one at run time reads its properties, and so loads models.

    Attributes:
      task: The task.
      variables: Its variables.
      data: The data set.
      split: Name of the split that is evaluated: validation or test.
      seed: Seed of all random numbers.
      full: Whether it is the final evaluation, or a quick one during training.
      resources: What lies in other runs.
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
        """Return the examples of the split; before the final evaluation the first `quick` alone."""
        return self.held_out if self.full else self.held_out.first(quick)

    @property
    @abc.abstractmethod
    def compile(self) -> Compile:
        """Compiles functions for the devices."""

    @property
    @abc.abstractmethod
    def guidance_model(self) -> GuidanceModel | None:
        """The model that guides sampling; None: there is none."""

    @property
    @abc.abstractmethod
    def guidance(self) -> PyTree:
        """The guidance of the task's settings, as `SamplingTask.guidance` returns it."""

    @property
    @abc.abstractmethod
    def classes(self) -> int:
        """Number of classes that samples have; see `sample_classes`."""

    @abc.abstractmethod
    def shared(self, compute: "Callable[[Context], R]") -> R:
        """Return `compute(context)`, which is computed once for an evaluation."""

    @abc.abstractmethod
    def per_example(
        self,
        compute: Callable[[T, *Ts, Batch, Key[Array, "batch"]], dict[str, Array]],
        split: Split,
        batch_size: int,
        *arguments: *Ts,
    ) -> dict[str, np.ndarray]:
        """Return `compute(task, *arguments, batch, keys)` of every example, in the split's order.

        Args:
          compute: a function of a module, which is compiled with the task as a static argument.
          split: the examples.
          batch_size: examples at a time; it changes no result.
          arguments: what the function needs besides, such as variables.

        Returns:
          By name [N, ...] in float64.
        """

    @abc.abstractmethod
    def samples(self, count: int) -> Samples:
        """Return samples of the task's settings, the classes in turn; each is sampled once."""

    @abc.abstractmethod
    def round_up(self, batch_size: int) -> int:
        """Return the next batch size that the devices divide."""

    @abc.abstractmethod
    def place(self, tree: PyTree) -> PyTree:
        """Return arrays of a whole batch, which all processes have, spread over the devices."""

    @abc.abstractmethod
    def check_preemption(self) -> None:
        """End the evaluation in all processes if it was asked for; called between batches."""


def sample_classes(task: SamplingTask, model: GuidanceModel | None) -> int:
    """Return how many classes can be asked for: the network's, or those of its guidance model."""
    return task.classes if task.classes or model is None else model.task.classes
