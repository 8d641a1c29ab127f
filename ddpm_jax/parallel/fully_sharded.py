"""Fully sharded data parallelism: every array of the state is partitioned across devices.

This is stage 3 of ZeRO (Rajbhandari et al. 2020).  The loss is computed on each device, which
gathers each parameter where it is used (`ShardedCollectives`); the optimizer computes with global
arrays.
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
        """Return the sharding of each array of a state."""
        return jax.tree.map(lambda a: NamedSharding(self.mesh, self._partition(a.shape)), tree)

    def _partition(self, shape: tuple[int, ...]) -> PartitionSpec:
        return partition(shape, self.mesh.devices.shape, self.mesh.axis_names)

    def lower(self, step: Step, state: PyTree, batch: PyTree, *rest: PyTree) -> Lowered:
        """Lower step(state, batch, *rest, collectives=...), with `state` donated."""
        options = compiler_options(LATE_GATHERS) if on_cpu(self.mesh) else None
        collectives = ShardedCollectives(self.mesh, self._partition)
        return lower_global(self, collectives, step, state, batch, *rest, options=options)

    def warning(self) -> str:
        """Return a warning if this version of jaxlib makes steps slow or large; "": no warning."""
        return missing_flags_warning(FAST_CONVOLUTIONS, *LATE_GATHERS) if on_cpu(self.mesh) else ""


def prime_factors(number: int) -> tuple[int, ...]:
    """Return the prime factors of a number, the largest first, or (1,) for 1."""
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

    If all mesh axes together divide an axis of the array, they partition the longest such axis, so
    that gathering is one transfer.  Otherwise each mesh axis in turn partitions the longest
    remaining axis that it divides; a mesh axis that divides none is not used.

    Args:
      shape: Shape of the array.
      factors: Sizes of the mesh axes.
      axes: Names of the mesh axes.
    """
    sides: list[int] = list(shape)  # of one device's part
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
