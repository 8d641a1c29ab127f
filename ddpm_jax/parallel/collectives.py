"""Collective operations of a training step, for each value of --parallel (jit, pmap, fsdp).

The code of a training step is that of one device: it computes with the part of the batch of this
device, and calls methods of `Collectives` where devices exchange data.  With `jit`, a training step
computes with global arrays; the methods return their argument, and XLA inserts the communication.

In this file, `params` are the trained parameters, and `extra` are the extra variables: arrays that
are not trained by gradients, such as frozen networks and running statistics.
"""

import dataclasses
import functools
from typing import Protocol, runtime_checkable

import jax
from jax.extend.core import Primitive
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree


@runtime_checkable
class Loss(Protocol):
    """A loss as a function of parameters, extra variables, a batch and one key for each example."""

    def __call__(
        self, params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[Array, PyTree]:
        """Return (mean loss of the batch, auxiliary results such as metrics)."""


@runtime_checkable
class ValueAndGrad(Protocol):
    """The function that `jax.value_and_grad(loss, has_aux=True)` returns."""

    def __call__(
        self, params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[tuple[Array, PyTree], PyTree]:
        """Return ((mean loss, auxiliary results), gradient with respect to `params`)."""


@runtime_checkable
class Compute(Protocol):
    """A function that every device calls with its part of a global batch."""

    def __call__(
        self, collectives: "Collectives", params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Return (gradient, means, examples) of the global batch, given one device's part of it.

        `means` are mean metrics; `examples` are arrays whose first axis is the global batch. Both
        are equal on all devices.
        """


@runtime_checkable
class Collectives(Protocol):
    """Communication between devices in a training step; the default methods do not communicate."""

    def value_and_grad(self, loss: Loss) -> ValueAndGrad:
        """Return the function that computes a loss and the gradient with respect to `params`."""
        return jax.value_and_grad(loss, has_aux=True)

    def mean(self, tree: PyTree) -> PyTree:
        """Return the mean over devices of each array of a tree."""
        return tree

    def mean_gradient(self, gradient: PyTree) -> PyTree:
        """Return the mean over devices of a gradient that was computed by `value_and_grad`."""
        return self.mean(gradient)

    def all_gather(self, tree: PyTree) -> PyTree:
        """Return the arrays of all devices, concatenated along the first axis."""
        return tree

    def per_device(
        self, compute: Compute, params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Return `compute(collectives, params, extra, batch, keys)`, computed on each device.

        Args:
          compute: Function that computes the gradient of a batch on one device.
          params: Parameters.
          extra: Extra variables (arrays that are not trained by gradients).
          batch: Arrays whose first axis is the batch.
          keys: One key for each example.
        """
        return compute(self, params, extra, batch, keys)


@dataclasses.dataclass(frozen=True)
class GlobalCollectives(Collectives):
    """Collectives of `jit`, with which a training step computes with global arrays."""


@dataclasses.dataclass(frozen=True)
class DeviceCollectives(Collectives):
    """Collectives of `pmap`, with which each device has a part of the batch and the full state.

    Attributes:
      axis: Name of the axis of devices (`axis_name` of `jax.pmap`).
    """

    axis: str

    def mean(self, tree: PyTree) -> PyTree:
        """Return the mean over devices of each array of a tree."""
        return jax.lax.pmean(tree, self.axis)

    def all_gather(self, tree: PyTree) -> PyTree:
        """Return the arrays of all devices, concatenated along the first axis."""
        return _all_gather(tree, self.axis)


@runtime_checkable
class Split(Protocol):
    """A function that partitions arrays across the axes of a mesh."""

    def __call__(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Return the partition of an array of the shape `shape`."""


@dataclasses.dataclass(frozen=True)
class ShardedCollectives(Collectives):
    """Collectives of `fsdp`, with which arrays of the state are partitioned across devices.

    A training step computes with global arrays, except that each device computes the loss and the
    gradient of its part of the batch (`per_device`).

    Attributes:
      mesh: The mesh of devices.
      split: Function that returns the partition of an array of the state.
    """

    mesh: Mesh
    split: Split

    def per_device(
        self, compute: Compute, params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Return `compute(collectives, params, extra, batch, keys)`, computed on each device.

        Args:
          compute: Function that computes the gradient of a batch on one device.
          params: Parameters, partitioned across devices.
          extra: Extra variables (not trained by gradients), partitioned across devices.
          batch: Arrays of the global batch.
          keys: One key for each example.
        """
        specs = jax.tree.map(lambda array: self.split(array.shape), (params, extra))
        sizes = frozenset(array.size for array in jax.tree.leaves(params))
        examples, replicated = PartitionSpec(self.mesh.axis_names), PartitionSpec()
        results: tuple[PyTree, PyTree, PyTree] = jax.shard_map(
            functools.partial(compute, ShardCollectives(self.mesh, specs, sizes)),
            mesh=self.mesh,
            in_specs=(*specs, examples, examples),
            out_specs=(specs[0], replicated, replicated),
            check_vma=False,
        )(params, extra, batch, keys)
        return results


@dataclasses.dataclass(frozen=True)
class ShardCollectives(Collectives):
    """Collectives that one device calls in `fsdp`, where it has a part of each array of the state.

    Each parameter is gathered from all devices where it is used, in the forward pass and again in
    the backward pass; the gathered array is not stored in between.  One operation (reduce-scatter)
    sums the gradients of all devices and returns to each device the sum for its part.

    Attributes:
      mesh: The mesh of devices.
      specs: Partition of each array in the tuple (params, extra).
      sizes: Numbers of elements of the gathered parameters.
    """

    mesh: Mesh
    specs: tuple[PyTree, PyTree]
    sizes: frozenset[int]

    def value_and_grad(self, loss: Loss) -> ValueAndGrad:
        """Return the function that computes a loss and the gradient from the parts of a device."""

        def loss_of_parts(params: PyTree, extra: PyTree, *rest: PyTree) -> tuple[Array, PyTree]:
            return loss(*jax.tree.map(_gather, (params, extra), self.specs), *rest)

        policy = functools.partial(_is_stored, self.sizes)
        return jax.value_and_grad(jax.checkpoint(loss_of_parts, policy=policy), has_aux=True)

    def mean(self, tree: PyTree) -> PyTree:
        """Return the mean over devices of each array of a tree."""
        return jax.lax.pmean(tree, self.mesh.axis_names)

    def mean_gradient(self, gradient: PyTree) -> PyTree:
        """Return the mean over devices of a gradient.

        `value_and_grad` has already summed it over the mesh axes that partition each array.
        """

        def mean(array: Array, spec: PartitionSpec) -> Array:
            summed = jax.tree.leaves(tuple(spec))
            remaining = tuple(name for name in self.mesh.axis_names if name not in summed)
            total: Array = jax.lax.psum(array, remaining)
            return total / self.mesh.size

        return jax.tree.map(mean, gradient, self.specs[0])

    def all_gather(self, tree: PyTree) -> PyTree:
        """Return the arrays of all devices, concatenated along the first axis."""
        return _all_gather(tree, self.mesh.axis_names)


def _all_gather(tree: PyTree, names: str | tuple[str, ...], axis: int = 0) -> PyTree:
    return jax.tree.map(lambda a: jax.lax.all_gather(a, names, axis=axis, tiled=True), tree)


def _gather(array: Array, spec: PartitionSpec) -> Array:
    """Return the full array, given the part of this device and the partition `spec`."""
    for axis, names in enumerate(spec):
        array = _all_gather(array, names, axis) if names else array
    return array


def _is_stored(
    sizes: frozenset[int], primitive: Primitive, /, *inputs: PyTree, **parameters: object
) -> bool:
    """Return whether the result of the operation `primitive` is stored for the backward pass.

    A gathered parameter is not stored, nor is the result of a cast, reshape or transposition of a
    gathered parameter.  An input with a number of elements in `sizes` is regarded as a parameter.
    """
    if primitive.name in ("convert_element_type", "reshape", "transpose"):
        return bool(inputs[0].size not in sizes)
    return bool(primitive.name != "all_gather")
