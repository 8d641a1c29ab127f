"""Judges: classifiers trained once for a data set and kept, for every run that needs one."""

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

from ddpm_jax.config import expanded, replace
from ddpm_jax.data.cache import cache_dir
from ddpm_jax.data.types import DataInfo, Loaded, info_of
from ddpm_jax.errors import UserError, nearest, one_line
from ddpm_jax.experiment.inputs import config_for, load_for, record_of
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
from ddpm_jax.training.step import averaged

FLAG = "--config.task.evaluation.features"
KIND = "4"  # of what is kept: another where the same config makes another classifier
UNUSABLE = (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


def check_features(config: Config, loaded: Loaded) -> Config:
    """Check the networks in whose features samples are compared.

    Args:
      config: bound to its data, whose task names them.
      loaded: the data.

    Returns:
      The config with absolute paths; without classifiers where the data has no labels.

    Raises:
      UserError: there is no classifier of such images where the config says, no experiment of
        that name, or the file of FID's network is damaged.
    """
    features = []
    for name in config.task.needs().features:
        if name == "inception":
            if not from_main(lambda: os.path.exists(inception_file())):
                log_once(
                    f"no FID: put {INCEPTION}, of pytorch-fid's releases, into "
                    f"{inception_file().parent}"
                )
            else:
                _check_inception(inception_file(), _stamp(inception_file()))
            features.append(name)
        elif name in _classifiers():
            if loaded.data.classes:
                features.append(name)
            else:
                log_once("no labels, so no classifier: distances in its features are left out")
        elif os.sep in name or os.path.isdir(expanded(FLAG, name)):
            place = expanded(FLAG, name).absolute()
            check_classifier(f"{FLAG}={name}", place, config.task.info)
            features.append(str(place))
        else:
            raise UserError(
                f'{FLAG}: there is no feature network "{name}"'
                f"{nearest(name, [*_classifiers(), 'inception'])}"
            )
    return replace(config, {"task.evaluation.features": tuple(features)})


def _classifiers() -> list[str]:
    return [name for name in names() if name.startswith("classifier_")]


def check_classifier(flag: str, place: pathlib.Path, info: DataInfo) -> None:
    """Check that there is a trained classifier of images and classes as those of `info`.

    Raises:
      UserError: there is none, or it is of other images or classes.
    """
    theirs = read_named(
        flag,
        place,
        f"there is no finished run of a classifier in {place}; train one first, or give the name "
        f"of its experiment, such as {FLAG}=classifier_digits",
    )
    if theirs.run_config.task.provides != "classifier":
        raise UserError(f"{flag}: a run of {theirs.title}, which is not a classifier")
    known = theirs.run_config.task.info
    if known.shape != info.shape:
        raise UserError(
            f"{flag}: of images of shape {list(known.shape)}, not {list(info.shape)}; give a run "
            "on the same data"
        )
    if info.classes and known.classes != info.classes:
        raise UserError(
            f"{flag}: its network knows {known.classes} classes, and the data has {info.classes}; "
            "give a run on the same data"
        )
    if not any(place.glob("checkpoints/[0-9]*")):
        raise UserError(f"{flag}: there is no checkpoint in {place}")


@functools.lru_cache(maxsize=1)
def _check_inception(path: pathlib.Path, stamp: tuple[int, int]) -> None:
    """Raise UserError unless the file holds the network's weights; read once for each `stamp`."""
    try:
        from_torch(read_tensors(path))
    except UserError as error:
        raise UserError(
            f"{FLAG}=inception: {path} is damaged or another file: {error}; download it again, or "
            "leave inception out"
        ) from None


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{FLAG}=inception: {path} cannot be read: {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


def load_features(
    config: Config, loaded: Loaded, options: Options, train: TrainAlone
) -> tuple[Callable[[], FeatureNetwork], ...] | None:
    """Return what loads the networks of `task.evaluation.features`, trained now if need be.

    Args:
      config: as `check_features` returns it.
      loaded: the data.
      options: of the command line.
      train: trains a run on data; None: it was asked to stop.

    Returns:
      None if the training of a classifier was asked to stop.
    """
    loaders: list[Callable[[], FeatureNetwork]] = []
    for name in config.task.needs().features:
        if name == "inception":
            if from_main(lambda: os.path.exists(inception_file())):
                loaders.append(functools.cache(load_inception))
            continue
        place: pathlib.Path | None = pathlib.Path(name)
        if name in _classifiers():
            place = trained(load_experiment(name), loaded, options, train)
        if place is None:
            return None
        loaders.append(functools.cache(functools.partial(load_feature_network, str(place))))
    return tuple(loaders)


def trained(
    experiment: Experiment, loaded: Loaded, options: Options, train: TrainAlone
) -> pathlib.Path | None:
    """Return where a classifier of this data set is, trained now if it never was.

    It is kept by all that its run depends on: the config, the seed, and the data with the sizes of
    its splits, which `--debug` cuts; of a folder by its images and not by its path. What is there
    and cannot be used is removed and made again.

    Args:
      experiment: the classifier's.
      loaded: the data set.
      options: of the command line.
      train: trains a run on data.

    Returns:
      None if its training was asked to stop.
    """
    config = config_for(experiment, options.debug, {"data.name": loaded.data.name})
    loaded = loaded._replace(data=load_for(config.data, loaded, options))
    options = options._replace(seed=0, profile=False, wandb=False)
    config = bind(config, info_of(loaded.data))
    record = record_of(experiment.name, config, config.data, loaded, options)
    decisive = {key: record[key] for key in ("experiment", "config", "seed", "debug", "data")}
    if loaded.data.name.startswith("folder:") and loaded.data.fingerprint:
        dataset = {**record["config"]["data"], "name": "folder"}
        decisive |= {"config": {**record["config"], "data": dataset}}
        decisive |= {"data": {**record["data"], "name": "folder", "title": "folder"}}
    known = json.dumps([KIND, decisive], sort_keys=True)
    place = (
        feature_networks_dir()
        / f"{experiment.name}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    )
    unusable = _unusable(place, record)
    if unusable and from_main(lambda: _removed(place)):
        log(f"{unusable}: it is made again")
    if not from_main((place / "summary.json").exists):
        from_main(lambda: check_writable(place, f"{FLAG}={experiment.name}"))
        name = feature_network_name(loaded.data.name)
        log(f"training {name} once, to compare samples in its features")
        run = Run(experiment.name, config, place, loaded, options)
        if train(run, config.task.adapt(loaded.data)) is None:
            return None
    return place


def _unusable(place: pathlib.Path, record: Record) -> str:
    """Return why `place` holds neither the run of `record` nor its beginning; "" if it does."""

    def check() -> list[str]:
        earlier = read_record(place)
        kept = [name for name in ("checkpoints", "summary.json") if (place / name).exists()]
        if earlier is not None:
            check_same(place, earlier, record)
        elif kept:
            raise UserError(f"{place} holds no config.json")
        if "summary.json" in kept:
            json.loads((place / "summary.json").read_text())["metrics"]
        return kept

    try:
        kept = from_main(check)
        if "summary.json" in kept:
            load_feature_network(str(place))
        elif from_main(lambda: any(place.glob("checkpoints/[0-9]*"))):
            load_state(place, whole=True)
    except UNUSABLE as error:
        return f"{place} cannot be used ({one_line(error)})"
    return ""


def _removed(place: pathlib.Path) -> bool:
    """Return whether a run was removed: no process trains in it."""
    try:
        with (place / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place)
    except OSError:
        return False
    return True


def feature_networks_dir() -> pathlib.Path:
    """Return the folder of the classifiers that `trained` trains."""
    return cache_dir() / "feature_networks"


def inception_file() -> pathlib.Path:
    """Return where the user puts the weights of the network in whose features FID is computed."""
    return cache_dir() / INCEPTION


def inception(params: PyTree, x: Float[Array, "batch h w c"]) -> tuple[Array, Array]:
    """Return the logits and the features of Inception of images in [-1, 1], as 8 bits."""
    grey = jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5)
    features, logits = Inception().apply(params, grey)
    assert isinstance(features, jax.Array)
    assert isinstance(logits, jax.Array)
    return logits, features


def load_inception() -> FeatureNetwork:
    """Return the network "inception", of the weights in `inception_file()`; it sees 8-bit images.

    Raises:
      UserError: there are none, or not those.
    """
    params = from_torch(read_tensors(inception_file()))
    return feature_network("inception", inception, make().place(params), batch_size=50)._replace(
        about=INCEPTION
    )


def feature_network_name(data: str) -> str:
    """Return what a classifier is called after the data set `data` that it was trained on.

    `mnist` -> classifier_mnist, `digits:28` -> classifier_digits_28, `folder:/a/birds` ->
    classifier_folder_birds: distances in the features of different networks cannot be compared.
    """
    source, _, argument = data.partition(":")
    if source == "folder":
        argument = pathlib.Path(argument).name
    return "_".join(["classifier", *re.findall(r"\w+", f"{source} {argument}")])


def load_feature_network(place: str) -> FeatureNetwork:
    """Return the classifier in `place`, which `feature_network_name` names.

    Raises:
      UserError: there is none.
    """
    workdir = pathlib.Path(place)
    theirs = read_named(f"{FLAG}={place}", workdir, "there is no trained classifier")
    config, state = load_state(workdir, theirs.run_config)
    task = config.task
    assert isinstance(task, WithNetwork)
    data = theirs.record["data"]
    about = f"{theirs.title} on {data['title']}, step {int(state.step)}, {place}"
    network = feature_network(
        feature_network_name(data["name"]),
        ClassifierFeatures(task.network),
        averaged(state, config),
    )
    return network._replace(about=about)
