"""Choose how arrays are placed and a step is spread: `jit`, `pmap` or `fsdp`."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ddpm_jax.errors import UserError
from ddpm_jax.parallel import PARALLEL
from ddpm_jax.parallel.fully_sharded import FullySharded, prime_factors
from ddpm_jax.parallel.partitioner import Partitioner, fetch
from ddpm_jax.parallel.replicated import AXIS, PerDevice, Replicated, in_order, line, placed

__all__ = ["MODES", "Partitioner", "check_batch", "fetch", "make", "placed"]

MODES = PARALLEL


def make(mode: str = "jit", devices: list[jax.Device] | None = None) -> Partitioner:
    """Return the partitioner of a mode, over `devices` or all that there are.

    Raises:
      UserError: there is no such mode.
    """
    if mode not in MODES:
        raise UserError(f"--parallel={mode}: there are {', '.join(MODES)}")
    devices = sorted(devices or jax.devices(), key=in_order)
    if mode == "fsdp":
        factors = prime_factors(len(devices))
        axes = tuple(f"{AXIS}_{number}" for number in range(len(factors)))
        array = np.reshape(np.array(devices), factors)
        return FullySharded(Mesh(array, axes, axis_types=(AxisType.Auto,) * len(axes)))
    return PerDevice(line(devices)) if mode == "pmap" else Replicated(line(devices))


def check_batch(batch_size: int, accumulate: int = 1) -> None:
    """Check that a training batch is split evenly over the devices and the parts.

    Raises:
      UserError: it does not divide.
    """
    parts = jax.device_count() * accumulate
    if batch_size % parts:
        over = f"{jax.device_count()} devices" + f" x {accumulate} parts" * (accumulate > 1)
        raise UserError(
            f"--config.train.batch_size={batch_size} does not divide over {over}; "
            f"give a multiple of {parts}"
        )
