"""The interface of partitioners, which partition arrays and training steps across devices.

A training step is a pure function step(state, batch, ..., collectives=) -> (state, metrics).  A
row of a batch is one example.  The rows are partitioned across the devices in the order of the
processes, so each process reads one contiguous range of rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from ddpm_jax.parallel.collectives import Collectives
from ddpm_jax.parallel.flops import flops

P = ParamSpec("P")
T = TypeVar("T")


@runtime_checkable
class Step(Protocol):
    """A training step that can be partitioned across devices."""

    def __call__(
        self, state: PyTree, batch: PyTree, *rest: PyTree, collectives: Collectives
    ) -> tuple[PyTree, PyTree]:
        """Return (next state, metrics)."""


@runtime_checkable
class Program(Protocol):
    """A compiled training step; it donates `state`, which must not be used afterwards."""

    def __call__(self, state: PyTree, batch: PyTree, *rest: PyTree) -> tuple[PyTree, PyTree]:
        """Return (next state, metrics)."""


class Lowered(NamedTuple):
    """A training step that is lowered (`jax.stages.Lowered`), but not yet compiled.

    Attributes:
      compile: Function that returns the compiled training step.
      flops: Floating-point operations of one training step on one device; 0 if unknown.
    """

    compile: Callable[[], Program]
    flops: float

    def __call__(self) -> Program:
        """Return the compiled training step."""
        return self.compile()


@runtime_checkable
class Partitioner(Protocol):
    """A set of devices, and the way in which arrays and training steps are partitioned across it.

    Attributes:
      mesh: The mesh of devices, in the order of their processes.
    """

    mesh: Mesh

    @property
    def devices(self) -> int:
        """The number of devices."""
        return int(self.mesh.size)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding with which every device has the full array."""
        return NamedSharding(self.mesh, PartitionSpec())

    def shardings(self, tree: PyTree) -> PyTree:
        """Return a tree of the shardings (`NamedSharding`) of the arrays of a state."""
        return jax.tree.map(lambda _: self.replicated, tree)

    def place(self, tree: PyTree) -> PyTree:
        """Return a copy of a state on the devices, with the shardings of `shardings`."""
        return jax.device_put(tree, self.shardings(tree))

    def abstract_state(self, tree: PyTree) -> PyTree:
        """Return a tree of `jax.ShapeDtypeStruct` with shardings, for restoring a checkpoint."""
        return jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            tree,
            self.shardings(tree),
        )

    def rows(self, size: int) -> slice:
        """Return the slice of a global batch of `size` examples that this process reads."""
        processes = [device.process_index for device in self.mesh.devices.flat]
        local = [i for i, process in enumerate(processes) if process == jax.process_index()]
        return slice(local[0] * size // self.devices, (local[-1] + 1) * size // self.devices)

    def shard(self, tree: PyTree, axis: int = 0) -> PyTree:
        """Return the global batch, partitioned along `axis`, given this process's rows of it."""
        sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, self.mesh.axis_names))
        return jax.tree.map(lambda array: put(np.asarray(array), sharding), tree)

    def feed(self, tree: PyTree, axis: int = 0) -> PyTree:
        """Return the global batch in the form of the step's argument, given this process's rows."""
        return self.shard(tree, axis)

    def lower(self, step: Step, state: PyTree, batch: PyTree, *rest: PyTree) -> Lowered:
        """Return step(state, batch, *rest, collectives=...), lowered; it donates `state`."""
        ...

    def warning(self) -> str:
        """Return a warning if this jaxlib makes training slower, otherwise an empty string."""
        return ""

    def compile(
        self, fn: Callable[P, T], static_argnums: int | tuple[int, ...] = ()
    ) -> Callable[P, T]:
        """Return `jax.jit(fn)` with results that are replicated on every device.

        Several calls with the same `fn` and `static_argnums` (positions of static arguments) return
        the same object, so that `fn` is compiled only once for the same shapes.
        """
        return cast(Callable[P, T], compiled(self.replicated, fn, static_argnums))

    def round_up(self, batch_size: int) -> int:
        """Return the smallest multiple of the number of devices that is at least `batch_size`."""
        return -(-batch_size // self.devices) * self.devices

    def indices(self, start: int, size: int) -> Int[Array, "size"]:
        """Return the array [start, ..., start + size - 1], partitioned across devices."""
        numbers = np.arange(start, start + size, dtype=np.int32)
        return cast(Array, self.shard(numbers[self.rows(size)]))


def lower_global(
    partitioner: Partitioner,
    collectives: Collectives,
    step: Step,
    state: PyTree,
    batch: PyTree,
    *rest: PyTree,
    options: dict[str, str | bool] | None = None,
) -> Lowered:
    """Lower a training step that computes with global arrays.

    Args:
      partitioner: Partitioner with the method `shardings` for the next state.
      collectives: Collectives that are passed to `step`.
      step: The training step; the compiled program donates the memory of the state.
      state: State, as arrays or as shapes with shardings.
      batch: Global batch, as arrays or as shapes with shardings.
      *rest: Further arguments of the step.
      options: Options of XLA's compiler. If None, the defaults.
    """
    traced = jax.jit(
        functools.partial(step, collectives=collectives),
        donate_argnums=0,
        out_shardings=(partitioner.shardings(state), partitioner.replicated),
    ).trace(state, batch, *rest)
    compile = functools.partial(traced.lower().compile, options)
    return Lowered(compile, flops(traced.jaxpr) / partitioner.devices)


def on_cpu(mesh: Mesh) -> bool:
    """Return whether the devices of `mesh` are CPUs."""
    return bool(mesh.devices.flat[0].platform == "cpu")


@functools.lru_cache(maxsize=128)
def compiled(
    sharding: NamedSharding, fn: Callable[..., Any], static_argnums: int | tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Return `jax.jit(fn)` with the output sharding `sharding`, cached for equal arguments.

    Without this, the sharding that jax infers may not divide the shape of an output.
    """
    return jax.jit(fn, static_argnums=static_argnums, out_shardings=sharding)


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Return the global array with `sharding`, given this process's rows of it."""
    if jax.process_count() == 1:
        return cast(jax.Array, jax.device_put(array, sharding))
    return cast(jax.Array, jax.make_array_from_process_local_data(sharding, array))


def fetch(tree: PyTree) -> PyTree:
    """Return the global arrays of a tree as numpy arrays; all processes must call this together."""
    return jax.tree.map(_fetch, tree)


def _fetch(array: PyTree) -> np.ndarray:
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = replicate(array)
    return np.asarray(array)


def replicate(array: jax.Array) -> jax.Array:
    """Return a copy of a global array that is replicated on every device of the mesh."""
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding)
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    return cast(jax.Array, compiled(replicated, _identity)(array))


def _identity(tree: PyTree) -> PyTree:
    return tree
