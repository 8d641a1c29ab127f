"""What one step asks of the devices that it is spread over.

A step is written in the view of one device: its part of the batch, and collectives that communicate
with the others.  In a global view there is nothing to communicate, as XLA inserts it.
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
    """loss(params, extra, batch, keys) -> (mean loss, auxiliary results)."""

    def __call__(
        self, params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[Array, PyTree]:
        """Return the mean loss of a batch, and what is computed beside it."""


@runtime_checkable
class ValueAndGrad(Protocol):
    """The function that `jax.value_and_grad(loss, has_aux=True)` returns."""

    def __call__(
        self, params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[tuple[Array, PyTree], PyTree]:
        """Return ((mean loss, auxiliary results), gradient)."""


@runtime_checkable
class Compute(Protocol):
    """The gradient of a batch, computed in the view of one device."""

    def __call__(
        self, collectives: "Collectives", params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Return (gradient, means, examples), each the same on all devices.

        `means` are of the whole batch; the arrays of `examples` have its examples as first axis.
        """


@runtime_checkable
class Collectives(Protocol):
    """Communication of one step between devices; by default there is none."""

    def value_and_grad(self, loss: Loss) -> ValueAndGrad:
        """Differentiate a loss by its first argument."""
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
        """Call `compute(collectives, params, extra, batch, keys)` in the view of one device.

        Args:
          compute: the gradient of a batch.
          params, extra: parameters and extra variables.
          batch: arrays with the examples as first axis.
          keys: one for every example.
        """
        return compute(self, params, extra, batch, keys)


@dataclasses.dataclass(frozen=True)
class GlobalCollectives(Collectives):
    """The step sees whole arrays, on one device or on many: `jit`."""


@dataclasses.dataclass(frozen=True)
class DeviceCollectives(Collectives):
    """The step is called once for each device, with a whole state: `pmap`.

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
    """How an array of a shape is split over the axes of a mesh."""

    def __call__(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Return the partition of an array."""


@dataclasses.dataclass(frozen=True)
class ShardedCollectives(Collectives):
    """The step sees whole arrays, of which each device holds a part: `fsdp`.

    The loss and its gradient are computed in the view of one device.

    Attributes:
      mesh: The devices.
      split: How an array of the state is split.
    """

    mesh: Mesh
    split: Split

    def per_device(
        self, compute: Compute, params: PyTree, extra: PyTree, batch: PyTree, keys: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Call `compute(collectives, params, extra, batch, keys)` in the view of one device.

        Args:
          compute, params, extra, batch, keys: see `Collectives.per_device`.
        """
        specs = jax.tree.map(lambda array: self.split(array.shape), (params, extra))
        sizes = frozenset(array.size for array in jax.tree.leaves(params))
        examples, whole = PartitionSpec(self.mesh.axis_names), PartitionSpec()
        results: tuple[PyTree, PyTree, PyTree] = jax.shard_map(
            functools.partial(compute, ShardCollectives(self.mesh, specs, sizes)),
            mesh=self.mesh,
            in_specs=(*specs, examples, examples),
            out_specs=(specs[0], whole, whole),
            check_vma=False,
        )(params, extra, batch, keys)
        return results


@dataclasses.dataclass(frozen=True)
class ShardCollectives(Collectives):
    """One device's view of a sharded state.

    Each parameter is gathered where it is used, and again for the backward pass, never kept; its
    gradient is summed and scattered at once.

    Attributes:
      mesh: The devices.
      specs: How the arrays of (params, extra) are split.
      sizes: The parameters' sizes before they were split.
    """

    mesh: Mesh
    specs: tuple[PyTree, PyTree]
    sizes: frozenset[int]

    def value_and_grad(self, loss: Loss) -> ValueAndGrad:
        """Differentiate a loss by its first argument, given the devices' parts."""

        def of_parts(params: PyTree, extra: PyTree, *rest: PyTree) -> tuple[Array, PyTree]:
            return loss(*jax.tree.map(_gather, (params, extra), self.specs), *rest)

        policy = functools.partial(_is_kept, self.sizes)
        return jax.value_and_grad(jax.checkpoint(of_parts, policy=policy), has_aux=True)

    def mean(self, tree: PyTree) -> PyTree:
        """Return the mean over devices."""
        return jax.lax.pmean(tree, self.mesh.axis_names)

    def mean_gradient(self, gradient: PyTree) -> PyTree:
        """Return the mean over devices, given sums over the axes that an array is split over."""

        def mean(array: Array, spec: PartitionSpec) -> Array:
            summed = jax.tree.leaves(tuple(spec))
            left = tuple(name for name in self.mesh.axis_names if name not in summed)
            total: Array = jax.lax.psum(array, left)
            return total / self.mesh.size

        return jax.tree.map(mean, gradient, self.specs[0])

    def all_gather(self, tree: PyTree) -> PyTree:
        """Concatenate the devices' parts along the first axis."""
        return _all_gather(tree, self.mesh.axis_names)


def _all_gather(tree: PyTree, names: str | tuple[str, ...], axis: int = 0) -> PyTree:
    return jax.tree.map(lambda a: jax.lax.all_gather(a, names, axis=axis, tiled=True), tree)


def _gather(array: Array, spec: PartitionSpec) -> Array:
    """Gather an array of which a device holds a part."""
    for axis, names in enumerate(spec):
        array = _all_gather(array, names, axis) if names else array
    return array


def _is_kept(
    sizes: frozenset[int], primitive: Primitive, /, *inputs: PyTree, **parameters: object
) -> bool:
    """Return whether a result is kept for the backward pass: not a gathered parameter.

    It may be of another type or shape than the parameter, whose size is among `sizes`.
    """
    if primitive.name in ("convert_element_type", "reshape", "transpose"):
        return bool(inputs[0].size not in sizes)
    return bool(primitive.name != "all_gather")
