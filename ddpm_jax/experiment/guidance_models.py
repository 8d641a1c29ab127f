"""Guidance models: trained runs that guide what another run samples.

`--config.task.sampling.guidance_model=` names one:

labels  classifier-free guidance, of a class-conditional run: nothing is loaded
DIR     of a classifier that was trained on noisy images (`--config.task.schedule=cosine`):
        classifier guidance (Dhariwal & Nichol 2021, alg. 2). A scale of 0 is the run alone; 1, of
        an unconditional run, is p(x | y). So an unconditional run samples with labels.
DIR     of a diffusion run, a weaker one, smaller or trained for a shorter time: autoguidance
        (Karras et al. 2024), weaker + scale (run - weaker) for the same label. A scale of 1 is the
        run alone.

The two runs may differ in schedule, prediction and network: all they share is logsnr.
"""

import functools
import pathlib
from collections.abc import Callable

from ddpm_jax.config import expanded, replace
from ddpm_jax.data.types import DataInfo, Loaded
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.recorded import Recorded, flagged, load_state, read_named, stamp_of
from ddpm_jax.experiment.types import Config, checked_task
from ddpm_jax.task import GuidanceModel
from ddpm_jax.training.step import averaged

LABELS = "labels"
FLAG = "--config.task.sampling.guidance_model"


def check_guidance(config: Config, loaded: Loaded) -> Config:
    """Check the guidance model of a config: it is loaded once to see that it fits.

    Args:
      config: bound to its data.
      loaded: the data.

    Returns:
      The config with the absolute path of the model's run.

    Raises:
      UserError: there is no such run, or it cannot guide this one.
    """
    name = config.task.needs().guidance_model
    if name == LABELS:
        return config
    place = expanded(FLAG, name).absolute()
    config = replace(config, {"task.sampling.guidance_model": str(place)})
    run = guiding_run(str(place), config.task.info, config.task.classes)
    with flagged(f"{FLAG}={place}"):
        _check_parameters(place, run.run_config, stamp_of(place))
    theirs = run.record["data"]
    if theirs.get("classes") != list(loaded.data.classes):
        raise UserError(
            f"{FLAG}={place}: trained on {theirs['title']}, whose classes are not those of "
            f"{loaded.data.title}; give a run on the same data"
        )
    return config


@functools.lru_cache(maxsize=16)
def _check_parameters(
    place: pathlib.Path, config: Config, stamp: tuple[tuple[str, int], ...]
) -> None:
    """Raise UserError unless a run's parameters can be read; read once for each `stamp`."""
    del stamp
    load_state(place, config)


def check_guidance_model_is_another(config: Config, workdir: pathlib.Path) -> None:
    """Check that a run is not its own guidance model, which would have no effect.

    Raises:
      UserError: it is.
    """
    name = config.task.needs().guidance_model
    if name != LABELS and pathlib.Path(name).resolve() == workdir.resolve():
        raise UserError(
            f"{FLAG}={name}: is this run itself, which cannot guide itself; give another run"
        )


def guidance_of(config: Config) -> Callable[[], GuidanceModel | None]:
    """Return what loads the guidance model of a bound config; None of it: the labels guide."""
    name = config.task.needs().guidance_model
    if name == LABELS:
        return lambda: None
    load = functools.partial(load_guidance_model, name, config.task.info, config.task.classes)
    return functools.cache(load)  # for one run: a run may be trained again while a notebook is open


def load_guidance_model(place: str, info: DataInfo, classes: int) -> GuidanceModel:
    """Return the guidance model in a directory, with its averaged parameters.

    Args:
      place: its run's directory.
      info: the data of the run that it is to guide.
      classes: that the network of that run is conditioned on; 0: none.

    Raises:
      UserError: as `guiding_run`, or there is no checkpoint.
    """
    run = guiding_run(place, info, classes)
    with flagged(f"{FLAG}={place}"):
        config, state = load_state(run.workdir, run.run_config)
    task = config.task
    about = f"{task.provides}: {run.title}, step {int(state.step)}, {run.workdir}"
    return GuidanceModel(task, averaged(state, config), about)


def guiding_run(place: str, info: DataInfo, classes: int) -> Recorded:
    """Return what is recorded of the run of a guidance model.

    Args:
      place: its directory.
      info: the data of the run that it is to guide.
      classes: that the network of that run is conditioned on; 0: none.

    Raises:
      UserError: there is no run, or one that cannot guide such a run.
    """
    flag, workdir = f"{FLAG}={place}", expanded(FLAG, place)
    missing = f"there is no run; train the guidance model first, or give {FLAG}={LABELS}"
    run = read_named(flag, workdir, missing, finished=False)
    with flagged(flag):
        task = checked_task(run.run_config)
    if task.guide({}, 1.0) is None:
        raise UserError(
            f"{flag}: this run of {run.title} guides nothing; give a diffusion run's directory, "
            "or that of a classifier which was trained with --config.task.schedule=cosine"
        )
    if task.info.shape != info.shape:
        sizes, ours = ("x".join(map(str, sides)) for sides in (task.info.shape, info.shape))
        raise UserError(f"{flag}: of images of {sizes}, not {ours}; give a run on the same data")
    known = info.classes if task.provides == "classifier" else classes
    if task.classes != known:
        raise UserError(
            f"{flag}: its network knows {task.classes} classes and should know {known}; give a "
            "run on the same data, as conditional as this one"
        )
    return run
