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

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator

from ddpm_jax.config import expanded, replace
from ddpm_jax.data.types import DataInfo, Loaded
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.preflight import read_run
from ddpm_jax.experiment.recorded import load_state, read
from ddpm_jax.experiment.types import Config, build
from ddpm_jax.task import Guide
from ddpm_jax.training.step import averaged

LABELS = "labels"
FLAG = "--config.task.sampling.guidance_model"


def check_guidance(config: Config, loaded: Loaded) -> Config:
    """Check the guidance model of a config: it is loaded once to see that it fits.

    Args:
      config: bound to its data, with a section `task.sampling`.
      loaded: the data.

    Returns:
      The config with the absolute path of the model's run.

    Raises:
      UserError: there is no such run, or it cannot guide this one.
    """
    name = config.task.sampling.guidance_model
    if name == LABELS:
        return config
    place = expanded(FLAG, name).absolute()
    config = replace(config, {"task.sampling.guidance_model": str(place)})
    guidance_of(config)()
    theirs = (read_run(place) or {}).get("data", {})
    if theirs.get("classes") != list(loaded.data.classes):
        raise UserError(
            f"{FLAG}={place}: trained on {theirs.get('title')}, whose classes are not those of "
            f"{loaded.data.title}; give a run on the same data"
        )
    return config


def check_guides_another(config: Config, workdir: pathlib.Path) -> None:
    """Raises UserError if a run is its own guidance model, which has no effect."""
    name = config.task.needs().guidance_model
    if name != LABELS and pathlib.Path(name).resolve() == workdir.resolve():
        raise UserError(
            f"{FLAG}={name}: is this run itself, which cannot guide itself; give another run"
        )


def guidance_of(config: Config) -> Callable[[], Guide | None]:
    """Return what loads the guidance model of a bound config; None of it: the labels guide."""
    name = config.task.sampling.guidance_model
    if name == LABELS:
        return lambda: None
    return functools.partial(load_guide, name, config.task.info, config.task.conditional)


@functools.lru_cache(maxsize=4)
def load_guide(place: str, info: DataInfo, conditional: bool) -> Guide:
    """Return the guidance model in `place`, with its averaged parameters.

    Args:
      place: its run's directory.
      info: the data of the run that it is to guide.
      conditional: whether that run is class-conditional.

    Raises:
      UserError: there is no run there, no checkpoint, or one that cannot guide such a run.
    """
    flag, workdir = f"{FLAG}={place}", expanded(FLAG, place)
    with _flagged(flag):
        record = read_run(workdir)
    if record is None:
        raise UserError(
            f"{flag}: there is no run; train the guidance model first, or give {FLAG}={LABELS}"
        )
    with _flagged(flag):
        theirs = read(workdir)
        if not isinstance(theirs.config, Config):
            raise UserError(f"{theirs.title} trains several models; give the directory of one")
        guide = build(theirs.config).guide
    if guide is None:
        raise UserError(
            f"{flag}: this run of {theirs.title} guides nothing; give a diffusion run's directory, "
            "or that of a classifier which was trained with --config.task.schedule=cosine"
        )
    if guide.shape != info.shape:
        sizes, ours = ("x".join(map(str, sides)) for sides in (guide.shape, info.shape))
        raise UserError(f"{flag}: of images of {sizes}, not {ours}; give a run on the same data")
    known = info.classes if guide.kind == "classifier" or conditional else 0
    if guide.classes != known:
        raise UserError(
            f"{flag}: its network knows {guide.classes} classes and should know {known}; give a "
            "run on the same data, as conditional as this one"
        )
    with _flagged(flag):
        _, state = load_state(workdir, theirs.config)
    about = f"{guide.kind}: {theirs.title}, step {int(state.step)}, {workdir}"
    return guide._replace(params=averaged(state, theirs.config), about=about)


@contextlib.contextmanager
def _flagged(flag: str) -> Iterator[None]:
    """Put the flag that named a run before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
