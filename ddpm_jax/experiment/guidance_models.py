"""Guidance models: trained networks that guide the sampling of another run.

The field `--config.task.sampling.guidance_model` chooses the guidance:

labels  Classifier-free guidance of a class-conditional run. No other run is loaded.
DIR     If DIR is a run of a classifier of noisy images (`--config.task.schedule=cosine`):
        classifier guidance (Dhariwal & Nichol 2021, alg. 2). Scale 0 disables it. With scale 1,
        an unconditional run samples p(x | y).
DIR     If DIR is a run of a weaker diffusion model, which is smaller or trained for fewer steps:
        autoguidance (Karras et al. 2024), weaker + scale (run - weaker) for the same label. Scale
        1 disables it.

The two runs may differ in schedule, prediction type and network, because the input of both
networks is the log signal-to-noise ratio logsnr.
"""

import functools
import pathlib
from collections.abc import Callable

from ddpm_jax.config import expand_path, replace
from ddpm_jax.data.types import DataInfo, Loaded
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.recorded import Recorded, flagged, load_state, read_named, stamp_of
from ddpm_jax.experiment.types import Config, checked_task
from ddpm_jax.task import GuidanceModel
from ddpm_jax.training.step import evaluated_params

LABELS = "labels"
FLAG = "--config.task.sampling.guidance_model"


def check_guidance(config: Config, loaded: Loaded) -> Config:
    """Check the guidance model that a config names; load its parameters once for this check.

    Args:
      config: Config whose task is bound to its data set.
      loaded: Data set of the run.

    Returns:
      The config with the absolute path of the guidance model's run. With `labels`, the config does
      not change.

    Raises:
      UserError: If there is no such run, or its model cannot guide the sampling of this config.
    """
    name = config.task.needs().guidance_model
    if name == LABELS:
        return config
    directory = expand_path(FLAG, name).absolute()
    config = replace(config, {"task.sampling.guidance_model": str(directory)})
    run = read_guidance_run(str(directory), config.task.info, config.task.classes)
    with flagged(f"{FLAG}={directory}"):
        _check_parameters(directory, run.run_config, stamp_of(directory))
    data = run.record["data"]
    if data.get("classes") != list(loaded.data.classes):
        raise UserError(
            f"{FLAG}={directory}: the run was trained on {data['title']}, whose classes are not "
            f"those of {loaded.data.title}; give a run on the same data"
        )
    return config


@functools.lru_cache(maxsize=16)
def _check_parameters(
    directory: pathlib.Path, config: Config, stamp: tuple[tuple[str, int], ...]
) -> None:
    """Raise UserError unless a run's checkpoint, cached by its `stamp_of`, can be read."""
    del stamp
    load_state(directory, config)


def check_not_guided_by_itself(config: Config, workdir: pathlib.Path) -> None:
    """Check that a run is not its own guidance model, which would have no effect.

    Raises:
      UserError: If the config names the run's directory as the guidance model.
    """
    name = config.task.needs().guidance_model
    if name != LABELS and pathlib.Path(name).resolve() == workdir.resolve():
        raise UserError(
            f"{FLAG}={name}: is the directory of this run, which cannot guide itself; give "
            f"another run, or {FLAG}={LABELS}"
        )


def guidance_of(config: Config) -> Callable[[], GuidanceModel | None]:
    """Return a function that loads the guidance model of a config whose task is bound.

    The function returns None for classifier-free guidance, which needs no guidance
    model.
    """
    name = config.task.needs().guidance_model
    if name == LABELS:
        return lambda: None
    load = functools.partial(load_guidance_model, name, config.task.info, config.task.classes)
    # A cache per call, not per directory: a notebook may outlive a further training of the model.
    return functools.cache(load)


def load_guidance_model(directory: str, info: DataInfo, classes: int) -> GuidanceModel:
    """Return the guidance model in a run directory, with its averaged parameters.

    Args:
      directory: Run directory of the guidance model.
      info: Properties of the data set of the run that is guided.
      classes: Number of classes of the guided network; 0 if the network is unconditional.

    Raises:
      UserError: If `read_guidance_run` raises it, or the run has no checkpoint.
    """
    run = read_guidance_run(directory, info, classes)
    with flagged(f"{FLAG}={directory}"):
        config, state = load_state(run.workdir, run.run_config)
    task = config.task
    about = f"{task.run_type}: {run.title}, step {int(state.step)}, {run.workdir}"
    return GuidanceModel(task, evaluated_params(state, config), about)


def read_guidance_run(directory: str, info: DataInfo, classes: int) -> Recorded:
    """Return the recorded run of a guidance model, without its parameters.

    Args:
      directory: Run directory of the guidance model.
      info: Properties of the data set of the run that is guided.
      classes: Number of classes of the guided network; 0 if the network is unconditional.

    Raises:
      UserError: If there is no run in the directory, or its model cannot guide a run with this data
        set and this number of classes.
    """
    flag, workdir = f"{FLAG}={directory}", expand_path(FLAG, directory)
    missing = f"there is no run; train the guidance model first, or give {FLAG}={LABELS}"
    run = read_named(flag, workdir, missing, finished=False)
    with flagged(flag):
        task = checked_task(run.run_config)
    if task.guidance_method({}, 1.0) is None:
        raise UserError(
            f"{flag}: a run of {run.title} cannot guide sampling; give the directory of a "
            "diffusion run, or of a classifier that was trained with "
            "--config.task.schedule=cosine"
        )
    if task.info.shape != info.shape:
        shape, expected = ("x".join(map(str, sizes)) for sizes in (task.info.shape, info.shape))
        raise UserError(
            f"{flag}: the run was trained on images of {shape}, not {expected}; give a run on the "
            "same data"
        )
    expected_classes = info.classes if task.run_type == "classifier" else classes
    if task.classes != expected_classes:
        raise UserError(
            f"{flag}: the network has {task.classes} classes and must have {expected_classes}; "
            "give a run on the same data with the same --config.task.conditional"
        )
    return run
