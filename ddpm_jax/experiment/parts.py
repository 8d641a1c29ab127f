"""The trained parts that a generation model is built on, found by their run directories."""

import functools
import os
import pathlib
from typing import Any

from ddpm_jax.config import expanded, replace
from ddpm_jax.data.types import DataInfo
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.preflight import read_run
from ddpm_jax.experiment.recorded import Recorded, load_state, read
from ddpm_jax.experiment.types import Config, with_parts
from ddpm_jax.training.step import averaged

EXPERIMENTS = {"text encoder": "text_encoder_shapes", "autoencoder": "autoencoder_shapes"}


def check_dual_encoder(config: Config, path: str) -> Config:
    """Return a config with the absolute path of the text encoder that computes metrics, checked.

    Args:
      config: bound to its data.
      path: of its field that names the run.

    Raises:
      UserError: as `finished`.
    """
    theirs = finished(path, config.task.needs().dual_encoder, "text encoder", config.task.info)
    return replace(config, {path: str(theirs.workdir)})


def check_parts_of(config: Config) -> Config:
    """Return a generation model's config with what follows from its parts.

    A trained run's config has that already.

    Raises:
      UserError: as `finished`.
    """
    task = config.task
    if task.parts_known:
        return config
    text = finished("task.text_encoder", task.text_encoder, "text encoder", task.info)
    autoencoder = finished("task.autoencoder", task.autoencoder, "autoencoder", task.info)
    places = {
        "task.text_encoder": str(text.workdir),
        "task.autoencoder": str(autoencoder.workdir),
    }
    return with_parts(replace(config, places), text.config, autoencoder.config)


def finished(path: str, directory: str, provides: str, info: DataInfo) -> Recorded:
    """Return the finished run that a config names.

    Args:
      path: of the config's field.
      directory: its value.
      provides: what the run must be: a text encoder or an autoencoder.
      info: the data set of the config.

    Raises:
      UserError: there is no such run, it is another task's or not finished, or its images or
        captions are of another size.
    """
    flag = f"--config.{path}"
    place = expanded(flag, directory).absolute()
    if read_run(place) is None or not os.path.exists(place / "summary.json"):
        raise UserError(
            f"{flag}={place}: there is no finished run; train one first: python launch.py "
            f"--experiment={EXPERIMENTS[provides]}"
        )
    theirs = read(place)
    if not isinstance(theirs.config, Config) or theirs.config.task.provides != provides:
        raise UserError(f"{flag}={place}: a run of {theirs.title}, not of a trained {provides}")
    known = theirs.config.task.info
    for name in ("shape", "levels", "caption_length"):
        if name == "caption_length" and provides == "autoencoder":
            continue
        if getattr(known, name) != getattr(info, name):
            raise UserError(
                f"{flag}={place}: trained on data whose {name.replace('_', ' ')} is "
                f"{getattr(known, name)}, not {getattr(info, name)}; give a run on the same data"
            )
    return theirs._replace(workdir=place)


@functools.lru_cache(maxsize=4)
def load_part(place: str) -> tuple[Config, Any]:
    """Return the config and the newest state of a part."""
    return load_state(pathlib.Path(place))


def load_parts(task: Any) -> Any:
    """Return the parameters of a generation model's parts, as `Parts.load` does."""
    text, state = load_part(task.text_encoder)
    autoencoder, other = load_part(task.autoencoder)
    return {
        "text": averaged(state, text),
        "autoencoder": {"params": averaged(other, autoencoder), "fixed": other.fixed},
    }


def load_dual_encoder(place: str) -> tuple[Any, Any]:
    """Return a text encoder's run that computes metrics: both towers and their parameters."""
    theirs, state = load_part(place)
    return theirs.task.network, averaged(state, theirs)
