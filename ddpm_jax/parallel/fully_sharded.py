"""Every array of the state is sharded, as ZeRO's third stage keeps it (Rajbhandari et al. 2020).

The loss is computed in the view of one device, which gathers each parameter where it is used
(`ShardedCollectives`).  The optimizer has a global view of the parts.
"""

import dataclasses
import math

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ddpm_jax.parallel.collectives import ShardedCollectives
from ddpm_jax.parallel.partitioner import (
    Lowered,
    Partitioner,
    Step,
    lower_global,
    on_cpu,
)
from ddpm_jax.parallel.xla_flags import (
    FAST_CONVOLUTIONS,
    LATE_GATHERS,
    compiler_options,
    lost,
)


@dataclasses.dataclass(frozen=True)
class FullySharded(Partitioner):
    """`fsdp`: batches are sharded, and so is each array of the state.

    The mesh has one axis for each prime factor of the number of devices, so that an array is
    sharded over as many devices as some split of its axes allows; a batch lies along all of them.
    """

    mesh: Mesh

    def shardings(self, tree: PyTree) -> PyTree:
        """Return where each array of a state lies."""
        return jax.tree.map(lambda a: NamedSharding(self.mesh, self._split(a.shape)), tree)

    def _split(self, shape: tuple[int, ...]) -> PartitionSpec:
        return split(shape, self.mesh.devices.shape, self.mesh.axis_names)

    def lower(self, step: Step, state: PyTree, batch: PyTree, *rest: PyTree) -> Lowered:
        """Lower step(state, batch, *rest, collectives=...), which donates `state`."""
        options = compiler_options(LATE_GATHERS) if on_cpu(self.mesh) else None
        view = ShardedCollectives(self.mesh, self._split)
        return lower_global(self, view, step, state, batch, *rest, options=options)

    def warning(self) -> str:
        """Return what a step lacks in this version of jaxlib; "": nothing."""
        return lost(FAST_CONVOLUTIONS, *LATE_GATHERS) if on_cpu(self.mesh) else ""


def prime_factors(number: int) -> tuple[int, ...]:
    """Return the prime factors, largest first; (1,) of 1."""
    factors, factor = [], 2
    while number > 1:
        if number % factor:
            factor += 1
        else:
            factors.append(factor)
            number //= factor
    return tuple(reversed(factors)) or (1,)


def split(shape: tuple[int, ...], factors: tuple[int, ...], axes: tuple[str, ...]) -> PartitionSpec:
    """Return which axes of the mesh, of sizes `factors`, divide which axis of an array.

    All of them one axis, the longest that they divide, so that what is sent is sent at once; else
    each the longest part that it divides, and nothing if it divides none.
    """
    left: list[int] = list(shape)
    given: list[tuple[str, ...]] = [()] * len(shape)
    whole = [i for i, size in enumerate(shape) if size % math.prod(factors) == 0]
    if whole:
        given[max(whole, key=lambda i: shape[i])] = axes
        return PartitionSpec(*(names or None for names in given))
    for factor, axis in zip(factors, axes, strict=True):
        fitting = [i for i, size in enumerate(left) if size % factor == 0]
        if fitting:
            longest = max(fitting, key=lambda i: left[i])
            left[longest] //= factor
            given[longest] += (axis,)
    return PartitionSpec(*(names or None for names in given))
