"""Load a trained run with its newest checkpoint."""

import os
import pathlib

from ddpm_jax.experiment.recorded import Recorded, load_state, read_model
from ddpm_jax.experiment.resources import for_sampling
from ddpm_jax.experiment.trained import TrainedRun
from ddpm_jax.experiment.types import checked_task
from ddpm_jax.task import Variables
from ddpm_jax.training.step import evaluated_params


def load_run(workdir: str | os.PathLike[str], parallel: str = "jit") -> TrainedRun:
    """Return the trained run in a directory, with its newest checkpoint.

    Args:
      workdir: Directory of the run.
      parallel: How arrays are partitioned across devices, a value of the flag `--parallel`.

    Raises:
      UserError: If the directory holds no run or no checkpoint, or holds an experiment of several
        runs for which `Experiment.samples` names no run.
    """
    return load_recorded(read_model(pathlib.Path(workdir).expanduser()), parallel)


def load_recorded(run: Recorded, parallel: str = "jit") -> TrainedRun:
    """Return the trained run that consists of a run's config and its newest checkpoint."""
    config, state = load_state(run.workdir, run.run_config, parallel)
    checked_task(config)
    variables = Variables(evaluated_params(state, config), state.extra)
    return TrainedRun(config, variables, int(state.step), run.title, for_sampling(config))
