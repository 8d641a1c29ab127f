"""What an experiment is: its config of sections, and how it is varied."""

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
    """The data set of a run.

    Attributes:
      name: Name of the data set: digits, shapes, folder:PATH, or a name that TFDS knows.
      validation: Validation images; none: the data set's own, or else a tenth of the training
        images, at most 5,000; 0: all training images are trained on, and nothing is evaluated
        before the end.
    """

    name: Annotated[str, PATH] = "digits"
    validation: ValidationImages = None


@dataclasses.dataclass(frozen=True)
class Recipe(Generic[T_co]):
    """What is trained and how, without the data set, which several runs share.

    Attributes:
      task: What is trained, with its network.
      optimizer: The optimizer.
      ema: Moving averages of the parameters.
      train: How long a run trains, and how often it reports.
    """

    task: T_co
    optimizer: Adam | Muon = Adam()
    ema: EMA = EMA()
    train: Train = Train()

    def on(self, data: Dataset) -> "Config[T_co]":
        """Return the config of a run on a data set."""
        return Config(data, self.task, self.optimizer, self.ema, self.train)


@dataclasses.dataclass(frozen=True)
class Config(Generic[T_co]):
    """The config of one run.

    Attributes:
      data: The data set.
      task: What is trained, with its network.
      optimizer: The optimizer.
      ema: Moving averages of the parameters.
      train: How long a run trains, and how often it reports.
    """

    data: Dataset
    task: T_co
    optimizer: Adam | Muon = Adam()
    ema: EMA = EMA()
    train: Train = Train()


@runtime_checkable
class SeveralRuns(Protocol):
    """The config of an experiment of several runs: a frozen dataclass with these methods."""

    @property
    def data(self) -> Dataset:
        """The data set of all runs."""

    def parts(self, workdir: pathlib.Path) -> dict[str, Config]:
        """Return the config of every run by the name of its directory, in order."""

    def complete(self, part: str, configs: dict[str, Config]) -> Config:
        """Return a part's bound config with what follows from the other parts' configs."""


AnyConfig = Config | SeveralRuns
C = TypeVar("C", bound=AnyConfig, default=AnyConfig)


class Report(NamedTuple):
    """What an experiment of several runs computes from them.

    Attributes:
      title: Title of the table.
      rows: Rows (name, text) of the table that is printed.
      figures: Images [H, W, 3] of uint8 by the name of their file.
      record: What summary.json holds.
    """

    title: str
    rows: list[tuple[str, str]]
    figures: dict[str, np.ndarray]
    record: Record


class Options(NamedTuple):
    """What the command line says besides the config.

    Attributes:
      seed: Seed of all random numbers.
      parallel: How a step is spread over devices.
      data_dir: Where TFDS data sets are or get prepared.
      strict_data: A missing data set is an error.
      debug: A tiny variant.
      profile: Trace some steps.
      wandb: Log to Weights & Biases, too.
      split: Split that --mode=eval evaluates on.
      overrides: Paths of the fields of the config that the user set.
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
    """Where an experiment of several runs lies, and what the command line says.

    Attributes:
      workdir: Its directory, in which every run has one.
      options: What the command line says besides the config.
      loaded: The data set.
    """

    workdir: pathlib.Path
    options: Options
    loaded: Loaded


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One run for each value of a field.

    Attributes:
      base: The config of every run.
      field: Path of the field in a run's config.
      values: Its values.
    """

    base: Config
    field: str
    values: tuple[float, ...]

    @property
    def data(self) -> Dataset:
        """The data set of all runs."""
        return self.base.data

    def complete(self, part: str, configs: dict[str, Config]) -> Config:
        """Return a part's config; no run needs another one."""
        return configs[part]

    def parts(self, workdir: pathlib.Path) -> dict[str, Config]:
        """Return the config of every run by the name of its directory.

        Raises:
          FieldError: there is no such field, or a value does not fit it or gives the same directory
            as another one.
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
        """Return the annotation of the field; FieldError if a run does not have it."""
        hints = {field.path: field.hint for field in fields_of(self.base)}
        if self.field not in hints:
            raise FieldError(
                f"field={self.field}: a run has no such field; give the path of a number, such as "
                "optimizer.learning_rate"
            )
        return hints[self.field]


@dataclasses.dataclass(frozen=True)
class Experiment(Generic[C]):
    """An experiment: the one name, EXPERIMENT, that is looked up in a file of experiments/.

    Attributes:
      config: A `Config`, or that of several runs.
      debug: Values of fields by their paths, for a tiny variant that ends in seconds.
      alternatives: Tuned alternatives of sections, by their paths.
      fallback: Data set to use if the default one is not available and cannot be downloaded.
      report: Computes the result of several runs: (config, summaries by directory, context).
      samples: Of several runs, the part that --mode=sample and --mode=eval use; "": none.
      name: Its file's name, set by the registry.
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
        """Whether it trains several runs."""
        return not isinstance(self.config, Config)


