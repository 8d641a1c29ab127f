"""How a step is spread over devices: the only file that knows them.

`jit`: one mesh axis, `data`; batches are sharded along it, everything else is replicated,
and XLA inserts the collectives.  A step is written as if there were one device.
"""

import importlib.metadata
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ddpm_jax.errors import UserError

MODES = ("jit",)
# A flag that jaxlib does not know aborts the process, so each is set for the versions it was
# tried with alone.  The first makes a convolution's gradients 2 to 3 times faster on a CPU; the
# second makes compiling a third faster and the program slower.
CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
DEBUG_FLAG = "--xla_cpu_use_fusion_emitters=false"
VERSIONS = {CPU_FLAG: ("0.10.2", "0.12.0.1"), DEBUG_FLAG: ("0.10.2",)}


def tune_cpu(debug: bool = False) -> None:
    """Set `CPU_FLAG`, and `DEBUG_FLAG` for runs of a few steps, where jaxlib knows them.

    Before the first computation, or it does nothing.
    """
    version = importlib.metadata.version("jaxlib")
    for flag in (CPU_FLAG, DEBUG_FLAG) if debug else (CPU_FLAG,):
        flags = os.environ.get("XLA_FLAGS", "")
        if version in VERSIONS[flag] and flag.partition("=")[0] not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


class Parallel(NamedTuple):
    """How arrays are placed and a step is compiled.

    place: a state's arrays -> the devices.
    like: a state's shapes -> the same with the placement, for restoring.
    shard(batch, axis=0): a batch's arrays -> the devices, split along `axis`.
    compile(step): step(state, ...) -> the same, compiled; `state` is donated.
    """

    place: Callable[[Any], Any]
    like: Callable[[Any], Any]
    shard: Callable[..., Any]
    compile: Callable[[Callable], jax.stages.Wrapped]


def make(mode: str = "jit") -> Parallel:
    """The devices at hand, in `mode`."""
    if mode not in MODES:
        raise UserError(f"--parallel={mode}: there are {', '.join(MODES)}")
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(tree: Any) -> Any:
        return jax.device_put(tree, replicated)

    def like(tree: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), tree
        )

    def shard(tree: Any, axis: int = 0) -> Any:
        split = NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
        return jax.tree.map(lambda array: jax.device_put(np.asarray(array), split), tree)

    def compile(step: Callable) -> jax.stages.Wrapped:
        return jax.jit(step, donate_argnums=0, out_shardings=replicated)

    return Parallel(place, like, shard, compile)


def round_up(batch_size: int) -> int:
    """The next batch size that the devices divide, for batches that are filled up anyway."""
    devices = jax.device_count()
    return -(-batch_size // devices) * devices


def check_batch(batch_size: int) -> None:
    """A training batch is split evenly over the devices, or not at all.

    Raises:
      UserError: the devices do not divide it.
    """
    devices = jax.device_count()
    if batch_size % devices:
        raise UserError(
            f"--config.batch_size={batch_size} does not divide over {devices} devices; "
            f"give a multiple of {devices}"
        )


def describe() -> dict[str, Any]:
    """The devices, for `config.json`."""
    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
