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

# Experiments that train a text encoder or an autoencoder, for error messages.
EXPERIMENTS = {"text encoder": "text_encoder_shapes", "autoencoder": "autoencoder_shapes"}


def check_dual_encoder(config: Config, path: str) -> Config:
    """Check the run of the text encoder that metrics use; return the config with its full path.

    Args:
      config: Config whose task is bound to its data set.
      path: Path of the config field that names the directory of the text encoder's run.

    Raises:
      UserError: If the directory holds no finished text encoder of such images and captions.
    """
    directory = config.task.needs().dual_encoder
    run = read_finished_part(path, directory, "text encoder", config.task.info)
    return replace(config, {path: str(run.workdir)})


def check_parts_of(config: Config) -> Config:
    """Check the runs of a generation model's text encoder and autoencoder; complete its config.

    The returned config has the absolute paths of both runs and the fields that follow from their
    networks. The config of a trained generation model has them already and does not change.

    Raises:
      UserError: If a directory holds no finished run of the required type on such data.
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
    """Return the finished run of a text encoder or an autoencoder that a config field names.

    Args:
      path: Path of the config field, such as task.autoencoder.
      directory: Value of the field: the directory of the run.
      run_type: Required type of the run: "text encoder" or "autoencoder".
      info: Properties of the data set of the config.

    Raises:
      UserError: If the run does not exist, is not finished or has another type, or its images or
        captions have another size.
    """
    flag = f"--config.{path}"
    workdir = expand_path(flag, directory).absolute()
    flag = f"{flag}={workdir}"
    advice = f"train one first: python launch.py --experiment={EXPERIMENTS[run_type]}"
    run = read_named(flag, workdir, f"there is no finished run; {advice}")
    if run.run_config.task.run_type != run_type:
        raise UserError(
            f"{flag}: the directory holds a run of {run.title}, not of a {run_type}; {advice}"
        )
    trained_on = run.run_config.task.info
    for name in ("shape", "levels", "caption_length"):
        if name == "caption_length" and run_type == "autoencoder":
            continue
        if getattr(trained_on, name) != getattr(info, name):
            raise UserError(
                f"{flag}: the run was trained on data whose {name.replace('_', ' ')} is "
                f"{getattr(trained_on, name)}, not {getattr(info, name)}; give a run on the same "
                "data"
            )
    return run


def load_parts(needs: Needs) -> PyTree:
    """Return the trained variables of the text encoder and the autoencoder that `needs` names.

    Returns:
      {"text": parameters, "autoencoder": {"params": parameters, "extra": extra variables}}. The
      extra variables, such as a codebook, are not trained by gradients.
    """
    text, text_state = load_state(pathlib.Path(needs.text_encoder))
    autoencoder, state = load_state(pathlib.Path(needs.autoencoder))
    return {
        "text": evaluated_params(text_state, text),
        "autoencoder": {"params": evaluated_params(state, autoencoder), "extra": state.extra},
    }


def load_dual_encoder(directory: str) -> tuple[nn.Module, PyTree]:
    """Return (network, averaged parameters) of a run that trained a text and an image encoder."""
    config, state = load_state(pathlib.Path(directory))
    assert isinstance(config.task, WithNetwork)
    return config.task.network, evaluated_params(state, config)
