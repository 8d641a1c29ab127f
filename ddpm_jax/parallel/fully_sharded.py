"""Fully sharded data parallelism: every array of the state is partitioned across devices.

This is stage 3 of ZeRO (Rajbhandari et al. 2020).  Each device computes the loss of its part of the
batch, and gathers each parameter from all devices where it is used (`ShardedCollectives`).  The
optimizer computes with global arrays.
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
    missing_flags_warning,
)


@dataclasses.dataclass(frozen=True)
class FullySharded(Partitioner):
    """The partitioner of `fsdp`: batches and all arrays of the state are partitioned.

    The mesh has one axis for each prime factor of the number of devices, so that an array can be
    partitioned across as many devices as its shape allows.  A batch is partitioned across all axes.
    """

    mesh: Mesh

    def shardings(self, tree: PyTree) -> PyTree:
        """Return a tree of the shardings (`NamedSharding`) of the arrays of a state."""
        return jax.tree.map(lambda a: NamedSharding(self.mesh, self._partition(a.shape)), tree)

    def _partition(self, shape: tuple[int, ...]) -> PartitionSpec:
        return partition(shape, self.mesh.devices.shape, self.mesh.axis_names)

    def lower(self, step: Step, state: PyTree, batch: PyTree, *rest: PyTree) -> Lowered:
        """Return step(state, batch, *rest, collectives=...), lowered; it donates `state`."""
        options = compiler_options(LATE_GATHERS) if on_cpu(self.mesh) else None
        collectives = ShardedCollectives(self.mesh, self._partition)
        return lower_global(self, collectives, step, state, batch, *rest, options=options)

    def warning(self) -> str:
        """Return a warning if this jaxlib makes training steps slower or use more memory.

        Return an empty string if it does not.
        """
        return missing_flags_warning(FAST_CONVOLUTIONS, *LATE_GATHERS) if on_cpu(self.mesh) else ""


def prime_factors(number: int) -> tuple[int, ...]:
    """Return the prime factors of `number` in descending order; return (1,) for 1."""
    factors, factor = [], 2
    while number > 1:
        if number % factor:
            factor += 1
        else:
            factors.append(factor)
            number //= factor
    return tuple(reversed(factors)) or (1,)


def partition(
    shape: tuple[int, ...], factors: tuple[int, ...], axes: tuple[str, ...]
) -> PartitionSpec:
    """Return the partition of an array across the axes of a mesh.

    If some axes of the array are divisible by the number of devices, the longest of these is
    partitioned across all mesh axes, so that the array is gathered in one transfer.  Otherwise,
    each mesh axis in turn partitions the longest axis of the remaining part that is divisible by
    the size of the mesh axis; without such an axis, the array is replicated along the mesh axis.

    Args:
      shape: Shape of the array.
      factors: Sizes of the mesh axes; the product is the number of devices.
      axes: Names of the mesh axes.
    """
    sides: list[int] = list(shape)  # shape of one device's part
    names: list[tuple[str, ...]] = [()] * len(shape)
    divisible = [i for i, size in enumerate(shape) if size % math.prod(factors) == 0]
    if divisible:
        names[max(divisible, key=lambda i: shape[i])] = axes
        return PartitionSpec(*(axis_names or None for axis_names in names))
    for factor, axis in zip(factors, axes, strict=True):
        candidates = [i for i, size in enumerate(sides) if size % factor == 0]
        if candidates:
            longest = max(candidates, key=lambda i: sides[i])
            sides[longest] //= factor
            names[longest] += (axis,)
    return PartitionSpec(*(axis_names or None for axis_names in names))
