"""Read a run directory: the record (config.json), the config and the newest checkpoint."""

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
from ddpm_jax.training.step import TrainState, inference_state, state_shapes


class Recorded(NamedTuple):
    """A run as its directory records it, without its checkpoints.

    Attributes:
      workdir: Directory of the run.
      experiment: Experiment of the run.
      part: Name of the run within an experiment of several runs; "" for any other run.
      record: Content of config.json.
      config: Config of one run, whose task is bound to its data set, or of several runs.
    """

    workdir: pathlib.Path
    experiment: Experiment
    part: str
    record: Record
    config: AnyConfig

    @property
    def title(self) -> str:
        """The title of the run: EXPERIMENT, or EXPERIMENT/PART for one of several runs."""
        return title_of(self.experiment.name, self.part)

    @property
    def run_config(self) -> Config:
        """The config of a single run; `read_model` and `read_named` return only such runs."""
        assert isinstance(self.config, Config)
        return self.config


def read(workdir: pathlib.Path) -> Recorded:
    """Return the recorded run in a directory.

    Raises:
      UserError: If the directory holds no run, config.json is damaged, or the experiment is
        unknown.
    """
    record = read_run(workdir, complete=True)
    if record is None:
        raise UserError(f"there is no run in {workdir}; train one, or give another --workdir")
    return _restore_run(workdir, record)


def _restore_run(workdir: pathlib.Path, record: Record) -> Recorded:
    """Return the run that a checked record describes; build its config from the record."""
    name, part = record["experiment"], record.get("part", "")
    if name not in names():
        raise UserError(
            f"{workdir} holds a run of {name}, but there is no file experiments/{name}.py; add it, "
            "or give another run"
        )
    experiment: Experiment = load_experiment(name)
    like: AnyConfig | None = experiment.config
    if part:
        parts = like.parts(workdir.parent) if isinstance(like, SeveralRuns) else {}
        like = parts.get(part) or _like_of(parts.values(), record["config"])
        if like is None:
            raise UserError(
                f"{workdir} holds the part {part} of {name}, which has no such part; give another "
                "run, or remove that directory"
            )
    config = cast(AnyConfig, restore(like, record["config"], workdir))
    if isinstance(config, Config):
        config = bind(config, info_from(record))
    return Recorded(workdir, experiment, part, record, config)


def read_named(
    flag: str, workdir: pathlib.Path, missing: str, *, finished: bool = True
) -> Recorded:
    """Return the run of a single model in a directory that a flag names.

    Args:
      flag: Flag with its value, which begins every error message.
      workdir: Directory of the run.
      missing: Error message if the directory holds no run, or no finished run although
        `finished` is true.
      finished: If true, the run must be finished: summary.json exists.

    Raises:
      UserError: If `read` raises it, the run is not finished, or it trains several models.
    """
    with flagged(flag):
        record = read_run(workdir, complete=True)
        if record is None or (finished and not os.path.exists(workdir / "summary.json")):
            raise UserError(missing)
        run = _restore_run(workdir, record)
        if not isinstance(run.config, Config):
            raise UserError(f"{run.title} trains several models; give the directory of one model")
        return run


@contextlib.contextmanager
def flagged(flag: str) -> Iterator[None]:
    """Insert `flag`, which names a run, at the start of the message of a UserError of the body.

    Raises:
      UserError: If the body raises a UserError.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


def read_model(workdir: pathlib.Path, name: str | None = None) -> Recorded:
    """Return the run of a single model in a directory.

    If the directory holds an experiment of several runs, return the run that `Experiment.samples`
    names.

    Args:
      workdir: Directory of the run or of the experiment.
      name: Name that the experiment must have; if None, every experiment is accepted.

    Raises:
      UserError: If `read` raises it, the experiment has another name, or it trains several models
        and `Experiment.samples` names none of them.
    """
    run = read(workdir)
    if name not in (None, run.experiment.name):
        raise UserError(
            f"{workdir} holds a run of {run.experiment.name}, not of {name}; give another --workdir"
        )
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
    """Return the first config whose task has the same fields as the recorded values, or None.

    This config is used for a run of a sweep whose value is not in the default config.
    """
    names = values["task"].keys() if isinstance(values.get("task"), dict) else set()
    return next((c for c in configs if to_record(c)["task"].keys() == names), None)


def info_from(record: Record) -> DataInfo:
    """Return the properties of a run's data set (image shape, classes, ...) from its record."""
    data = record["data"]
    height, width, channels = data["shape"]
    classes, length = len(data.get("classes", ())), data.get("caption_length", 0)
    shape = (height, width, channels)
    return DataInfo(data["name"], shape, data["levels"], classes, length)


def load_state(
    workdir: pathlib.Path,
    config: Config | None = None,
    parallel: str = "jit",
    for_training: bool = False,
) -> tuple[Config, TrainState]:
    """Return the config of a run and the training state in its newest checkpoint.

    Args:
      workdir: Directory of the run.
      config: Config whose task is bound to its data set; if None, the recorded config is used.
      parallel: How the state is partitioned across devices, a value of the flag `--parallel`.
      for_training: If true, restore the whole state. If false, arrays that only training reads are
        not restored and are None in the result; they are most of a checkpoint.

    Raises:
      UserError: If the directory holds no run, or the run has no checkpoint yet.
    """
    config = read(workdir).run_config if config is None else config
    check_average(config)
    folder = workdir / "checkpoints"
    no_checkpoint = UserError(f"there is no checkpoint in {workdir} yet; train first")
    if not any(folder.glob("[0-9]*")):
        raise no_checkpoint
    with contextlib.closing(open_checkpoints(folder, read_only=True)) as checkpoints:
        shapes = state_shapes(checked_task(config), config, config.task.info.shape)
        like = sharding.make(parallel).abstract_state(shapes)
        if not for_training:
            like = inference_state(like, config, ...)
        _, state, _ = checkpoints.restore_newest(like)
        if state is None:
            raise no_checkpoint
        return config, state if for_training else inference_state(state, config, None)


def check_average(config: Config) -> None:
    """Check that `ema.evaluated` names an average that the config computes.

    Raises:
      UserError: If the config does not compute this average.
    """
    try:
        _ = config.ema.index
    except ValueError as error:
        raise UserError(f"--config.ema.{error}") from None


def stamp_of(workdir: pathlib.Path) -> tuple[tuple[str, int], ...]:
    """Return a pair (name, modification time in nanoseconds) for every checkpoint of a run.

    The value changes when the run is trained further. Every process returns the value of process 0.
    """

    def stamps() -> list[tuple[str, int]]:
        entries = []
        for path in sorted((workdir / "checkpoints").glob("[0-9]*")):
            with contextlib.suppress(OSError):  # a running training may delete a checkpoint
                entries.append((path.name, path.lstat().st_mtime_ns))
        return entries

    return tuple((name, time) for name, time in processes.from_main(stamps))
