"""The trained parts that a generation model is built on, found by their run directories."""

import pathlib

import flax.linen as nn
from jaxtyping import PyTree

from ddpm_jax.config import expanded, replace
from ddpm_jax.data.types import DataInfo
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.recorded import Recorded, load_state, read_named
from ddpm_jax.experiment.types import BuiltOnParts, Config, WithNetwork, with_parts
from ddpm_jax.task import Needs
from ddpm_jax.training.step import TrainState, averaged

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
    task, info, needs = config.task, config.task.info, config.task.needs()
    assert isinstance(task, BuiltOnParts)
    if task.parts_known:
        return config
    text = finished("task.text_encoder", needs.text_encoder, "text encoder", info)
    autoencoder = finished("task.autoencoder", needs.autoencoder, "autoencoder", info)
    places = {
        "task.text_encoder": str(text.workdir),
        "task.autoencoder": str(autoencoder.workdir),
    }
    return with_parts(replace(config, places), text.run_config, autoencoder.run_config)


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
    flag = f"{flag}={place}"
    advice = f"train one first: python launch.py --experiment={EXPERIMENTS[provides]}"
    theirs = read_named(flag, place, f"there is no finished run; {advice}")
    if theirs.run_config.task.provides != provides:
        raise UserError(f"{flag}: a run of {theirs.title}, not of a trained {provides}")
    known = theirs.run_config.task.info
    for name in ("shape", "levels", "caption_length"):
        if name == "caption_length" and provides == "autoencoder":
            continue
        if getattr(known, name) != getattr(info, name):
            raise UserError(
                f"{flag}: trained on data whose {name.replace('_', ' ')} is "
                f"{getattr(known, name)}, not {getattr(info, name)}; give a run on the same data"
            )
    return theirs


def load_part(place: str) -> tuple[Config, TrainState]:
    """Return the config and the newest state of a part."""
    return load_state(pathlib.Path(place))


def load_parts(needs: Needs) -> PyTree:
    """Return the parameters of a generation model's parts, as `Task.load_extra` takes them."""
    text, text_state = load_part(needs.text_encoder)
    autoencoder, state = load_part(needs.autoencoder)
    return {
        "text": averaged(text_state, text),
        "autoencoder": {"params": averaged(state, autoencoder), "extra": state.extra},
    }


def load_dual_encoder(place: str) -> tuple[nn.Module, PyTree]:
    """Return a text encoder's run that computes metrics: both towers and their parameters."""
    theirs, state = load_part(place)
    assert isinstance(theirs.task, WithNetwork)
    return theirs.task.network, averaged(state, theirs)
