"""Judges: classifiers trained once for a data set and kept, for every run that needs one."""

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import types
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ddpm_jax.config import expanded
from ddpm_jax.data.cache import cache_dir
from ddpm_jax.data.types import Loaded
from ddpm_jax.errors import UserError, one_line
from ddpm_jax.experiment.inputs import Options, from_data, load_for, own_config, record_of
from ddpm_jax.experiment.load import load_state
from ddpm_jax.experiment.preflight import read_run
from ddpm_jax.experiment.train import train_experiment
from ddpm_jax.metrics.features import Judge, judge_of
from ddpm_jax.metrics.pth import read_tensors
from ddpm_jax.nn.inception import Inception, from_torch
from ddpm_jax.parallel.processes import from_main
from ddpm_jax.parallel.sharding import make
from ddpm_jax.progress import tell, tell_once
from ddpm_jax.system.files import check_writable
from ddpm_jax.training.run_dir import check_same, read_record
from ddpm_jax.training.step import averaged

KIND = "2"  # of what is kept: another where the same config makes another classifier
UNUSABLE = (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


def check_judge(experiment: types.ModuleType, config: Any, loaded: Loaded) -> Any:
    """Check the classifier's run that `config.judge` names, and the file of FID's network.

    Args:
      experiment: the classifier's, such as `experiments.classifier_digits`.
      config: whose `judge` says "auto" (train one, unless it is there), "none" or where one is.

    Returns:
      `config`, with the absolute path of the run; "none" where the data has no labels.

    Raises:
      UserError: there is no classifier of such images where the config says, or the file of FID's
        network is damaged.
    """
    if config.fid and not from_main(lambda: os.path.exists(inception_file())):
        tell_once(
            f"no FID: put {INCEPTION}, of pytorch-fid's releases, into {inception_file().parent}"
        )
    elif config.fid:
        _check_inception(inception_file(), _stamp(inception_file()))
    if config.judge not in ("auto", "none"):
        flag = f"--config.judge={config.judge}"
        place = expanded("--config.judge", config.judge).absolute()
        if os.path.exists(place / "summary.json") or not _was_made_here(place):
            check_classifier(flag, place, config)
            return dataclasses.replace(config, judge=str(place))
    if config.judge != "none" and not loaded.data.classes:
        tell_once("no labels, so no classifier: no distances are told")
        return dataclasses.replace(config, judge="none")
    return config


def check_classifier(flag: str, place: pathlib.Path, like: Any) -> None:
    """Check that there is a trained classifier of images and classes as those of the config `like`.

    Raises:
      UserError: there is none, or it is of other images or classes.
    """
    if place.parent == judges_dir():  # made by `trained`, which makes it again if it is damaged
        return
    record = read_run(place)
    if record is None or not os.path.exists(place / "summary.json"):
        raise UserError(
            f"{flag}: there is no finished run of a classifier in {place}; train one first, or "
            "give --config.judge=auto or --config.judge=none"
        )
    name, theirs = record["experiment"], record["config"]
    if not name.startswith("classifier_"):
        raise UserError(f"{flag}: a run of {name}, which is not a classifier")
    if list(theirs.get("shape", like.shape)) != list(like.shape):
        raise UserError(
            f"{flag}: of images of shape {theirs['shape']}, not {list(like.shape)}; give a run on "
            "the same data"
        )
    classes = theirs.get("classes", like.classes)
    if like.classes and classes != like.classes:
        raise UserError(
            f"{flag}: its network knows {classes} classes, and the data has {like.classes}; give a "
            "run on the same data"
        )
    if not any(place.glob("checkpoints/[0-9]*")):
        raise UserError(f"{flag}: there is no checkpoint in {place}")


@functools.lru_cache(maxsize=1)
def _check_inception(path: pathlib.Path, stamp: tuple[int, int]) -> None:
    """Raises UserError unless the file holds the network's weights; read once for each `stamp`."""
    try:
        from_torch(read_tensors(path))
    except UserError as error:
        raise UserError(
            f"--config.fid: {path} is damaged or another file: {error}; download it again, or give "
            "--config.fid=false"
        ) from None


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"--config.fid: {path} cannot be read: {error.strerror}") from None
    return stat.st_size, stat.st_mtime_ns


def _was_made_here(place: pathlib.Path) -> bool:
    """Whether a path looks like one of `trained`, perhaps of another machine."""
    return place.parent.name == "judges" and bool(
        re.fullmatch(r"classifier_\w+-[0-9a-f]{12}", place.name)
    )


def with_judge(
    experiment: types.ModuleType, config: Any, loaded: Loaded, options: Options
) -> Any | None:
    """`config` with the directory of a trained classifier in its field `judge`.

    Args:
      experiment: the classifier's, such as `experiments.classifier_digits`.
      config: whose `judge` says "auto" (train one, unless it is there), "none" or where one is.

    Returns:
      None if the training of it was asked to stop.

    Raises:
      UserError: there is no classifier where the config says.
    """
    config = check_judge(experiment, config, loaded)
    if config.judge == "none":
        return config
    if config.judge != "auto" and _at_hand(experiment, pathlib.Path(config.judge)):
        return config
    place = trained(experiment, loaded, options)
    return place and dataclasses.replace(config, judge=str(place))


