"""Read a run's directory: its record, its config and its newest checkpoint."""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

from ddpm_jax.config_records import restore, to_record
from ddpm_jax.data.types import DataInfo
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.preflight import read_run
from ddpm_jax.experiment.registry import load_experiment, names
from ddpm_jax.experiment.types import (
    AnyConfig,
    Config,
    Experiment,
    SeveralRuns,
    bind,
    checked_task,
    title_of,
)
from ddpm_jax.parallel import processes, sharding
from ddpm_jax.system.record import Record
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
    record: Record
    config: AnyConfig

    @property
    def title(self) -> str:
        """The experiment's name, and the part's."""
        return title_of(self.experiment.name, self.part)

    @property
    def run_config(self) -> Config:
        """The config, of a run of one model; `read_model` and `read_named` return no other."""
        assert isinstance(self.config, Config)
        return self.config


def read(workdir: pathlib.Path) -> Recorded:
    """Return what is recorded of the run in `workdir`.

    Raises:
      UserError: there is none, it is damaged, or of no known experiment.
    """
    record = read_run(workdir, complete=True)
    if record is None:
        raise UserError(f"there is no run in {workdir}; train one, or give its --workdir")
    return _restored(workdir, record)


def _restored(workdir: pathlib.Path, record: Record) -> Recorded:
    name, part = record["experiment"], record.get("part", "")
    if name not in names():
        raise UserError(f"{workdir} holds a run of {name}, which experiments/ has no file of")
    experiment: Experiment = load_experiment(name)
    like: AnyConfig | None = experiment.config
    if part:
        parts = like.parts(workdir.parent) if isinstance(like, SeveralRuns) else {}
        like = parts.get(part) or _like_of(parts.values(), record["config"])
        if like is None:
            raise UserError(f"{workdir} holds the part {part} of {name}, which has no such part")
    config = cast(AnyConfig, restore(like, record["config"], workdir))
    if isinstance(config, Config):
        config = bind(config, info_from(record))
    return Recorded(workdir, experiment, part, record, config)


def read_named(flag: str, place: pathlib.Path, missing: str, *, finished: bool = True) -> Recorded:
    """Return what is recorded of the run of one model that a flag names.

    Args:
      flag: the flag with its value, with which every error begins.
      place: the run's directory.
      missing: what is wrong, and what to do, where there is none.
      finished: whether it must be finished.

    Raises:
      UserError: as `read`, or it is of several models.
    """
    with flagged(flag):
        record = read_run(place, complete=True)
        if record is None or (finished and not os.path.exists(place / "summary.json")):
            raise UserError(missing)
        run = _restored(place, record)
        if not isinstance(run.config, Config):
            raise UserError(f"{run.title} trains several models; give the directory of one")
        return run


@contextlib.contextmanager
def flagged(flag: str) -> Iterator[None]:
    """Put the flag that names a run before what is wrong with it.

    Raises:
      UserError: the body raised one.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


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
    if isinstance(run.config, Config):
        return run
    if not run.experiment.samples:
        parts = sorted(path.parent for path in workdir.glob("*/config.json"))
        raise UserError(
            f"{run.experiment.name} trains several models; give the --workdir of one, such as "
            f"{parts[0] if parts else workdir}"
        )
    check_entries(workdir)
    return read_model(workdir / run.experiment.samples)


def _like_of(configs: Iterable[Config], values: Record) -> Config | None:
    """Return the config with the task of a recorded part that the default config does not have."""
    names = values["task"].keys() if isinstance(values.get("task"), dict) else set()
    return next((c for c in configs if to_record(c)["task"].keys() == names), None)


def info_from(record: Record) -> DataInfo:
    """Return what a task must know of a run's data set, from its record."""
    data = record["data"]
    height, width, channels = data["shape"]
    classes, length = len(data.get("classes", ())), data.get("caption_length", 0)
    shape = (height, width, channels)
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
    config = read(workdir).run_config if config is None else config
    check_average(config)
    folder = workdir / "checkpoints"
    nothing = UserError(f"there is no checkpoint in {workdir} yet; train first")
    if not any(folder.glob("[0-9]*")):
        raise nothing
    with contextlib.closing(open_checkpoints(folder, read_only=True)) as checkpoints:
        shapes = state_shapes(checked_task(config), config, config.task.info.shape)
        like = sharding.make(parallel).like(shapes)
        if not whole:
            like = without_training(like, config, ...)
        _, state, _ = checkpoints.restore_newest(like)
        if state is None:
            raise nothing
        return config, state if whole else without_training(state, config, None)


def check_average(config: Config) -> None:
    """Check that there is the average that the config evaluates.

    Raises:
      UserError: there is not.
    """
    try:
        _ = config.ema.index
    except ValueError as error:
        raise UserError(f"--config.ema.{error}") from None


def stamp_of(workdir: pathlib.Path) -> tuple[tuple[str, int], ...]:
    """Return what changes when a run is trained further: its checkpoints, and when they came.

    It is the first process's, in all of them; a checkpoint may be deleted meanwhile.
    """

    def stamps() -> list[tuple[str, int]]:
        entries = []
        for place in sorted((workdir / "checkpoints").glob("[0-9]*")):
            with contextlib.suppress(OSError):
                entries.append((place.name, place.lstat().st_mtime_ns))
        return entries

    return tuple((name, time) for name, time in processes.from_main(stamps))
