"""Feature networks of metrics: classifiers, trained once per data set and cached, and Inception."""

import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ddpm_jax.config import expand_path, replace
from ddpm_jax.data.cache import cache_dir
from ddpm_jax.data.types import DataInfo, Loaded, info_of
from ddpm_jax.errors import UserError, one_line, suggestion
from ddpm_jax.experiment.inputs import config_with, load_for, record_of
from ddpm_jax.experiment.recorded import load_state, read_named
from ddpm_jax.experiment.registry import load_experiment, names
from ddpm_jax.experiment.types import (
    Config,
    Experiment,
    Options,
    Run,
    TrainAlone,
    WithNetwork,
    bind,
)
from ddpm_jax.metrics.features import FeatureNetwork
from ddpm_jax.metrics.networks import ClassifierFeatures, feature_network
from ddpm_jax.metrics.pth import read_tensors
from ddpm_jax.nn.inception import Inception, from_torch
from ddpm_jax.parallel.processes import from_main
from ddpm_jax.parallel.sharding import make
from ddpm_jax.progress import log, log_once
from ddpm_jax.system.files import check_writable
from ddpm_jax.system.record import Record
from ddpm_jax.training.records import check_same, read_record
from ddpm_jax.training.step import evaluated_params

FLAG = "--config.task.evaluation.features"
# Version of cached classifiers: increase it if the same config now trains another classifier.
CACHE_VERSION = "4"
READ_ERRORS = (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


def check_features(config: Config, loaded: Loaded) -> Config:
    """Check the feature networks that a config names.

    Args:
      config: Config whose task is bound to its data set.
      loaded: Data set of the run.

    Returns:
      The config in which `task.evaluation.features` has absolute paths. If the data set has no
      labels, names of classifier experiments are removed, because they cannot be trained.

    Raises:
      UserError: If a directory does not hold a classifier of images with this shape and these
        classes, a name is unknown, or the file of Inception weights is damaged.
    """
    features = []
    for name in config.task.needs().features:
        if name == "inception":
            if not from_main(lambda: os.path.exists(inception_file())):
                log_once(
                    "FID is not computed, because the Inception weights are missing: "
                    f"download {INCEPTION} from the releases of pytorch-fid into "
                    f"{inception_file().parent}"
                )
            else:
                _check_inception(inception_file(), _stamp(inception_file()))
            features.append(name)
        elif name in _classifiers():
            if loaded.data.classes:
                features.append(name)
            else:
                log_once(
                    f"metrics in the features of {name} are left out: the data set has no labels "
                    "to train this classifier"
                )
        elif os.sep in name or os.path.isdir(expand_path(FLAG, name)):
            directory = expand_path(FLAG, name).absolute()
            check_classifier(f"{FLAG}={name}", directory, config.task.info)
            features.append(str(directory))
        else:
            raise UserError(
                f'{FLAG}: there is no feature network "{name}"'
                f"{suggestion(name, [*_classifiers(), 'inception'])}"
            )
    return replace(config, {"task.evaluation.features": tuple(features)})


def _classifiers() -> list[str]:
    return [name for name in names() if name.startswith("classifier_")]


def check_classifier(flag: str, directory: pathlib.Path, info: DataInfo) -> None:
    """Check that a directory holds a finished run of a classifier for a data set.

    Args:
      flag: Flag with its value, which begins every error message.
      directory: Run directory of the classifier.
      info: Shape and number of classes of the data set.

    Raises:
      UserError: If there is no such run or no checkpoint, or the classifier has another image shape
        or number of classes.
    """
    classifier = read_named(
        flag,
        directory,
        f"there is no finished run of a classifier in {directory}; train one first, or give the "
        f"name of its experiment, such as {FLAG}=classifier_digits",
    )
    if classifier.run_config.task.run_type != "classifier":
        raise UserError(
            f"{flag}: the directory holds a run of {classifier.title}, which is not a classifier; "
            "give the directory of a classifier's run"
        )
    trained_on = classifier.run_config.task.info
    if trained_on.shape != info.shape:
        raise UserError(
            f"{flag}: the run was trained on images of shape {list(trained_on.shape)}, not "
            f"{list(info.shape)}; give a run on the same data"
        )
    if info.classes and trained_on.classes != info.classes:
        raise UserError(
            f"{flag}: the run was trained on {trained_on.classes} classes, and the data set has "
            f"{info.classes}; give a run on the same data"
        )
    if not any(directory.glob("checkpoints/[0-9]*")):
        raise UserError(f"{flag}: there is no checkpoint in {directory}; train the run again")


@functools.lru_cache(maxsize=1)
def _check_inception(path: pathlib.Path, stamp: tuple[int, int]) -> None:
    """Raise UserError unless a file holds the Inception weights.

    The result is cached for each path and `stamp` (`_stamp`): an unchanged file is checked once.
    """
    try:
        from_torch(read_tensors(path))
    except UserError as error:
        raise UserError(
            f"{FLAG}=inception: {path} is damaged or another file ({error}); download it again, or "
            "leave inception out"
        ) from None


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    """Return the size in bytes and the modification time in nanoseconds of a file."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{FLAG}=inception: {path} cannot be read: {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


def load_features(
    config: Config, loaded: Loaded, options: Options, train: TrainAlone
) -> tuple[Callable[[], FeatureNetwork], ...] | None:
    """Return functions that load the feature networks; train classifiers that are not cached.

    Args:
      config: Config, as `check_features` returns it.
      loaded: Data set of the run.
      options: Options of the command line.
      train: Function that trains a run; it returns None if the user stopped the training.

    Returns:
      One function without arguments for each network, or None if the user stopped the training
      of a classifier.
    """
    loaders: list[Callable[[], FeatureNetwork]] = []
    for name in config.task.needs().features:
        if name == "inception":
            if from_main(lambda: os.path.exists(inception_file())):
                loaders.append(functools.cache(load_inception))
            continue
        directory: pathlib.Path | None = pathlib.Path(name)
        if name in _classifiers():
            directory = train_once(load_experiment(name), loaded, options, train)
        if directory is None:
            return None
        loaders.append(functools.cache(functools.partial(load_feature_network, str(directory))))
    return tuple(loaders)


def train_once(
    experiment: Experiment, loaded: Loaded, options: Options, train: TrainAlone
) -> pathlib.Path | None:
    """Return the cached run directory of a classifier; train the classifier if it is not cached.

    The directory's name is a hash of everything that the run depends on: the config, the seed, and
    the data set with the sizes of its splits. For `folder:PATH`, the hash depends on the images but
    not on PATH. A cached run that cannot be read is removed and trained again.

    Args:
      experiment: Experiment of the classifier.
      loaded: Data set that the classifier is trained on.
      options: Options of the command line.
      train: Function that trains a run; it returns None if the user stopped the training.

    Returns:
      The directory, or None if the user stopped the training.
    """
    config = config_with(experiment, options.debug, {"data.name": loaded.data.name})
    loaded = loaded._replace(data=load_for(config.data, loaded, options))
    options = options._replace(seed=0, profile=False, wandb=False)
    config = bind(config, info_of(loaded.data))
    record = record_of(experiment.name, config, config.data, loaded, options)
    identity = {key: record[key] for key in ("experiment", "config", "seed", "debug", "data")}
    if loaded.data.name.startswith("folder:") and loaded.data.fingerprint:
        dataset = {**record["config"]["data"], "name": "folder"}
        identity |= {"config": {**record["config"], "data": dataset}}
        identity |= {"data": {**record["data"], "name": "folder", "title": "folder"}}
    text = json.dumps([CACHE_VERSION, identity], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    directory = feature_networks_dir() / f"{experiment.name}-{digest}"
    problem = _why_unusable(directory, record)
    if problem and from_main(lambda: _remove_unless_locked(directory)):
        log(f"{problem}; the classifier is trained again")
    if not from_main((directory / "summary.json").exists):
        from_main(lambda: check_writable(directory, f"{FLAG}={experiment.name}"))
        name = feature_network_name(loaded.data.name)
        log(f"training {name} once, to compare samples in its features")
        run = Run(experiment.name, config, directory, loaded, options)
        if train(run, config.task.prepare_data(loaded.data)) is None:
            return None
    return directory


def _why_unusable(directory: pathlib.Path, record: Record) -> str:
    """Return why a directory cannot hold the run that `record` describes; return "" if it can.

    An empty directory can be used, and so can an interrupted run with the same record.
    """

    def check() -> list[str]:
        earlier = read_record(directory)
        present = [name for name in ("checkpoints", "summary.json") if (directory / name).exists()]
        if earlier is not None:
            check_same(directory, earlier, record)
        elif present:
            raise UserError(f"{directory} holds no config.json")
        if "summary.json" in present:
            json.loads((directory / "summary.json").read_text())["metrics"]
        return present

    try:
        present = from_main(check)
        if "summary.json" in present:
            load_feature_network(str(directory))
        elif from_main(lambda: any(directory.glob("checkpoints/[0-9]*"))):
            load_state(directory, for_training=True)
    except READ_ERRORS as error:
        return f"{directory} cannot be used ({one_line(error)})"
    return ""


def _remove_unless_locked(directory: pathlib.Path) -> bool:
    """Remove a run directory that no process has locked; return True if it was removed."""
    try:
        with (directory / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory)
    except OSError:
        return False
    return True


def feature_networks_dir() -> pathlib.Path:
    """Return the directory in which `train_once` caches classifiers."""
    return cache_dir() / "feature_networks"


def inception_file() -> pathlib.Path:
    """Return the path at which the user stores the Inception weights for FID."""
    return cache_dir() / INCEPTION


def inception(params: PyTree, x: Float[Array, "batch h w c"]) -> tuple[Array, Array]:
    """Return Inception's logits [batch, 1008] and features [batch, 2048] of images.

    Args:
      params: Parameters of Inception.
      x: Images in [-1, 1], which are rounded to 256 levels first.
    """
    pixels = jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5)
    features, logits = Inception().apply(params, pixels)
    assert isinstance(features, jax.Array)
    assert isinstance(logits, jax.Array)
    return logits, features


def load_inception() -> FeatureNetwork:
    """Return the feature network "inception" with the weights in `inception_file()`.

    Raises:
      UserError: If the file does not hold the Inception weights.
    """
    params = from_torch(read_tensors(inception_file()))
    return feature_network("inception", inception, make().place(params), batch_size=50)._replace(
        about=INCEPTION
    )


def feature_network_name(data: str) -> str:
    """Return the name of the classifier that is trained on the data set named `data`.

    Distances in the features of different networks cannot be compared, so the names differ:
    `mnist` -> classifier_mnist, `digits:28` -> classifier_digits_28,
    `folder:/a/birds` -> classifier_folder_birds.
    """
    source, _, argument = data.partition(":")
    if source == "folder":
        argument = pathlib.Path(argument).name
    return "_".join(["classifier", *re.findall(r"\w+", f"{source} {argument}")])


def load_feature_network(directory: str) -> FeatureNetwork:
    """Return the trained classifier in a run directory as a feature network.

    Raises:
      UserError: If there is no trained classifier in the directory.
    """
    workdir = pathlib.Path(directory)
    run = read_named(f"{FLAG}={directory}", workdir, "there is no trained classifier")
    config, state = load_state(workdir, run.run_config)
    task = config.task
    assert isinstance(task, WithNetwork)
    data = run.record["data"]
    about = f"{run.title} on {data['title']}, step {int(state.step)}, {directory}"
    network = feature_network(
        feature_network_name(data["name"]),
        ClassifierFeatures(task.network),
        evaluated_params(state, config),
    )
    return network._replace(about=about)
