"""Every device holds the whole state: under `jit` in a global view, under `pmap` in its own."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ddpm_jax.parallel.collectives import DeviceCollectives, GlobalCollectives
from ddpm_jax.parallel.flops import flops
from ddpm_jax.parallel.partitioner import (
    Lowered,
    Partitioner,
    Program,
    Step,
    lower_global,
    on_cpu,
    put,
)
from ddpm_jax.parallel.xla_flags import FAST_CONVOLUTIONS, lost

AXIS = "data"  # the name of the axis of devices


@dataclasses.dataclass(frozen=True)
class Replicated(Partitioner):
    """`jit`: batches are sharded, the state is replicated, and XLA inserts the communication."""

    mesh: Mesh

    def lower(self, step: Step, state: PyTree, batch: PyTree, *rest: PyTree) -> Lowered:
        """Lower step(state, batch, *rest, collectives=...), which donates `state`."""
        return lower_global(self, GlobalCollectives(), step, state, batch, *rest)

    def warning(self) -> str:
        """Return what a step lacks in this version of jaxlib; "": nothing."""
        return lost(FAST_CONVOLUTIONS) if on_cpu(self.mesh) else ""


@dataclasses.dataclass(frozen=True)
class PerDevice(Partitioner):
    """`pmap`: the step is called for each device; its batches have the devices as first axis."""

    mesh: Mesh

    def feed(self, tree: PyTree, axis: int = 0) -> PyTree:
        """Put this process's rows of a batch on the devices as the step takes them."""
        return jax.tree.map(functools.partial(self._feed, axis=axis), tree)

    def _feed(self, array: PyTree, axis: int) -> jax.Array:
        array = np.asarray(array)
        here = len(self.mesh.local_devices)
        parts = array.reshape(*array.shape[:axis], here, -1, *array.shape[axis + 1 :])
        return put(np.moveaxis(parts, axis, 0), NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def lower(self, step: Step, state: PyTree, batch: PyTree, *rest: PyTree) -> Lowered:
        """Lower step(state, batch, *rest, collectives=...), which donates `state`."""
        mapped = jax.pmap(
            functools.partial(step, collectives=DeviceCollectives(AXIS)),
            axis_name=AXIS,
            in_axes=(None, 0, *[None] * len(rest)),
            out_axes=None,
            axis_size=self.devices,
            devices=list(self.mesh.devices.flat),
            donate_argnums=0,
        )
        arguments = (state, batch, *rest)
        if jax.process_count() == 1:
            traced = jax.make_jaxpr(mapped)(*arguments)  # which lowering does not do again
            return Lowered(mapped.lower(*arguments).compile, flops(traced) / self.devices)

        def call(state: PyTree, batch: PyTree, *rest: PyTree) -> tuple[PyTree, PyTree]:
            results: tuple[PyTree, PyTree] = jax.tree.map(
                self._on_all_processes, mapped(state, batch, *rest)
            )
            return results

        def program() -> Program:
            return call

        return Lowered(program, 0.0)

    def _on_all_processes(self, array: jax.Array) -> jax.Array:
        """Return a replicated array; what pmap returns is of this process's devices."""
        parts = [part.data for part in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, self.replicated, parts)

    def warning(self) -> str:
        """Return what a step lacks in this version of jaxlib; "": nothing."""
        return lost(FAST_CONVOLUTIONS) if on_cpu(self.mesh) else ""


def line(devices: list[jax.Device]) -> Mesh:
    """Return the mesh of `jit` and `pmap`; a program takes all its arguments on one mesh."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def placed(tree: PyTree) -> Replicated:
    """Return the partitioner of the devices on which a tree's arrays lie.

    The first device where the tree has no array of jax.
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    devices = list(arrays[0].sharding.device_set) if arrays else jax.devices()[:1]
    return Replicated(line(sorted(devices, key=in_order)))


def in_order(device: jax.Device) -> tuple[int, int]:
    """Return a device's place in a mesh: by process, then by number."""
    return device.process_index, device.id
