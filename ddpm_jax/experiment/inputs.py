"""Set up jax, load the data set of a run, and build the run's record (config.json)."""

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

DEBUG_IMAGES = 128  # test and validation images of a --debug run


def set_up_jax(
    debug: bool = False,
    cluster: tuple[str | None, int | None, int | None] | None = None,
    deterministic: bool = False,
) -> None:
    """Set XLA flags, connect to the other processes, and enable jax's compilation cache.

    Args:
      debug: Disable most compiler optimisations: compilation takes half the time and programs run
        slower, which suits runs of a few steps.
      cluster: The coordinator's HOST:PORT, the number of processes, and the index of this process.
        jax detects the values that are None from the cluster's environment. If `cluster` is None,
        there is one process.
      deterministic: Use deterministic GPU kernels, which are slower.
    """
    xla_flags.check_flags(os.environ.get("XLA_FLAGS", ""))
    xla_flags.tune_cpu(debug)
    if deterministic:
        xla_flags.tune_gpu()
    if cluster is not None:
        cluster_module.initialize(*cluster)
    hardware.check_platform()
    jax.config.update("jax_disable_most_optimizations", debug)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # errors are reported by this project
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = str(cache_dir() / "xla") if is_writable(cache_dir() / "xla") else None
        jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def load_data(
    experiment: Experiment, dataset: Dataset, workdir: pathlib.Path, options: Options
) -> Loaded:
    """Load the data set that a config names; if it is missing, load the experiment's fallback.

    A resumed run that used the fallback uses it again, even if the data set is now available.

    Args:
      experiment: Experiment, whose field `fallback` may name another data set.
      dataset: Section `data` of the config.
      workdir: Directory of the run.
      options: Options of the command line.

    Raises:
      UserError: If the data set is not available, and the experiment has no fallback or
        `--strict_data` is given.
    """
    name, earlier = dataset.name, read_record(workdir)
    if earlier is not None and earlier.get("data_requested") == name:
        data = load_again(earlier, options, dataset.validation)
        recorded_dir = earlier.get("data_dir")
        if not isinstance(recorded_dir, str):
            recorded_dir = None
        loaded = Loaded(data, earlier.get("data_note", ""), options.data_dir or recorded_dir)
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
                f"WARNING: {name} is not available; this run uses {data.title} instead, and all "
                f"metrics refer to it. ({error})",
                options.data_dir,
            )
    processes.check_same_everywhere("the data set", loaded.data.fingerprint)
    return loaded


def load_again(
    record: Record, options: Options, validation: int | None, moved: str | None = None
) -> Data:
    """Load the data set of an earlier run.

    A record may come from an untrusted source. Therefore the `data_dir` of the record is used only
    for data sets of the TFDS catalogue, and no data set is prepared there.

    Args:
      record: Content of the run's config.json.
      options: Options of the command line; their `data_dir` replaces that of the record.
      validation: Number of images held out for validation (`types.Dataset.validation`).
      moved: New name of a data set that was moved; if None, the name in the record is used.

    Raises:
      UserError: If the data set is not available, or the record does not name a data set.
    """
    name, data_dir = moved or record["data"].get("name"), options.data_dir
    if not isinstance(name, str):
        raise UserError(
            "config.json does not name a data set, because it is damaged or of another version; "
            "give another run"
        )
    recorded_dir = record.get("data_dir")
    if is_of_tfds(name) and not data_dir and recorded_dir is not None:
        check_recorded_dir(name, recorded_dir)
        return _load(name, recorded_dir, bool(record.get("debug")), validation, may_prepare=False)
    source, _, argument = name.partition(":")
    if source == "folder" and not moved and not os.path.isdir(os.path.expanduser(argument)):
        raise UserError(
            f"there is no folder {printable(argument)}, which held the data set of this run; if "
            "it was moved, give its new path as --config.data=folder:PATH"
        )
    return _load(name, data_dir, bool(record.get("debug")), validation)


def _load(
    name: str,
    data_dir: str | None,
    debug: bool,
    validation: int | None,
    may_prepare: bool = True,
) -> Data:
    """Load a data set; for --debug, keep only the first images of the other splits."""
    data = load(name, data_dir, validation, may_prepare)
    if not debug:
        return data
    if data.validation is not None:
        data = data._replace(validation=data.validation.first(DEBUG_IMAGES))
    return data._replace(test=data.test.first(DEBUG_IMAGES))


def load_for(dataset: Dataset, like: Loaded, options: Options) -> Data:
    """Load the data set of `like` again, with as many validation images as `dataset` sets."""
    return _load(like.data.name, like.data_dir, options.debug, dataset.validation)


def config_with(experiment: Experiment, debug: bool, values: Mapping[str, object]) -> Config:
    """Return the config of an experiment with some fields replaced.

    Args:
      experiment: Experiment that trains a single run.
      debug: If true, set the experiment's values for --debug first.
      values: Values of fields by their paths, which are set last.
    """
    config = override(experiment.config, {}, experiment.debug if debug else {})
    assert isinstance(config, Config)
    return replace(config, values)


def record_of(
    name: str, config: AnyConfig, dataset: Dataset, loaded: Loaded, options: Options, part: str = ""
) -> Record:
    """Return the content of config.json for a run.

    Args:
      name: Name of the experiment.
      config: Config of the run, or of an experiment of several runs.
      dataset: Section `data` of the config; a fallback may have replaced the data set it names.
      loaded: Loaded data set.
      options: Options of the command line.
      part: Name of the run within an experiment of several runs; "" for any other run.
    """
    return {
        "format": FORMAT,
        "experiment": name,
        **({"part": part} if part else {}),
        "config": to_record(config),
        "seed": options.seed,
        "debug": options.debug,
        "data": loaded.data.describe(),
        "data_requested": dataset.name,
        "data_note": loaded.note,
        "data_dir": loaded.data_dir and os.path.abspath(os.path.expanduser(loaded.data_dir)),
        "parallel": options.parallel,
        "devices": hardware.describe(),
        **provenance(),
    }
