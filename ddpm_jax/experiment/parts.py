"""The trained parts that a generation model is built on, found by their run directories."""

import dataclasses
import functools
import os
import pathlib
import types
from typing import Any

from ddpm_jax.config import expanded, marked, restore
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.load import load_state
from ddpm_jax.experiment.preflight import read_run
from ddpm_jax.fields import FROM_PARTS
from ddpm_jax.training.step import TrainState


def with_parts(config: Any, **parts: types.ModuleType) -> Any:
    """`config` with what follows from its parts: every field marked so that a part has, too.

    Args:
      parts: by the field that names its run directory, the experiment that made it.

    Raises:
      UserError: as `finished` says.
    """
    names = marked(config, FROM_PARTS)
    known: dict[str, Any] = {}
    for field, experiment in parts.items():
        known[field], theirs = finished(config, field, experiment)
        known |= {name: getattr(theirs, name) for name in names if hasattr(theirs, name)}
    return dataclasses.replace(config, **known)


def finished(config: Any, field: str, experiment: types.ModuleType) -> tuple[str, Any]:
    """The directory, absolute, and the config of the finished run that `config` names in `field`.

    Raises:
      UserError: there is no such run, it is another experiment's or not finished, or its images
        or captions are of another size.
    """
    place = expanded(f"--config.{field}", getattr(config, field)).absolute()
    name, record = experiment.__name__.rpartition(".")[2], read_run(place)
    if record is None or not os.path.exists(place / "summary.json"):
        raise UserError(
            f"--config.{field}={place}: there is no finished run; train one first: python "
            f"launch.py --experiment={name}"
        )
    if record["experiment"] != name:
        raise UserError(f"--config.{field}={place}: a run of {record['experiment']}, not of {name}")
    theirs = restore(experiment.Config, record["config"], place)
    for other in ("shape", "levels", "caption_length"):
        ours = getattr(config, other, None)
        if ours is not None and getattr(theirs, other, ours) != ours:
            raise UserError(
                f"--config.{field}={place}: trained on data whose {other.replace('_', ' ')} is "
                f"{getattr(theirs, other)}, not {ours}; give a run on the same data"
            )
    return str(place), theirs


@functools.lru_cache(maxsize=4)
def load_part(experiment: types.ModuleType, place: str) -> tuple[Any, TrainState]:
    """The config and the newest state of a part."""
    return load_state(experiment, pathlib.Path(place))