def bind(config: Config[T], info: DataInfo) -> Config[T]:
    """Return `config` with the bound fields of its task set for a data set."""
    task = config.task.bind(info, config.train.precision, config.train.batch_size)
    return dataclasses.replace(config, task=task)


@runtime_checkable
class BuiltOnParts(Protocol):
    """A task on the networks of a text encoder and an autoencoder, which other runs train."""

    @property
    def parts_known(self) -> bool:
        """Whether the fields that follow from the parts are set."""

    def with_parts(self, text: Task, autoencoder: Task) -> Task:
        """Return the task with what follows from a text encoder's task and an autoencoder's."""


@runtime_checkable
class WithNetwork(Protocol):
    """A task of one network."""

    @property
    def network(self) -> nn.Module:
        """The network."""


def with_parts(config: Config, text: Config, autoencoder: Config) -> Config:
    """Return a generation model's config with the networks of its parts, bound again.

    Args:
      config: bound, of a task that is built on parts.
      text: of the text encoder.
      autoencoder: of the autoencoder.
    """
    assert isinstance(config.task, BuiltOnParts)
    task = config.task.with_parts(text.task, autoencoder.task)
    return bind(dataclasses.replace(config, task=task), config.task.info)


def checked_task(config: Config[T]) -> T:
    """Return the task of a bound config, once its fields are checked.

    Raises:
      ConfigError: fields contradict each other or the data.
    """
    try:
        config.task.check()
    except FieldError as error:
        others = [f"task.{field}" for field in error.others]
        raise ConfigError(f"--config.task.{error}", *others) from None
    return config.task


def title_of(experiment: str, part: str) -> str:
    """Return what a run is called: its experiment's name, and the part's if it has one."""
    return f"{experiment}/{part}" if part else experiment


class Run(NamedTuple):
    """A run to train.

    Attributes:
      name: Name of its experiment.
      config: Its config, not bound yet.
      workdir: Its directory.
      loaded: Its data set.
      options: What the command line says besides.
      part: The part of an experiment of several runs.
    """

    name: str
    config: Config
    workdir: pathlib.Path
    loaded: Loaded
    options: Options
    part: str = ""

    @property
    def title(self) -> str:
        """The experiment's name, and the part's."""
        return title_of(self.name, self.part)

    def bound(self) -> "Run":
        """Return the run with its config bound to the data."""
        return self._replace(config=bind(self.config, info_of(self.loaded.data)))


# Trains a bound run that needs no other, and returns its summary; None: it was asked to stop.
TrainAlone = Callable[[Run, Data], Record | None]


def parts_of(config: SeveralRuns, workdir: pathlib.Path) -> dict[str, Config]:
    """Return the configs of several runs.

    Raises:
      ConfigError: fields contradict each other.
    """
    try:
        return config.parts(workdir)
    except FieldError as error:
        raise ConfigError(f"--config.{error}", *error.others) from None
