"""Guides: trained runs that guide what another run draws, named by `--config.guide=DIR`.

labels  classifier-free guidance, of a class-conditional run: nothing is loaded
DIR     of a classifier that was trained on noise (`--config.noise=cosine`): classifier guidance
        (Dhariwal & Nichol 2021, alg. 2).  A scale of 0 is the run alone; 1, of an unconditional
        run, is p(x | y).  So an unconditional run is drawn with labels.
DIR     of a diffusion run, a worse one, smaller or trained for a shorter time: autoguidance
        (Karras et al. 2024), worse + scale (run - worse) of one and the same label.  A
        scale of 1 is the run alone.

The two runs may differ in schedule, prediction and network: all they share is logsnr.
"""

import contextlib
import dataclasses
import functools
import importlib
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any

from ddpm_jax.config import expanded, restore
from ddpm_jax.data.types import Loaded
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.load import load_state
from ddpm_jax.experiment.preflight import read_run
from ddpm_jax.task import Guide
from ddpm_jax.training.step import averaged

LABELS = "labels"


def with_guide(beside: types.ModuleType, config: Any, loaded: Loaded) -> Any:
    """`config` with its guide, loaded once to see that it fits, where it is found from anywhere.

    Args:
      beside: an experiment; the guide's is a file of the same folder.
      config: whose `guide` says "labels" or which run's directory.

    Raises:
      UserError: there is no such run, or it cannot guide this one.
    """
    if config.guide == LABELS:
        return config
    place = expanded("--config.guide", config.guide).absolute()
    config = dataclasses.replace(config, guide=str(place))
    guide_of(beside, config)()
    theirs = (read_run(place) or {}).get("data", {})
    if theirs.get("classes") != list(loaded.data.classes):
        raise UserError(
            f"--config.guide={place}: trained on {theirs.get('title')}, whose classes are not "
            f"those of {loaded.data.title}; give a run on the same data"
        )
    return config


def guide_of(beside: types.ModuleType, config: Any) -> Callable[[], Guide | None]:
    """What loads the guide of a config; None: the labels guide."""
    if config.guide == LABELS:
        return lambda: None
    return functools.partial(
        load_guide, beside, config.guide, config.shape, config.classes, config.conditional
    )


@functools.lru_cache(maxsize=4)
def load_guide(
    beside: types.ModuleType,
    place: str,
    shape: tuple[int, int, int],
    classes: int,
    conditional: bool,
) -> Guide:
    """The guide in `place`, with its averaged parameters.

    Args:
      shape, classes, conditional: of the run that it is to guide.

    Raises:
      UserError: there is no run there, no checkpoint, or one that cannot guide such a run.
    """
    flag, workdir = f"--config.guide={place}", expanded("--config.guide", place)
    with _flagged(flag):
        record = read_run(workdir)
    if record is None:
        raise UserError(
            f"{flag}: there is no run; train the guide first, or give --config.guide={LABELS}"
        )
    name = record["experiment"]
    experiment = experiment_beside(beside, name)
    if experiment is None:
        raise UserError(f"{flag}: a run of {name}, which experiments/ has no file of")
    if not hasattr(experiment, "build"):
        raise UserError(f"{flag}: {name} trains several models; give the directory of one")
    with _flagged(flag):
        config = restore(experiment.Config, record.get("config", {}), workdir)
        guide = experiment.build(config).guide
    if guide is None:
        raise UserError(
            f"{flag}: this run of {name} guides nothing; give a diffusion run's directory, or that "
            "of a classifier which was trained with --config.noise=cosine"
        )
    if guide.shape != shape:
        theirs, ours = ("x".join(map(str, sides)) for sides in (guide.shape, shape))
        raise UserError(f"{flag}: of images of {theirs}, not {ours}; give a run on the same data")
    known = classes if guide.kind == "classifier" or conditional else 0
    if guide.classes != known:
        raise UserError(
            f"{flag}: its network knows {guide.classes} classes and should know {known}; give a "
            "run on the same data, as conditional as this one"
        )
    with _flagged(flag):
        _, state = load_state(experiment, workdir, config)
    about = f"{guide.kind}: {name}, step {int(state.step)}, {workdir}"
    return guide._replace(params=averaged(state, config), about=about)


def experiment_beside(beside: types.ModuleType, name: Any) -> types.ModuleType | None:
    """The experiment `name`, if it is a file of the folder of `beside`.

    A run directory may be anybody's: nothing else that its record names is imported.
    """
    folder = pathlib.Path(str(beside.__file__)).parent
    if name not in [path.stem for path in folder.glob("[a-z]*.py")]:
        return None
    return importlib.import_module(f"{beside.__name__.rpartition('.')[0]}.{name}")


@contextlib.contextmanager
def _flagged(flag: str) -> Iterator[None]:
    """What is wrong with a run is told of the flag that named it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
