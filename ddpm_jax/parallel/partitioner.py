"""How arrays are placed on devices and a step is spread over them: the contract.

A step is a pure function step(state, batch, ..., collectives=) -> (state, metrics).  A batch's rows
lie on the devices in the order of the processes, so each process reads one run of rows and no
other.
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
    """A step that can be spread over devices."""

    def __call__(
        self, state: PyTree, batch: PyTree, *rest: PyTree, collectives: Collectives
    ) -> tuple[PyTree, PyTree]:
        """Return the next state, and metrics."""


@runtime_checkable
class Program(Protocol):
    """A compiled step; it donates the state."""

    def __call__(self, state: PyTree, batch: PyTree, *rest: PyTree) -> tuple[PyTree, PyTree]:
        """Return the next state, and metrics."""


class Lowered(NamedTuple):
    """A step before it is compiled.

    Attributes:
      compile: Compiles it.
      flops: Operations of one step on one device; 0: unknown.
    """

    compile: Callable[[], Program]
    flops: float

    def __call__(self) -> Program:
        """Compile the step."""
        return self.compile()


@runtime_checkable
class Partitioner(Protocol):
    """The devices, how arrays are placed on them, and how a step is spread over them.

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
        """Where an array lies of which every device holds the whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def shardings(self, tree: PyTree) -> PyTree:
        """Return where each array of a state lies."""
        return jax.tree.map(lambda _: self.replicated, tree)

    def place(self, tree: PyTree) -> PyTree:
        """Put a state on the devices."""
        return jax.device_put(tree, self.shardings(tree))

    def like(self, tree: PyTree) -> PyTree:
        """Return a state's shapes with the placement, for restoring."""
        return jax.tree.map(
            lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
            tree,
            self.shardings(tree),
        )

    def rows(self, size: int) -> slice:
        """Return the rows that this process reads, of a batch of `size` on all devices."""
        processes = [device.process_index for device in self.mesh.devices.flat]
        mine = [i for i, process in enumerate(processes) if process == jax.process_index()]
        return slice(mine[0] * size // self.devices, (mine[-1] + 1) * size // self.devices)

    def shard(self, tree: PyTree, axis: int = 0) -> PyTree:
        """Put this process's rows of a batch, which lie along `axis`, on the devices."""
        where = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, self.mesh.axis_names))
        return jax.tree.map(lambda array: put(np.asarray(array), where), tree)

    def feed(self, tree: PyTree, axis: int = 0) -> PyTree:
        """Put this process's rows of a batch on the devices as the step takes them."""
        return self.shard(tree, axis)

    def lower(self, step: Step, state: PyTree, batch: PyTree, *rest: PyTree) -> Lowered:
        """Lower step(state, batch, *rest, collectives=...), which donates `state`."""
        ...

    def warning(self) -> str:
        """Return what a step lacks in this version of jaxlib; "": nothing."""
        return ""

    def compile(
        self, fn: Callable[P, T], static_argnums: int | tuple[int, ...] = ()
    ) -> Callable[P, T]:
        """Return `fn` compiled; all that it returns lies whole on every device.

        It is compiled once for its static arguments and the others' shapes, whatever calls it
        again.
        """
        return cast(Callable[P, T], compiled(self.replicated, fn, static_argnums))

    def round_up(self, batch_size: int) -> int:
        """Return the next batch size that the devices divide, for batches that are padded."""
        return -(-batch_size // self.devices) * self.devices

    def indices(self, start: int, size: int) -> Int[Array, "size"]:
        """Return start ... start + size - 1, spread as a batch is."""
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
    """Lower a step in a global view of its arrays.

    Args:
      partitioner: says where the next state lies.
      collectives: what the step is given.
      step: it donates its state.
      state: or its shapes, as the following.
      batch: on all devices.
      *rest: further arguments.
      options: of XLA's compiler.
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
    where: NamedSharding, fn: Callable[..., Any], static_argnums: int | tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Compile `fn`; jax infers no output's placement, which the devices may not divide."""
    return jax.jit(fn, static_argnums=static_argnums, out_shardings=where)


def put(array: np.ndarray, where: NamedSharding) -> jax.Array:
    """Put this process's rows of an array on the devices."""
    if jax.process_count() == 1:
        return cast(jax.Array, jax.device_put(array, where))
    return cast(jax.Array, jax.make_array_from_process_local_data(where, array))


def fetch(tree: PyTree) -> PyTree:
    """Return numpy arrays of what may lie on devices of other processes; all of them call it."""
    return jax.tree.map(_fetch, tree)


def _fetch(array: PyTree) -> np.ndarray:
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = replicate(array)
    return np.asarray(array)


def replicate(array: jax.Array) -> jax.Array:
    """Return a sharded array whole on every device of its mesh."""
    where = array.sharding
    assert isinstance(where, NamedSharding)
    whole = NamedSharding(where.mesh, PartitionSpec())
    return cast(jax.Array, compiled(whole, _identity)(array))


def _identity(tree: PyTree) -> PyTree:
    return tree
