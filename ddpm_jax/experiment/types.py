"""Types of experiments: configs, runs, options and reports."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Generic, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import numpy as np
from typing_extensions import TypeVar

from ddpm_jax.config import fields_of, replace
from ddpm_jax.data.types import Data, DataInfo, Loaded, info_of
from ddpm_jax.errors import ConfigError
from ddpm_jax.fields import PATH, FieldError, ValidationImages, parse
from ddpm_jax.system.record import Record
from ddpm_jax.task import Task
from ddpm_jax.training.ema import EMA
from ddpm_jax.training.optimizer import Adam, Muon
from ddpm_jax.training.settings import Train

T = TypeVar("T", bound=Task)
T_co = TypeVar("T_co", bound=Task, covariant=True, default=Task)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The section `data` of a config: the data set of a run, and its validation split.

    Attributes:
      name: Name of the data set: digits, shapes, folder:PATH, or a TFDS name such as mnist.
      validation: Number of training images held out for validation. With none, the validation
        split of the data set is used; if it does not exist, a tenth of the training images, at
        most 5,000. With 0, there is no validation split and no evaluation before the end.
    """

    name: Annotated[str, PATH] = "digits"
    validation: ValidationImages = None


@dataclasses.dataclass(frozen=True)
class Recipe(Generic[T_co]):
    """The config of one run without the data set, for experiments whose runs share a data set.

    Attributes:
      task: The task, with its network.
      optimizer: The optimizer.
      ema: Exponential moving averages of the parameters.
      train: Number of training steps, batch size and intervals.
    """

    task: T_co
    optimizer: Adam | Muon = Adam()
    ema: EMA = EMA()
    train: Train = Train()

    def on(self, data: Dataset) -> "Config[T_co]":
        """Return the complete config of a run on the data set `data`."""
        return Config(data, self.task, self.optimizer, self.ema, self.train)


@dataclasses.dataclass(frozen=True)
class Config(Generic[T_co]):
    """The config of one run.

    Attributes:
      data: The data set.
      task: The task, with its network.
      optimizer: The optimizer.
      ema: Exponential moving averages of the parameters.
      train: Number of training steps, batch size and intervals.
    """

    data: Dataset
    task: T_co
    optimizer: Adam | Muon = Adam()
    ema: EMA = EMA()
    train: Train = Train()


@runtime_checkable
class SeveralRuns(Protocol):
    """Protocol of the config of an experiment of several runs, which is a frozen dataclass."""

    @property
    def data(self) -> Dataset:
        """The data set of all runs."""

    def parts(self, workdir: pathlib.Path) -> dict[str, Config]:
        """Return the configs of the runs by their directories in `workdir`, in training order."""

    def complete(self, part: str, configs: dict[str, Config]) -> Config:
        """Return the config of a run with the fields that follow from the other runs.

        Args:
          part: Name of the run's directory.
          configs: Configs of all runs, bound to the data set (see `bind`), by these names.
        """


AnyConfig = Config | SeveralRuns
C = TypeVar("C", bound=AnyConfig, default=AnyConfig)


class Report(NamedTuple):
    """The results of an experiment of several runs.

    Attributes:
      title: Title of the printed table.
      rows: Rows (name, text) of the printed table.
      figures: Figures, uint8 [H, W, 3], by the names of their files.
      record: Content of summary.json.
    """

    title: str
    rows: list[tuple[str, str]]
    figures: dict[str, np.ndarray]
    record: Record


class Options(NamedTuple):
    """Options of the command line that are not fields of the config.

    Attributes:
      seed: Seed of all random numbers.
      parallel: How a training step is partitioned across devices, one of `parallel.PARALLEL`.
      data_dir: Directory of TFDS data sets; if None, the default directory of TFDS.
      strict_data: If true, a missing data set is an error even if there is a fallback.
      debug: If true, the tiny variant of the experiment is trained.
      profile: If true, jax's profiler traces some training steps.
      wandb: If true, the run is also logged to Weights & Biases.
      split: Split that --mode=eval uses: "validation" or "test".
      overrides: Paths of the config fields that the user set on the command line.
    """

    seed: int = 0
    parallel: str = "jit"
    data_dir: str | None = None
    strict_data: bool = False
    debug: bool = False
    profile: bool = False
    wandb: bool = False
    split: str = "test"
    overrides: frozenset[str] = frozenset()


class Context(NamedTuple):
    """The directory, options and data set of an experiment of several runs.

    Attributes:
      workdir: Directory of the experiment, in which every run has a directory.
      options: Options of the command line.
      loaded: Data set of all runs.
    """

    workdir: pathlib.Path
    options: Options
    loaded: Loaded


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The config of a sweep: one run for each value of a field.

    Attributes:
      base: The config of all runs, except for the field that is varied.
      field: Path of the varied field in a run's config.
      values: Values of the field, one for each run.
    """

    base: Config
    field: str
    values: tuple[float, ...]

    @property
    def data(self) -> Dataset:
        """The data set of all runs."""
        return self.base.data

    def complete(self, part: str, configs: dict[str, Config]) -> Config:
        """Return a run's config unchanged, because it does not depend on the other runs."""
        return configs[part]

    def parts(self, workdir: pathlib.Path) -> dict[str, Config]:
        """Return the config of every run by the name of its directory.

        Raises:
          FieldError: If the field does not exist, it does not accept a value, or two values give
            the same directory.
        """
        del workdir
        hint, name = self._swept(), self.field.rpartition(".")[2]
        configs: dict[str, Config] = {}
        for value in self.values:
            directory = f"{name}_{value:g}"
            if directory in configs:
                raise FieldError(
                    f"values={','.join(map(str, self.values))}: two runs would share the directory "
                    f"{directory}; give values that differ in their first six digits"
                )
            text = str(value).removesuffix(".0")
            try:
                configs[directory] = replace(self.base, {self.field: parse(text, hint)})
            except ValueError as error:
                raise FieldError(f"values={text}: {error}, as {self.field}") from None
        return configs

    def _swept(self) -> object:
        """Return the annotation of the varied field; raise FieldError if it does not exist."""
        hints = {field.path: field.hint for field in fields_of(self.base)}
        if self.field not in hints:
            raise FieldError(
                f"field={self.field}: a run has no such field; give the path of a numeric field, "
                "such as optimizer.learning_rate"
            )
        return hints[self.field]


