"""Collective operations of a training step, for each way of parallelism.

A step is written for one device: it computes with the device's part of the batch, and communicates
with the other devices through `Collectives`.  Under `jit` a step computes with global arrays; the
collectives do nothing, and XLA inserts the communication.
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
    """A loss as a function of parameters, extra variables, a batch and keys."""

    def __call__(
        self, params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[Array, PyTree]:
        """Return the mean loss of a batch, and auxiliary results."""


@runtime_checkable
class ValueAndGrad(Protocol):
    """The function that `jax.value_and_grad(loss, has_aux=True)` returns."""

    def __call__(
        self, params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[tuple[Array, PyTree], PyTree]:
        """Return ((mean loss, auxiliary results), gradient)."""


@runtime_checkable
class Compute(Protocol):
    """A function that computes the gradient of a batch, from the arrays of one device."""

    def __call__(
        self, collectives: "Collectives", params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Return (gradient, means, examples), each the same on all devices.

        `means` are means over the global batch; `examples` are arrays whose first axis is the
        examples of the global batch.
        """


@runtime_checkable
class Collectives(Protocol):
    """Communication of one step between devices; the default methods do not communicate."""

    def value_and_grad(self, loss: Loss) -> ValueAndGrad:
        """Return the function that computes a loss and its gradient by the first argument."""
        return jax.value_and_grad(loss, has_aux=True)

    def mean(self, tree: PyTree) -> PyTree:
        """Return the mean over devices."""
        return tree

    def mean_gradient(self, gradient: PyTree) -> PyTree:
        """Return the mean over devices of a gradient that `value_and_grad` computed."""
        return self.mean(gradient)

    def all_gather(self, tree: PyTree) -> PyTree:
        """Concatenate the devices' parts along the first axis."""
        return tree

    def per_device(
        self, compute: Compute, params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Return `compute(collectives, params, extra, batch, keys)`, computed on each device.

        Args:
          compute: Function that computes the gradient of a batch.
          params: Parameters.
          extra: Extra variables.
          batch: Arrays whose first axis is the examples.
          keys: One key for each example.
        """
        return compute(self, params, extra, batch, keys)


@dataclasses.dataclass(frozen=True)
class GlobalCollectives(Collectives):
    """Collectives of `jit`, in which the step computes with global arrays."""


@dataclasses.dataclass(frozen=True)
class DeviceCollectives(Collectives):
    """Collectives of `pmap`, in which the step is called for each device, with the whole state.

    Attributes:
      axis: Name of the axis of devices.
    """

    axis: str

    def mean(self, tree: PyTree) -> PyTree:
        """Return the mean over devices."""
        return jax.lax.pmean(tree, self.axis)

    def all_gather(self, tree: PyTree) -> PyTree:
        """Concatenate the devices' parts along the first axis."""
        return _all_gather(tree, self.axis)


@runtime_checkable
class Split(Protocol):
    """A function that partitions arrays across the axes of a mesh."""

    def __call__(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Return the partition of an array of a shape."""


@dataclasses.dataclass(frozen=True)
class ShardedCollectives(Collectives):
    """Collectives of `fsdp`, in which arrays of the state are partitioned across devices.

    The step computes with global arrays, except for the loss and its gradient, which are computed
    on each device (`per_device`).

    Attributes:
      mesh: The devices.
      split: Function that partitions an array of the state.
    """

    mesh: Mesh
    split: Split

    def per_device(
        self, compute: Compute, params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Return `compute(collectives, ...)`, computed on each device.

        Args:
          compute: The function `(collectives, params, extra, batch, keys)` of one device.
          params: The parameters, sharded.
          extra: The extra variables, sharded.
          batch: The global batch.
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
    """Collectives of one device that holds a part of each array of the state.

    Each parameter is gathered where it is used, in the forward and again in the backward pass, and
    is not stored in between; its gradient is summed and scattered in one operation.

    Attributes:
      mesh: The devices.
      specs: The partitions of the arrays of (params, extra).
      sizes: The sizes (numbers of elements) of the parameters when gathered.
    """

    mesh: Mesh
    specs: tuple[PyTree, PyTree]
    sizes: frozenset[int]

    def value_and_grad(self, loss: Loss) -> ValueAndGrad:
        """Return the function that computes a loss and its gradient, given one device's parts."""

        def loss_of_parts(params: PyTree, extra: PyTree, *rest: PyTree) -> tuple[Array, PyTree]:
            return loss(*jax.tree.map(_gather, (params, extra), self.specs), *rest)

        policy = functools.partial(_is_stored, self.sizes)
        return jax.value_and_grad(jax.checkpoint(loss_of_parts, policy=policy), has_aux=True)

    def mean(self, tree: PyTree) -> PyTree:
        """Return the mean over devices."""
        return jax.lax.pmean(tree, self.mesh.axis_names)

    def mean_gradient(self, gradient: PyTree) -> PyTree:
        """Return the mean over devices, given sums over the mesh axes of each array's partition."""

        def mean(array: Array, spec: PartitionSpec) -> Array:
            summed = jax.tree.leaves(tuple(spec))
            remaining = tuple(name for name in self.mesh.axis_names if name not in summed)
            total: Array = jax.lax.psum(array, remaining)
            return total / self.mesh.size

        return jax.tree.map(mean, gradient, self.specs[0])

    def all_gather(self, tree: PyTree) -> PyTree:
        """Concatenate the devices' parts along the first axis."""
        return _all_gather(tree, self.mesh.axis_names)


def _all_gather(tree: PyTree, names: str | tuple[str, ...], axis: int = 0) -> PyTree:
    return jax.tree.map(lambda a: jax.lax.all_gather(a, names, axis=axis, tiled=True), tree)


def _gather(array: Array, spec: PartitionSpec) -> Array:
    """Return the whole array, of which each device holds a part."""
    for axis, names in enumerate(spec):
        array = _all_gather(array, names, axis) if names else array
    return array


def _is_stored(
    sizes: frozenset[int], primitive: Primitive, /, *inputs: PyTree, **parameters: object
) -> bool:
    """Return whether a result is stored for the backward pass; gathered parameters are not.

    A gathered parameter may be cast or reshaped; it is recognised by its size, one of `sizes`.
    """
    if primitive.name in ("convert_element_type", "reshape", "transpose"):
        return bool(inputs[0].size not in sizes)
    return bool(primitive.name != "all_gather")
