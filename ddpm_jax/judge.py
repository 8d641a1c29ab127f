"""Judges: classifiers trained once for a data set and kept, for every run that needs one."""

import dataclasses
import functools
import hashlib
import pathlib
import re
import types
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ddpm_jax.classifier import Judge, judge_of
from ddpm_jax.data.loader import cache_dir
from ddpm_jax.errors import UserError
from ddpm_jax.metrics.pth import read_tensors
from ddpm_jax.nn.inception import Inception, from_torch
from ddpm_jax.parallel import from_main
from ddpm_jax.progress import tell
from ddpm_jax.run import Loaded, Options, load_for, load_state, own_config, train_experiment
from ddpm_jax.rundir import read_record
from ddpm_jax.train import averaged

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


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
    if config.fid and not inception_file().exists():
        tell(f"no FID: put {INCEPTION}, of pytorch-fid's releases, into {inception_file().parent}")
    if config.judge == "none":
        return config
    if config.judge != "auto" and from_main((pathlib.Path(config.judge) / "summary.json").exists):
        return config
    if not loaded.data.classes:
        tell("no labels, so no classifier: no distances are told")
        return dataclasses.replace(config, judge="none")
    place = trained(experiment, loaded, options)
    return place and dataclasses.replace(config, judge=str(place))


def trained(experiment: types.ModuleType, loaded: Loaded, options: Options) -> pathlib.Path | None:
    """Where a classifier of this data set is, trained now if it never was; None: stopped."""
    config = own_config(experiment, options.debug, data=loaded.data.name)
    loaded = loaded._replace(data=load_for(config, loaded.data, options))
    name = experiment.__name__.rpartition(".")[2]
    known = f"{dataclasses.asdict(config)} {loaded.data.fingerprint}"
    place = cache_dir() / "judges" / f"{name}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    if not from_main((place / "summary.json").exists):
        tell(f"training {judge_name(loaded.data.name)} once, to judge drawn images with")
        if (
            train_experiment(
                experiment,
                config,
                place,
                options._replace(seed=0, profile=False, wandb=False),
                loaded,
            )
            is None
        ):
            return None
    return place


def judges_of(experiment: types.ModuleType, config: Any) -> tuple[Callable[[], Judge], ...]:
    """What loads the judges of a config: the classifier that `judge` names, Inception if `fid`."""
    judges: list[Callable[[], Judge]] = []
    if config.judge not in ("auto", "none"):
        judges.append(functools.partial(load_judge, experiment, config.judge))
    if config.fid and from_main(inception_file().exists):
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

    return judge_of("inception", network, params, batch_size=50)._replace(about=INCEPTION)


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
    if not (pathlib.Path(place) / "summary.json").exists():
        raise UserError(f"--config.judge={place}: there is no trained classifier")
    config, state = load_state(experiment, pathlib.Path(place))
    record = read_record(pathlib.Path(place)) or {}
    name = judge_name(record["data"]["name"])
    about = f"{record['experiment']} on {record['data']['title']}, step {int(state.step)}, {place}"
    judge = judge_of(name, experiment.network(config).apply, averaged(state, config))
    return judge._replace(about=about)
