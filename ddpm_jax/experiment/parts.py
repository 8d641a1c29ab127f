"""Check and load the trained text encoder and autoencoder that a generation model is built on."""

import pathlib

import flax.linen as nn
from jaxtyping import PyTree

from ddpm_jax.config import expand_path, replace
from ddpm_jax.data.types import DataInfo
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.recorded import Recorded, load_state, read_named
from ddpm_jax.experiment.types import BuiltOnParts, Config, WithNetwork, with_parts
from ddpm_jax.task import Needs
from ddpm_jax.training.step import evaluated_params

# Experiments that train the parts, named in error messages.
EXPERIMENTS = {"text encoder": "text_encoder_shapes", "autoencoder": "autoencoder_shapes"}


def check_dual_encoder(config: Config, path: str) -> Config:
    """Check the text encoder that computes metrics; return the config with its absolute path.

    Args:
      config: Config, bound to its data set.
      path: Path of the config field that names the text encoder's run.

    Raises:
      UserError: If `read_finished_part` raises it.
    """
    directory = config.task.needs().dual_encoder
    run = read_finished_part(path, directory, "text encoder", config.task.info)
    return replace(config, {path: str(run.workdir)})


def check_parts_of(config: Config) -> Config:
    """Check a generation model's parts; return its config with the fields that follow from them.

    The config of a trained run has these fields already and is returned unchanged.

    Raises:
      UserError: If `read_finished_part` raises it.
    """
    task, info, needs = config.task, config.task.info, config.task.needs()
    assert isinstance(task, BuiltOnParts)
    if task.parts_bound:
        return config
    text = read_finished_part("task.text_encoder", needs.text_encoder, "text encoder", info)
    autoencoder = read_finished_part("task.autoencoder", needs.autoencoder, "autoencoder", info)
    directories = {
        "task.text_encoder": str(text.workdir),
        "task.autoencoder": str(autoencoder.workdir),
    }
    return with_parts(replace(config, directories), text.run_config, autoencoder.run_config)


def read_finished_part(path: str, directory: str, run_type: str, info: DataInfo) -> Recorded:
    """Return the recorded run of a finished part that a config field names.

    Args:
      path: Path of the config field.
      directory: Value of the field.
      run_type: Required kind of network: "text encoder" or "autoencoder".
      info: Data set of the config.

    Raises:
      UserError: If there is no such run, it is not finished, it is another kind of network, or
        its images or captions have another size.
    """
    flag = f"--config.{path}"
    workdir = expand_path(flag, directory).absolute()
    flag = f"{flag}={workdir}"
    advice = f"train one first: python launch.py --experiment={EXPERIMENTS[run_type]}"
    run = read_named(flag, workdir, f"there is no finished run; {advice}")
    if run.run_config.task.run_type != run_type:
        raise UserError(f"{flag}: holds a run of {run.title}, not of a trained {run_type}")
    trained_on = run.run_config.task.info
    for name in ("shape", "levels", "caption_length"):
        if name == "caption_length" and run_type == "autoencoder":
            continue
        if getattr(trained_on, name) != getattr(info, name):
            raise UserError(
                f"{flag}: was trained on data whose {name.replace('_', ' ')} is "
                f"{getattr(trained_on, name)}, not {getattr(info, name)}; give a run on the same "
                "data"
            )
    return run


def load_parts(needs: Needs) -> PyTree:
    """Return the variables of a generation model's parts, as `Task.load_extra` takes them."""
    text, text_state = load_state(pathlib.Path(needs.text_encoder))
    autoencoder, state = load_state(pathlib.Path(needs.autoencoder))
    return {
        "text": evaluated_params(text_state, text),
        "autoencoder": {"params": evaluated_params(state, autoencoder), "extra": state.extra},
    }


def load_dual_encoder(directory: str) -> tuple[nn.Module, PyTree]:
    """Return the dual encoder (text and image tower) of a run, and its averaged parameters."""
    config, state = load_state(pathlib.Path(directory))
    assert isinstance(config.task, WithNetwork)
    return config.task.network, evaluated_params(state, config)