def _at_hand(experiment: types.ModuleType, place: pathlib.Path) -> bool:
    """Whether there is a trained classifier; one that `trained` made is read to see."""
    if not from_main(lambda: os.path.exists(place / "summary.json")):
        return False
    if place.parent != judges_dir():
        return True
    try:
        load_judge(experiment, str(place))
    except UNUSABLE:
        return False
    return True


def trained(experiment: types.ModuleType, loaded: Loaded, options: Options) -> pathlib.Path | None:
    """Where a classifier of this data set is, trained now if it never was; None: stopped.

    It is kept by all that its run depends on: the config, the seed, and the data with the sizes of
    its splits, which `--debug` cuts; of a folder by its images and not by its path.  What is there
    and cannot be used is removed and made again.
    """
    config = own_config(experiment, options.debug, data=loaded.data.name)
    loaded = loaded._replace(data=load_for(config, loaded, options))
    options = options._replace(seed=0, profile=False, wandb=False)
    name = experiment.__name__.rpartition(".")[2]
    record = record_of(name, from_data(config, loaded.data), loaded, options)
    decisive = {key: record[key] for key in ("experiment", "config", "seed", "debug", "data")}
    if loaded.data.name.startswith("folder:") and loaded.data.fingerprint:
        decisive |= {"config": {**record["config"], "data": "folder"}}
        decisive |= {"data": {**record["data"], "name": "folder", "title": "folder"}}
    known = json.dumps([KIND, decisive], sort_keys=True)
    place = judges_dir() / f"{name}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    unusable = _unusable(experiment, place, record)
    if unusable and from_main(lambda: _removed(place)):
        tell(f"{unusable}: it is made again")
    if not from_main((place / "summary.json").exists):
        from_main(lambda: check_writable(place, "--config.judge=auto"))
        tell(f"training {judge_name(loaded.data.name)} once, to judge drawn images with")
        if train_experiment(experiment, config, place, options, loaded) is None:
            return None
    return place


def _unusable(experiment: types.ModuleType, place: pathlib.Path, record: dict[str, Any]) -> str:
    """Why what is in `place` is neither the run of `record` nor the beginning of it; "": it is."""

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
            load_judge(experiment, str(place))
        elif from_main(lambda: any(place.glob("checkpoints/[0-9]*"))):
            load_state(experiment, place, whole=True)
    except UNUSABLE as error:
        return f"{place} cannot be used ({one_line(error)})"
    return ""


def _removed(place: pathlib.Path) -> bool:
    """Whether a run was removed: no process trains in it."""
    try:
        with (place / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(place)
    except OSError:
        return False
    return True


def judges_dir() -> pathlib.Path:
    """Where the judges are that `trained` makes."""
    return cache_dir() / "judges"


def judges_of(experiment: types.ModuleType, config: Any) -> tuple[Callable[[], Judge], ...]:
    """What loads the judges of a config: the classifier that `judge` names, Inception if `fid`."""
    judges: list[Callable[[], Judge]] = []
    if config.judge not in ("auto", "none"):
        judges.append(functools.partial(load_judge, experiment, config.judge))
    if config.fid and from_main(lambda: os.path.exists(inception_file())):
        judges.append(load_inception)
    return tuple(judges)


def inception_file() -> pathlib.Path:
    """Where the user puts the weights of the network in whose features FID is told."""
    return cache_dir() / INCEPTION


@functools.lru_cache(maxsize=1)
def load_inception() -> Judge:
    """The judge "inception", of the weights in `inception_file()`; it sees 8-bit images.

    Raises:
      UserError: there are none, or not those.
    """
    params = from_torch(read_tensors(inception_file()))

    def network(params, x):
        grey = jnp.round((jnp.clip(x, -1, 1) + 1) * 127.5)
        features, logits = Inception().apply(params, grey)
        return logits, features

    return judge_of("inception", network, make().place(params), batch_size=50)._replace(
        about=INCEPTION
    )


def judge_name(data: str) -> str:
    """What a classifier is called after the data set `data` that it was trained on.

    `mnist` -> classifier_mnist, `digits:28` -> classifier_digits_28, `folder:/a/birds` ->
    classifier_folder_birds: distances in the features of different networks cannot be compared.
    """
    source, _, argument = data.partition(":")
    if source == "folder":
        argument = pathlib.Path(argument).name
    return "_".join(["classifier", *re.findall(r"\w+", f"{source} {argument}")])


@functools.lru_cache(maxsize=4)
def load_judge(experiment: types.ModuleType, place: str) -> Judge:
    """The classifier in `place`, which `judge_name` names.

    Raises:
      UserError: there is none.
    """
    if not os.path.exists(pathlib.Path(place) / "summary.json"):
        raise UserError(f"--config.judge={place}: there is no trained classifier")
    config, state = load_state(experiment, pathlib.Path(place))
    record = read_record(pathlib.Path(place)) or {}
    name = judge_name(record["data"]["name"])
    about = f"{record['experiment']} on {record['data']['title']}, step {int(state.step)}, {place}"
    judge = judge_of(name, experiment.network(config).apply, averaged(state, config))
    return judge._replace(about=about)
