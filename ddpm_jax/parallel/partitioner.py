"""The interface of partitioners, which partition arrays and training steps across devices.

A step is a pure function step(state, batch, ..., collectives=) -> (state, metrics).  The rows of a
batch are partitioned across the devices in the order of the processes, so each process reads one
contiguous range of rows.
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
    """A step that can be partitioned across devices."""

    def __call__(
        self, state: PyTree, batch: PyTree, *rest: PyTree, collectives: Collectives
    ) -> tuple[PyTree, PyTree]:
        """Return the next state and metrics."""


@runtime_checkable
class Program(Protocol):
    """A compiled step; it donates the memory of the state."""

    def __call__(self, state: PyTree, batch: PyTree, *rest: PyTree) -> tuple[PyTree, PyTree]:
        """Return the next state and metrics."""


class Lowered(NamedTuple):
    """A step before it is compiled.

    Attributes:
      compile: Function that compiles the step.
      flops: Floating-point operations of one step on one device; 0: unknown.
    """

    compile: Callable[[], Program]
    flops: float

    def __call__(self) -> Program:
        """Compile the step."""
        return self.compile()


@runtime_checkable
class Partitioner(Protocol):
    """The devices, and the partition of arrays and steps across them.

    Attributes:
      mesh: The devices, in the order of their processes.
    """

    mesh: Mesh

    @property
    def devices(self) -> int:
        """The number of devices."""
        return int(self.mesh.size)

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that is replicated on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def shardings(self, tree: PyTree) -> PyTree:
        """Return the sharding of each array of a state."""
        return jax.tree.map(lambda _: self.replicated, tree)

    def place(self, tree: PyTree) -> PyTree:
        """Put a state on the devices."""
        return jax.device_put(tree, self.shardings(tree))

    def abstract_state(self, tree: PyTree) -> PyTree:
        """Return the shapes, types and shardings of a state, for restoring a checkpoint."""
        return jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            tree,
            self.shardings(tree),
        )

    def rows(self, size: int) -> slice:
        """Return the rows of a global batch of `size` examples that this process reads."""
        processes = [device.process_index for device in self.mesh.devices.flat]
        local = [i for i, process in enumerate(processes) if process == jax.process_index()]
        return slice(local[0] * size // self.devices, (local[-1] + 1) * size // self.devices)

    def shard(self, tree: PyTree, axis: int = 0) -> PyTree:
        """Put this process's rows of a batch on the devices, partitioned along `axis`."""
        sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, self.mesh.axis_names))
        return jax.tree.map(lambda array: put(np.asarray(array), sharding), tree)

    def feed(self, tree: PyTree, axis: int = 0) -> PyTree:
        """Put this process's rows of a batch on the devices, in the form that the step takes."""
        return self.shard(tree, axis)

    def lower(self, step: Step, state: PyTree, batch: PyTree, *rest: PyTree) -> Lowered:
        """Lower step(state, batch, *rest, collectives=...), with `state` donated."""
        ...

    def warning(self) -> str:
        """Return a warning if this version of jaxlib makes steps slow or large; "": no warning."""
        return ""

    def compile(
        self, fn: Callable[P, T], static_argnums: int | tuple[int, ...] = ()
    ) -> Callable[P, T]:
        """Return a compiled version of `fn`, whose results are replicated on every device.

        It is compiled once for each set of static arguments (at the positions `static_argnums`)
        and of shapes, also if several callers compile it.
        """
        return cast(Callable[P, T], compiled(self.replicated, fn, static_argnums))

    def round_up(self, batch_size: int) -> int:
        """Return the smallest multiple of the number of devices that is at least `batch_size`."""
        return -(-batch_size // self.devices) * self.devices

    def indices(self, start: int, size: int) -> Int[Array, "size"]:
        """Return the integers start ... start + size - 1, partitioned like a batch."""
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
    """Lower a step that computes with global arrays.

    Args:
      partitioner: Partitioner that gives the shardings of the next state.
      collectives: Collectives that the step is called with.
      step: The step; the memory of its state is donated.
      state: State, as arrays or as shapes with shardings.
      batch: Global batch, as arrays or as shapes with shardings.
      *rest: Further arguments of the step.
      options: Options of XLA's compiler; None: the defaults.
    """
    traced = jax.jit(
        functools.partial(step, collectives=collectives),
        donate_argnums=0,
        out_shardings=(partitioner.shardings(state), partitioner.replicated),
    ).trace(state, batch, *rest)
    compile = functools.partial(traced.lower().compile, options)
    return Lowered(compile, flops(traced.jaxpr) / partitioner.devices)


def on_cpu(mesh: Mesh) -> bool:
    """Return whether the devices are CPUs."""
    return bool(mesh.devices.flat[0].platform == "cpu")


@functools.lru_cache(maxsize=128)
def compiled(
    sharding: NamedSharding, fn: Callable[..., Any], static_argnums: int | tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Return the jitted `fn`; calls with equal arguments return the same object.

    The sharding of the outputs is stated, because one that jax infers may not divide their shapes.
    """
    return jax.jit(fn, static_argnums=static_argnums, out_shardings=sharding)


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Put this process's rows of an array on the devices."""
    if jax.process_count() == 1:
        return cast(jax.Array, jax.device_put(array, sharding))
    return cast(jax.Array, jax.make_array_from_process_local_data(sharding, array))


def fetch(tree: PyTree) -> PyTree:
    """Return the arrays as global numpy arrays; all processes must call it together."""
    return jax.tree.map(_fetch, tree)


def _fetch(array: PyTree) -> np.ndarray:
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = replicate(array)
    return np.asarray(array)


def replicate(array: jax.Array) -> jax.Array:
    """Return an array replicated on every device of its mesh."""
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding)
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    return cast(jax.Array, compiled(replicated, _identity)(array))


def _identity(tree: PyTree) -> PyTree:
    return tree
