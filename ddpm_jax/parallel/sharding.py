"""How arrays are placed and a step is spread over devices and processes.

A step is a pure function of a state and a batch that asks three things of whoever spreads it:
`reduce`, the mean over devices; `gather`, the devices' parts put together; `view`, how the loss
and its gradient are computed where the state is sharded.

`jit`: a global view.  Batches are sharded, the state is replicated, XLA inserts what is sent.
`pmap`: a view of one device; `reduce` is `pmean`, `gather` an all-gather.
`fsdp`: every array of the state sharded, as ZeRO's third stage keeps it (Rajbhandari et al. 2020).
    The loss is in the view of one device, to which each parameter is put together where it is
    used, and again for the backward pass, never kept; its gradient is summed and split at once.
    The optimizer has a global view of the parts.

A batch's rows lie on the devices in the order of the processes, so each process reads one run
of rows and no other.
"""

import functools
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddpm_jax.errors import UserError
from ddpm_jax.parallel.flops import flops

MODES = ("jit", "pmap", "fsdp")

AXIS = "data"  # of `pmap`
# Without these, XLA for CPUs gathers a sharded state as early as it can, and takes what is
# gathered again for what it has already: a device would hold the whole after all.
FRUGAL: dict[str, str | bool] = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "cse_barrier_expander",
}

FRUGAL_VERSIONS = ("0.10.2",)


def identity(tree: Any) -> Any:
    """What `reduce`, `gather` and `view` are where there is nothing to do."""
    return tree


class Lowered(NamedTuple):
    """A step before it is compiled, which calling it does.

    compile() -> the step
    flops: of one step, on one device; 0: unknown
    """

    compile: Callable[[], Callable]
    flops: float

    def __call__(self) -> Callable:
        return self.compile()


