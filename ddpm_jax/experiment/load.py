"""Load the newest checkpoint of a run."""

import contextlib
import pathlib
import types
from typing import Any

from ddpm_jax.config import restore
from ddpm_jax.errors import UserError
from ddpm_jax.parallel import sharding as devices
from ddpm_jax.training import ema
from ddpm_jax.training import step as step_module
from ddpm_jax.training.checkpoint import open_checkpoints
from ddpm_jax.training.run_dir import (
    read_record,
)


def load_state(
    experiment: types.ModuleType,
    workdir: pathlib.Path,
    config: Any = None,
    parallel: str = "jit",
    whole: bool = False,
) -> tuple[Any, step_module.TrainState]:
    """The config and the newest state of a run directory, for evaluating and drawing.

    None stands in the place of what only training reads, most of a checkpoint, unless `whole`.

    Args:
      config: instead of the recorded one.

    Raises:
      UserError: there is no run, or no checkpoint yet.
    """
    record = read_record(workdir)
    if record is None:
        raise UserError(f"there is no run in {workdir}; train one first, or give --workdir")
    config = config or restore(experiment.Config, record["config"], workdir)
    ema.check_ema(config)
    folder = workdir / "checkpoints"
    nothing = UserError(f"there is no checkpoint in {workdir} yet; train first")
    if not any(folder.glob("[0-9]*")):
        raise nothing
    with contextlib.closing(open_checkpoints(folder, read_only=True)) as checkpoints:
        shapes = step_module.state_shapes(experiment.build(config), config)
        like = devices.make(parallel).like(shapes)
        if not whole:
            like = step_module.without_training(like, config, ...)
        _, state, _ = checkpoints.restore_newest(like)
        if state is None:
            raise nothing
        return config, state if whole else step_module.without_training(state, config, None)