@dataclasses.dataclass(frozen=True)
class Experiment(Generic[C]):
    """An experiment, which a file of experiments/ defines as `EXPERIMENT`.

    Attributes:
      config: The config of a single run, or of several runs (`SeveralRuns`).
      debug: Values of fields by path that `--debug` sets, for a run that ends in seconds.
      alternatives: Sections by path that `--config.SECTION=NAME` can choose, with tuned values.
      fallback: Data set to use if the default one is not available and cannot be downloaded.
      report: Function (config, summary.json of each run by name, context) -> `Report`.
      samples: Name of the run that --mode=sample uses; "" if the user must choose one of the runs.
      name: Name of the file, set by the registry.
    """

    config: C
    debug: Mapping[str, object] = dataclasses.field(default_factory=dict)
    alternatives: Mapping[str, tuple[object, ...]] = dataclasses.field(default_factory=dict)
    fallback: str | None = None
    report: Callable[[C, dict[str, Record], Context], Report] | None = None
    samples: str = ""
    name: str = ""

    @property
    def several(self) -> bool:
        """True if the experiment trains several runs."""
        return not isinstance(self.config, Config)


def bind(config: Config[T], info: DataInfo) -> Config[T]:
    """Return the config with its task bound: fields that depend on the data set are set."""
    task = config.task.bind(info, config.train.precision, config.train.batch_size)
    return dataclasses.replace(config, task=task)


@runtime_checkable
class BuiltOnParts(Protocol):
    """Protocol of a task that uses the text encoder and the autoencoder of other runs."""

    @property
    def parts_bound(self) -> bool:
        """True if the fields that depend on the text encoder and the autoencoder are set."""

    def with_parts(self, text: Task, autoencoder: Task) -> Task:
        """Return the task with the networks of a text encoder and of an autoencoder."""


@runtime_checkable
class WithNetwork(Protocol):
    """Protocol of a task that has one network."""

    @property
    def network(self) -> nn.Module:
        """The network, a Flax module."""


def with_parts(config: Config, text: Config, autoencoder: Config) -> Config:
    """Return a generation model's config with the networks of the two runs that it uses.

    Args:
      config: Config of the generation model, whose task is bound to its data set.
      text: Config of the text encoder's run.
      autoencoder: Config of the autoencoder's run.
    """
    assert isinstance(config.task, BuiltOnParts)
    task = config.task.with_parts(text.task, autoencoder.task)
    return bind(dataclasses.replace(config, task=task), config.task.info)


def checked_task(config: Config[T]) -> T:
    """Check the fields of a config's task, which is bound to its data set; return the task.

    Raises:
      ConfigError: If fields contradict each other or the data set.
    """
    try:
        config.task.check()
    except FieldError as error:
        others = [f"task.{field}" for field in error.others]
        raise ConfigError(f"--config.task.{error}", *others) from None
    return config.task


def title_of(experiment: str, part: str) -> str:
    """Return the title of a run: EXPERIMENT, or EXPERIMENT/PART for one of several runs."""
    return f"{experiment}/{part}" if part else experiment


class Run(NamedTuple):
    """A run to train: a config, a data set and a directory.

    Attributes:
      name: Name of the experiment.
      config: Config of the run. `bound` sets the task's fields that depend on the data set.
      workdir: Directory of the run.
      loaded: Data set of the run.
      options: Options of the command line.
      part: Name of the run within an experiment of several runs; "" for any other run.
    """

    name: str
    config: Config
    workdir: pathlib.Path
    loaded: Loaded
    options: Options
    part: str = ""

    @property
    def title(self) -> str:
        """The title of the run: EXPERIMENT, or EXPERIMENT/PART for one of several runs."""
        return title_of(self.name, self.part)

    def bound(self) -> "Run":
        """Return the run with the task of its config bound to the data set (see `bind`)."""
        return self._replace(config=bind(self.config, info_of(self.loaded.data)))


# A function that trains a run, bound to its data set. It returns the content of summary.json, or
# None if the user stopped the training.
TrainAlone = Callable[[Run, Data], Record | None]


def parts_of(config: SeveralRuns, workdir: pathlib.Path) -> dict[str, Config]:
    """Return the configs of an experiment of several runs by the names of their directories.

    Raises:
      ConfigError: If fields contradict each other.
    """
    try:
        return config.parts(workdir)
    except FieldError as error:
        raise ConfigError(f"--config.{error}", *error.others) from None