class Parallel(NamedTuple):
    """How arrays are placed and a step is spread.

    devices: how many.
    place: a state's arrays -> the devices.
    like: a state's shapes -> the same with the placement, for restoring.
    shardings: a state's shapes -> where each of its arrays lies.
    rows(size): of a batch of `size` examples on all devices, those that this process reads.
    shard(batch, axis=0): those rows of a batch's arrays -> arrays of the whole batch, which lies
        along `axis`, on the devices.
    feed: as `shard`, for the step.
    lower(step, *arguments): lowers step(state, batch, ...) -> (state, metrics), which is given
        `reduce`, `gather` and `view` by name; `state` is donated.
    compile(fn, static_argnums=()): `fn`, compiled once for its static arguments and the others'
        shapes, whatever calls it again; all that it returns lies whole on every device.
    breathe(): called between the batches of an evaluation; may break it off, in all processes.
    """

    devices: int
    place: Callable[[Any], Any]
    like: Callable[[Any], Any]
    shardings: Callable[[Any], Any]
    rows: Callable[[int], slice]
    shard: Callable[..., Any]
    feed: Callable[..., Any]
    lower: Callable[..., Lowered]
    compile: Callable[..., Callable]
    breathe: Callable[[], None] = lambda: None

    def round_up(self, batch_size: int) -> int:
        """The next batch size that the devices divide, for batches that are filled up anyway."""
        return -(-batch_size // self.devices) * self.devices

    def indices(self, start: int, size: int) -> jax.Array:
        """start ... start + size - 1, spread as a batch is."""
        return self.shard(np.arange(start, start + size, dtype=np.int32)[self.rows(size)])


def make(mode: str = "jit", devices: list[jax.Device] | None = None) -> Parallel:
    """`devices`, all that there are unless given, in `mode`.

    Raises:
      UserError: there is no such mode.
    """
    if mode not in MODES:
        raise UserError(f"--parallel={mode}: there are {', '.join(MODES)}")
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    count = len(devices)
    # `fsdp`: one axis for each prime factor, so that an array is sharded over as many devices as
    # some split of its axes allows; a batch lies along all of them.  Else one axis, that of pmap,
    # for a program wants all that it is given on one mesh.
    factors: tuple[int, ...] = (count,)
    axes: tuple[str, ...] = (AXIS,)
    if mode == "fsdp":
        factors = prime_factors(count)
        axes = tuple(f"{AXIS}_{number}" for number in range(len(factors)))
    mesh = Mesh(np.reshape(devices, factors), axes, axis_types=(AxisType.Auto,) * len(axes))
    replicated = NamedSharding(mesh, PartitionSpec())

    def shardings(tree: Any) -> Any:
        if mode != "fsdp":
            return jax.tree.map(lambda _: replicated, tree)
        return jax.tree.map(lambda a: NamedSharding(mesh, split(a.shape, factors, axes)), tree)

    def place(tree: Any) -> Any:
        return jax.device_put(tree, shardings(tree))

    def like(tree: Any) -> Any:
        return jax.tree.map(
            lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
            tree,
            shardings(tree),
        )

    def rows(size: int) -> slice:
        own = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
        return slice(own[0] * size // count, (own[-1] + 1) * size // count)

    def shard(tree: Any, axis: int = 0) -> Any:
        where = NamedSharding(mesh, PartitionSpec(*[None] * axis, axes))
        return jax.tree.map(lambda array: _put(np.asarray(array), where), tree)

    def lower(step: Callable, *arguments: Any) -> Lowered:
        def spread(state, *rest):
            return step(state, *rest, reduce=identity, gather=gather, view=view)

        out = (shardings(arguments[0]), replicated)
        traced = jax.jit(spread, donate_argnums=0, out_shardings=out).trace(*arguments)
        lowered = traced.lower()
        on_cpu = mode == "fsdp" and devices[0].platform == "cpu"
        known = importlib.metadata.version("jaxlib") in FRUGAL_VERSIONS
        compiled = functools.partial(lowered.compile, FRUGAL if on_cpu and known else None)
        return Lowered(compiled, flops(traced.jaxpr) / count)

    gather, view = _sharded(mesh, shardings) if mode == "fsdp" else (identity, identity)
    if mode == "pmap":
        feed, lower = _mapped(mesh, replicated)
    else:
        feed = shard
    compile = functools.partial(_compiled, replicated)
    return Parallel(count, place, like, shardings, rows, shard, feed, lower, compile)


def placed(tree: Any) -> Parallel:
    """The devices on which the arrays of a tree lie, in mode `jit`; the first where it has none."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return make(devices=list(arrays[0].sharding.device_set) if arrays else jax.devices()[:1])


@functools.lru_cache(maxsize=128)
def _compiled(
    where: NamedSharding, fn: Callable, static_argnums: int | tuple[int, ...] = ()
) -> Callable:
    """`Parallel.compile`: jax infers no output's placement, which the devices may not divide."""
    return jax.jit(fn, static_argnums=static_argnums, out_shardings=where)


def prime_factors(number: int) -> tuple[int, ...]:
    """Largest first; (1,) of 1."""
    found, factor = [], 2
    while number > 1:
        if number % factor:
            factor += 1
        else:
            found.append(factor)
            number //= factor
    return tuple(reversed(found)) or (1,)


def split(shape: tuple[int, ...], factors: tuple[int, ...], axes: tuple[str, ...]) -> PartitionSpec:
    """Which axes of the mesh, of sizes `factors`, divide which axis of an array.

    All of them one axis, the longest that they divide, so that what is sent is sent at once; else
    each the longest part that it divides, and nothing if it divides none.
    """
    left: list[int] = list(shape)
    given: list[tuple[str, ...]] = [()] * len(shape)
    whole = [i for i, size in enumerate(shape) if size % math.prod(factors) == 0]
    if whole:
        given[max(whole, key=lambda i: shape[i])] = axes
        return PartitionSpec(*(names or None for names in given))
    for factor, axis in zip(factors, axes, strict=True):
        fitting = [i for i, size in enumerate(left) if size % factor == 0]
        if fitting:
            longest = max(fitting, key=lambda i: left[i])
            left[longest] //= factor
            given[longest] += (axis,)
    return PartitionSpec(*(names or None for names in given))


def _mapped(line: Mesh, replicated: NamedSharding) -> tuple[Callable, Callable]:
    """`feed` and `lower` of `pmap`, whose batches have the devices as their first axis."""
    count = line.size

    def feed(tree: Any, axis: int = 0) -> Any:
        def put(array):
            array = np.asarray(array)
            here = len(line.local_devices)
            parts = array.reshape(*array.shape[:axis], here, -1, *array.shape[axis + 1 :])
            return _put(np.moveaxis(parts, axis, 0), NamedSharding(line, PartitionSpec(AXIS)))

        return jax.tree.map(put, tree)

    def lower(step: Callable, *arguments: Any) -> Lowered:
        def spread(state, *rest):
            def gather(tree):
                return _all_gather(tree, AXIS)

            def reduce(tree):
                return jax.lax.pmean(tree, AXIS)

            return step(state, *rest, reduce=reduce, gather=gather, view=identity)

        mapped = jax.pmap(
            spread,
            axis_name=AXIS,
            in_axes=(None, 0, *[None] * (len(arguments) - 2)),
            out_axes=None,
            axis_size=count,
            devices=list(line.devices.flat),
            donate_argnums=0,
        )
        if jax.process_count() == 1:
            traced = jax.make_jaxpr(mapped)(*arguments)  # which lowering does not do again
            return Lowered(mapped.lower(*arguments).compile, flops(traced) / count)

        def call(*arguments):
            return jax.tree.map(everywhere, mapped(*arguments))

        def everywhere(array):  # what pmap returns is of this process's devices
            parts = [part.data for part in array.addressable_shards]
            return jax.make_array_from_single_device_arrays(array.shape, replicated, parts)

        return Lowered(lambda: call, 0.0)

    return feed, lower


def _all_gather(tree: Any, names: Any, axis: int = 0) -> Any:
    return jax.tree.map(lambda a: jax.lax.all_gather(a, names, axis=axis, tiled=True), tree)


def _sharded(mesh: Mesh, shardings: Callable[[Any], Any]) -> tuple[Callable, Callable]:
    """`gather` and `view` of `fsdp`: a device's part of a batch meets parameters put together."""
    axes = mesh.axis_names

    def gather(tree):
        return _all_gather(tree, axes)

    def together(array, spec):
        for axis, names in enumerate(spec):
            array = _all_gather(array, names, axis) if names else array
        return array

    def mean(gradient, spec):  # which is summed over the names of `spec` already
        summed = jax.tree.leaves(tuple(spec))
        left = tuple(name for name in axes if name not in summed)
        return jax.lax.psum(gradient, left) / mesh.size

    def view(compute):
        def call(params, fixed, batch, keys):
            specs = jax.tree.map(lambda where: where.spec, shardings((params, fixed)))
            sizes = {array.size for array in jax.tree.leaves(params)}

            def kept(primitive, *inputs, **_):
                """Whether it is no parameter put together, perhaps of another type or shape."""
                if primitive.name in ("convert_element_type", "reshape", "transpose"):
                    return inputs[0].size not in sizes
                return primitive.name != "all_gather"

            def whole(fn):
                def of_parts(*arguments):
                    return fn(*jax.tree.map(together, arguments[:2], specs), *arguments[2:])

                return jax.checkpoint(of_parts, policy=kept)

            def local(*arguments):
                gradient, means, each = compute(*arguments, whole=whole)
                return jax.tree.map(mean, gradient, specs[0]), jax.lax.pmean(means, axes), each

            spread = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(*specs, PartitionSpec(axes), PartitionSpec(axes)),
                out_specs=(specs[0], PartitionSpec(), PartitionSpec()),
                check_vma=False,
            )
            return spread(params, fixed, batch, keys)

        return call

    return gather, view


def _put(array: np.ndarray, where: NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(array, where)
    return jax.make_array_from_process_local_data(where, array)


def fetch(tree: Any) -> Any:
    """numpy arrays of what may lie on devices of other processes; all of them call it."""

    def one(array):
        if isinstance(array, jax.Array) and not (
            array.is_fully_addressable or array.is_fully_replicated
        ):
            assert isinstance(array.sharding, NamedSharding)
            array = _whole(array)
        return np.asarray(array)

    return jax.tree.map(one, tree)


def _whole(array: Any) -> Any:
    """A sharded array, on every device of its mesh."""
    return _compiled(NamedSharding(array.sharding.mesh, PartitionSpec()), identity)(array)


def check_batch(batch_size: int, accumulate: int = 1) -> None:
    """A training batch is split evenly over the devices and the parts, or not at all.

    Raises:
      UserError: it does not divide.
    """
    parts = jax.device_count() * accumulate
    if batch_size % parts:
        over = f"{jax.device_count()} devices" + f" x {accumulate} parts" * (accumulate > 1)
        raise UserError(
            f"--config.train.batch_size={batch_size} does not divide over {over}; "
            f"give a multiple of {parts}"
        )


def raised(spread: Parallel, flag: bool) -> Any:
    """This process's flag for `anyone`: on the devices in turn with the steps, not waited for."""
    if jax.process_count() == 1:
        return flag
    own = spread.rows(spread.devices)
    flags = spread.shard(np.full(own.stop - own.start, flag, np.int32))
    return _whole(flags)


def anyone(flags: Any) -> bool:
    """Whether any process's flag is up, of what `raised` made."""
    return bool(np.max(flags))
