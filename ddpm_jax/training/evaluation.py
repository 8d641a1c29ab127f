"""Evaluate a task on a split, and write its metrics and images."""

import math
from typing import Any

from ddpm_jax.data.types import Data
from ddpm_jax.errors import RunError
from ddpm_jax.parallel import sharding as devices
from ddpm_jax.task import Evaluation, Task
from ddpm_jax.training.ema import parameters_used
from ddpm_jax.training.run_dir import RunDir
from ddpm_jax.training.settings import Settings
from ddpm_jax.training.step import TrainState, averaged


def evaluate(
    task: Task,
    config: Settings,
    state: TrainState,
    data: Data,
    run: RunDir,
    step: int,
    seed: int,
    spread: devices.Parallel,
    full: bool = False,
) -> Evaluation:
    """Evaluate the chosen average of the parameters, write the line and the pictures.

    Before the end on the validation split; `full`, at the end, on the test split.
    """
    split = "test" if full else "validation"
    found = evaluated(task, averaged(state, config), state.fixed, data, split, seed, full, spread)
    for name, picture in found.pictures.items():
        run.picture(name, picture, step, last=full)
    run.log(step, found.metrics)
    return found


def evaluated(
    task: Task,
    params: Any,
    fixed: Any,
    data: Data,
    split: str,
    seed: int,
    full: bool,
    spread: devices.Parallel,
) -> Evaluation:
    """What `task.evaluate` finds of a split, whose name stands before every metric's.

    Raises:
      RunError: a metric is not finite.
    """
    found = task.evaluate(params, fixed, data, split=split, seed=seed, full=full, spread=spread)
    check_figures(found.metrics)
    metrics = {f"{split}/{name}": value for name, value in found.metrics.items()}
    return found._replace(metrics=metrics)


def check_figures(metrics: dict[str, float]) -> None:
    """Raises RunError, naming it, if a figure is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RunError(f"{name} is {value}: the parameters are no good")


def describe_evaluation(found: Evaluation, config: Settings) -> dict[str, Any]:
    """What the record says about an evaluation, with the parameters that it used."""
    return {
        **found.about,
        "ema": config.ema.names[config.ema.index],
        "parameters": parameters_used(config.ema),
    }
