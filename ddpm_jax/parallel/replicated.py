"""Data parallelism with a replicated state, for --parallel=jit and --parallel=pmap."""

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
from ddpm_jax.parallel.xla_flags import FAST_CONVOLUTIONS, missing_flags_warning

AXIS = "data"  # name of the mesh axis of devices


@dataclasses.dataclass(frozen=True)
class Replicated(Partitioner):
    """The partitioner of `jit`: batches are partitioned, and the state is replicated."""

    mesh: Mesh

    def lower(self, step: Step, state: PyTree, batch: PyTree, *rest: PyTree) -> Lowered:
        """Return step(state, batch, *rest, collectives=...), lowered; it donates `state`."""
        return lower_global(self, GlobalCollectives(), step, state, batch, *rest)

    def warning(self) -> str:
        """Return a warning if this jaxlib makes training slower, otherwise an empty string."""
        return missing_flags_warning(FAST_CONVOLUTIONS) if on_cpu(self.mesh) else ""


@dataclasses.dataclass(frozen=True)
class PerDevice(Partitioner):
    """The partitioner of `pmap`: arrays of a batch are [devices, examples per device, ...]."""

    mesh: Mesh

    def feed(self, tree: PyTree, axis: int = 0) -> PyTree:
        """Return the global batch with a new first axis of devices, given this process's rows."""
        return jax.tree.map(functools.partial(self._feed, axis=axis), tree)

    def _feed(self, array: PyTree, axis: int) -> jax.Array:
        array = np.asarray(array)
        devices = len(self.mesh.local_devices)
        parts = array.reshape(*array.shape[:axis], devices, -1, *array.shape[axis + 1 :])
        return put(np.moveaxis(parts, axis, 0), NamedSharding(self.mesh, PartitionSpec(AXIS)))

    def lower(self, step: Step, state: PyTree, batch: PyTree, *rest: PyTree) -> Lowered:
        """Return step(state, batch, *rest, collectives=...), lowered; it donates `state`."""
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
            traced = jax.make_jaxpr(mapped)(*arguments)  # cached for the lowering
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
        """Return an array that is replicated on all processes, given a local result of `pmap`."""
        parts = [part.data for part in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, self.replicated, parts)

    def warning(self) -> str:
        """Return a warning if this jaxlib makes training slower, otherwise an empty string."""
        return missing_flags_warning(FAST_CONVOLUTIONS) if on_cpu(self.mesh) else ""


def data_mesh(devices: list[jax.Device]) -> Mesh:
    """Return the mesh of `jit` and `pmap`, whose only axis is `AXIS`."""
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def partitioner_of(tree: PyTree) -> Replicated:
    """Return a partitioner of the devices on which the first jax array of a tree is stored.

    If the tree has no jax arrays, return a partitioner of the first device.
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    devices = list(arrays[0].sharding.device_set) if arrays else jax.devices()[:1]
    return Replicated(data_mesh(sorted(devices, key=device_order)))


def device_order(device: jax.Device) -> tuple[int, int]:
    """Return the sort key of a device in a mesh: (index of the process, number of the device)."""
    return device.process_index, device.id
