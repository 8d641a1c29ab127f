"""Creation of the partitioner for a value of --parallel: `jit`, `pmap` or `fsdp`."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ddpm_jax.errors import UserError
from ddpm_jax.parallel import PARALLEL
from ddpm_jax.parallel.fully_sharded import FullySharded, prime_factors
from ddpm_jax.parallel.partitioner import Partitioner, fetch
from ddpm_jax.parallel.replicated import (
    AXIS,
    PerDevice,
    Replicated,
    data_mesh,
    device_order,
    partitioner_of,
)

__all__ = ["MODES", "Partitioner", "check_batch", "fetch", "make", "partitioner_of"]

MODES = PARALLEL


def make(mode: str = "jit", devices: list[jax.Device] | None = None) -> Partitioner:
    """Return the partitioner for --parallel=`mode` on `devices`, or on all devices if None.

    Raises:
      UserError: If `mode` is not one of `MODES`.
    """
    if mode not in MODES:
        raise UserError(f"--parallel={mode}: must be one of {', '.join(MODES)}")
    devices = sorted(devices or jax.devices(), key=device_order)
    if mode == "fsdp":
        factors = prime_factors(len(devices))
        axes = tuple(f"{AXIS}_{index}" for index in range(len(factors)))
        array = np.reshape(np.array(devices), factors)
        return FullySharded(Mesh(array, axes, axis_types=(AxisType.Auto,) * len(axes)))
    return PerDevice(data_mesh(devices)) if mode == "pmap" else Replicated(data_mesh(devices))


def check_batch(batch_size: int, accumulate: int = 1) -> None:
    """Check that a batch can be divided over devices and `accumulate` accumulation steps.

    Raises:
      UserError: If `batch_size` is not a multiple of (number of devices) x `accumulate`.
    """
    parts = jax.device_count() * accumulate
    if batch_size % parts:
        divisors = f"{jax.device_count()} devices" + f" x {accumulate} parts" * (accumulate > 1)
        raise UserError(
            f"--config.train.batch_size={batch_size}: must be a multiple of {parts}, because each "
            f"batch is divided over {divisors}"
        )
