"""The options of a run and its data."""

import logging
import os
import pathlib
from collections.abc import Mapping

import jax

from ddpm_jax.config import get, override, replace
from ddpm_jax.config_records import to_record
from ddpm_jax.data.cache import cache_dir
from ddpm_jax.data.loader import check_recorded_dir, is_of_tfds, load
from ddpm_jax.data.types import Data, Loaded
from ddpm_jax.errors import MissingData, UserError, printable
from ddpm_jax.experiment.types import AnyConfig, Config, Dataset, Experiment, Options
from ddpm_jax.parallel import cluster as cluster_module
from ddpm_jax.parallel import hardware, processes, xla_flags
from ddpm_jax.system.files import is_writable
from ddpm_jax.system.record import Record
from ddpm_jax.training.records import FORMAT, provenance, read_record

DEBUG_IMAGES = 128  # test images that a --debug run looks at


def set_up_jax(
    debug: bool = False,
    cluster: tuple[str | None, int | None, int | None] | None = None,
    deterministic: bool = False,
) -> None:
    """Set fast convolutions on a CPU, keep compiled programs, and join the other processes.

    Args:
      debug: compile in half the time programs that are slower, for runs of a few steps.
      cluster: the coordinator's HOST:PORT, how many processes there are, and which this is; None
        in it is asked of the cluster.
      deterministic: the same bits at each run on a GPU, which costs speed.
    """
    xla_flags.check_flags(os.environ.get("XLA_FLAGS", ""))
    xla_flags.tune_cpu(debug)
    if deterministic:
        xla_flags.tune_gpu()
    if cluster is not None:
        cluster_module.initialize(*cluster)
    hardware.check_platform()
    jax.config.update("jax_disable_most_optimizations", debug)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # this project reports what a user needs
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the user's own choice
        kept = is_writable(cache_dir() / "xla")
        place = str(cache_dir() / "xla") if kept else None
        jax.config.update("jax_compilation_cache_dir", place)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def load_data(
    experiment: Experiment, dataset: Dataset, workdir: pathlib.Path, options: Options
) -> Loaded:
    """Load the data set that a config names, or the experiment's fallback in its place.

    A run that is there already goes on with the data it has, whatever is at hand today.

    Args:
      experiment: which may name a fallback.
      dataset: the section `data` of the config.
      workdir: the directory of the run.
      options: of the command line.

    Raises:
      UserError: it cannot be had, and there is no fallback or `--strict_data`.
    """
    name, earlier = dataset.name, read_record(workdir)
    if earlier is not None and earlier.get("data_asked_for") == name:
        again = load_again(earlier, options, dataset.validation)
        recorded = earlier.get("data_dir")
        where = options.data_dir or (recorded if isinstance(recorded, str) else None)
        loaded = Loaded(again, earlier.get("data_note", ""), where)
    else:
        try:
            data = _load(name, options.data_dir, options.debug, dataset.validation)
            loaded = Loaded(data, data_dir=options.data_dir)
        except MissingData as error:
            fallback, default = experiment.fallback, get(experiment.config, "data.name")
            if fallback is None or options.strict_data or name != default:
                raise
            data = _load(fallback, options.data_dir, options.debug, dataset.validation)
            loaded = Loaded(
                data,
                f"NOT {name}, which is not at hand, but {data.title}: the figures are of these. "
                f"({error})",
                options.data_dir,
            )
    processes.check_same_everywhere("the data set", loaded.data.fingerprint)
    return loaded


def load_again(
    record: Record, options: Options, validation: int | None, moved: str | None = None
) -> Data:
    """Load the data of an earlier run.

    A record may be a stranger's.  Its `data_dir` is read only for data sets that TFDS itself knows,
    and nothing is prepared there.

    Args:
      record: what config.json says of the run.
      options: whose `data_dir` goes before the recorded one.
      validation: as `load` takes it.
      moved: the name of the data today; None: as it was.

    Raises:
      UserError: they are not where they were, or the record does not say where.
    """
    name, where = moved or record["data"].get("name"), options.data_dir
    if not isinstance(name, str):
        raise UserError("config.json names no data set; it is damaged, or of another version")
    recorded = record.get("data_dir")
    if is_of_tfds(name) and not where and recorded is not None:
        check_recorded_dir(name, recorded)
        return _load(name, recorded, bool(record.get("debug")), validation, may_prepare=False)
    source, _, argument = name.partition(":")
    if source == "folder" and not moved and not os.path.isdir(os.path.expanduser(argument)):
        raise UserError(
            f"the folder {printable(argument)}, where the data of this run were, is not there; "
            "give its new place as --config.data=folder:PATH"
        )
    return _load(name, where, bool(record.get("debug")), validation)


def _load(
    name: str,
    data_dir: str | None,
    debug: bool,
    validation: int | None,
    may_prepare: bool = True,
) -> Data:
    data = load(name, data_dir, validation, may_prepare)
    if not debug:
        return data
    if data.validation is not None:
        data = data._replace(validation=data.validation.first(DEBUG_IMAGES))
    return data._replace(test=data.test.first(DEBUG_IMAGES))


def load_for(dataset: Dataset, like: Loaded, options: Options) -> Data:
    """Return the same data set as `like`, with the validation split of another config."""
    return _load(like.data.name, like.data_dir, options.debug, dataset.validation)


def config_for(experiment: Experiment, debug: bool, values: Mapping[str, object]) -> Config:
    """Return an experiment's config for one that trains it in passing; tiny to debug.

    Args:
      experiment: of one run.
      debug: whether to take its debug values.
      values: fields by their paths.
    """
    config = override(experiment.config, {}, experiment.debug if debug else {})
    assert isinstance(config, Config)
    return replace(config, values)


def record_of(
    name: str, config: AnyConfig, dataset: Dataset, loaded: Loaded, options: Options, part: str = ""
) -> Record:
    """Return what config.json says of a run.

    Args:
      name: the experiment's.
      config: of the run, or of several runs.
      dataset: that was asked for.
      loaded: the data.
      options: of the command line.
      part: of an experiment of several runs.
    """
    return {
        "format": FORMAT,
        "experiment": name,
        **({"part": part} if part else {}),
        "config": to_record(config),
        "seed": options.seed,
        "debug": options.debug,
        "data": loaded.data.describe(),
        "data_asked_for": dataset.name,
        "data_note": loaded.note,
        "data_dir": loaded.data_dir and os.path.abspath(os.path.expanduser(loaded.data_dir)),
        "parallel": options.parallel,
        "devices": hardware.describe(),
        **provenance(),
    }
