"""The registry of experiments: every file in experiments/ defines one `EXPERIMENT`."""

import dataclasses
import functools
import importlib
import importlib.util
import pathlib
import sys
from typing import Any

from ddpm_jax.errors import UserError, suggestion

ROOT = pathlib.Path(__file__).resolve().parents[2]


def names() -> list[str]:
    """Return the sorted names of all experiments: the files in experiments/, without .py."""
    return sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))


@functools.cache
def load_experiment(name: str) -> Any:
    """Return the `Experiment` that experiments/NAME.py defines.

    The name may come from the record of an untrusted run, so only files of experiments/
    are imported. The type `Experiment` is not imported here, because it needs jax, and the command
    line imports this module before jax.

    Raises:
      UserError: If the file does not exist.
    """
    if name not in names():
        raise UserError(f'there is no experiment "{name}"{suggestion(name, names())}')
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
    return dataclasses.replace(experiment, name=name)
