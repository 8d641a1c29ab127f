"""Read a run's directory: its record, its config and its newest checkpoint."""

import contextlib
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from ddpm_jax.config import restore, to_record
from ddpm_jax.data.types import DataInfo
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.preflight import read_run
from ddpm_jax.experiment.registry import load_experiment, names
from ddpm_jax.experiment.types import Config, Experiment, bind, build
from ddpm_jax.parallel import sharding
from ddpm_jax.training.checkpoint import open_checkpoints
from ddpm_jax.training.records import check_entries
from ddpm_jax.training.step import TrainState, state_shapes, without_training


class Recorded(NamedTuple):
    """What a run's directory says of it.

    Attributes:
      workdir: The directory.
      experiment: The experiment.
      part: The part of an experiment of several runs; "": the run is the whole.
      record: config.json.
      config: The run's config, bound to its data set; of several runs theirs.
    """

    workdir: pathlib.Path
    experiment: Experiment
    part: str
    record: dict[str, Any]
    config: Any

    @property
    def title(self) -> str:
        """The experiment's name, and the part's."""
        return f"{self.experiment.name}/{self.part}" if self.part else self.experiment.name


def read(workdir: pathlib.Path) -> Recorded:
    """Return what is recorded of the run in `workdir`.

    Raises:
      UserError: there is none, it is damaged, or of no known experiment.
    """
    record = read_run(workdir, complete=True)
    if record is None:
        raise UserError(f"there is no run in {workdir}; train one, or give its --workdir")
    name, part = record["experiment"], record.get("part", "")
    if name not in names():
        raise UserError(f"{workdir} holds a run of {name}, which experiments/ has no file of")
    experiment = load_experiment(name)
    like = experiment.config
    if part:
        parts = experiment.config.parts(workdir.parent) if experiment.several else {}
        like = parts.get(part) or _like_of(parts.values(), record["config"])
        if like is None:
            raise UserError(f"{workdir} holds the part {part} of {name}, which has no such part")
    config = restore(like, record["config"], workdir)
    if isinstance(config, Config):
        config = bind(config, info_from(record))
    return Recorded(workdir, experiment, part, record, config)


def read_model(workdir: pathlib.Path, name: str | None = None) -> Recorded:
    """Return what is recorded of one model: of several runs, of the part that samples.

    Args:
      workdir: the directory.
      name: of the experiment that it must be of; None: of any.

    Raises:
      UserError: as `read`, it is of another experiment, or no part of several runs is the one that
        samples.
    """
    run = read(workdir)
    if name not in (None, run.experiment.name):
        raise UserError(f"{workdir} holds a run of {run.experiment.name}, not of {name}")
    if not run.experiment.several or run.part:
        return run
    if not run.experiment.samples:
        parts = sorted(path.parent for path in workdir.glob("*/config.json"))
        raise UserError(
            f"{run.experiment.name} trains several models; give the --workdir of one, such as "
            f"{parts[0] if parts else workdir}"
        )
    check_entries(workdir)
    return read(workdir / run.experiment.samples)


def _like_of(configs: Iterable[Config], values: dict[str, Any]) -> Config | None:
    """The config with the task of a recorded part that the default config does not have."""
    names = values["task"].keys() if isinstance(values.get("task"), dict) else set()
    return next((c for c in configs if to_record(c)["task"].keys() == names), None)


def info_from(record: dict[str, Any]) -> DataInfo:
    """Return what a task must know of a run's data set, from its record."""
    data = record["data"]
    shape: Any = tuple(data["shape"])
    classes, length = len(data.get("classes", ())), data.get("caption_length", 0)
    return DataInfo(data["name"], shape, data["levels"], classes, length)


def load_state(
    workdir: pathlib.Path,
    config: Config | None = None,
    parallel: str = "jit",
    whole: bool = False,
) -> tuple[Config, TrainState]:
    """Return the config and the newest state of a run's directory.

    Args:
      workdir: the directory.
      config: a bound config in the place of the recorded one.
      parallel: how the state is placed on the devices.
      whole: whether the state holds what training alone reads, most of a checkpoint; None stands
        in its place otherwise.

    Raises:
      UserError: there is no run, or no checkpoint yet.
    """
    config = config or read(workdir).config
    assert config is not None
    check_average(config)
    folder = workdir / "checkpoints"
    nothing = UserError(f"there is no checkpoint in {workdir} yet; train first")
    if not any(folder.glob("[0-9]*")):
        raise nothing
    with contextlib.closing(open_checkpoints(folder, read_only=True)) as checkpoints:
        shapes = state_shapes(build(config), config, config.task.info.shape)
        like = sharding.make(parallel).like(shapes)
        if not whole:
            like = without_training(like, config, ...)
        _, state, _ = checkpoints.restore_newest(like)
        if state is None:
            raise nothing
        return config, state if whole else without_training(state, config, None)


def check_average(config: Config) -> None:
    """Raises UserError unless there is the average that the config evaluates."""
    try:
        _ = config.ema.index
    except ValueError as error:
        raise UserError(f"--config.ema.{error}") from None
