"""How a run is spread over devices and processes: the only file that knows them.

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

import atexit
import contextlib
import functools
import importlib.metadata
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddpm_jax import interrupts
from ddpm_jax.environment import check_device
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.flops import flops

MODES = ("jit", "pmap", "fsdp")
AXIS = "data"  # of `pmap`
RESOLVE_SECONDS = 10.0  # in which the name of the coordinator's host must be known
HOST = re.compile(r"[^\s:/\[\]]+|\[[0-9A-Fa-f:.]+(?:%[^\s\]]+)?\]")  # a name, or [an IPv6 address]
LEAVE_SECONDS = 5.0
SILENT_SECONDS = 10.0  # of waiting for the coordinator, after which that is logged
HEARTBEAT = 30  # seconds after which a silent process is taken for dead
LONGEST = 256  # bytes of what a process says of itself to the others
# A flag that jaxlib does not know aborts the process, so each is set for the versions it was
# tried with alone.  The first makes a convolution's gradients 2 to 3 times faster on a CPU; the
# second makes compiling a third faster and the program slower; the third cuts a program for the
# half of the cores that another, compiled beside it, leaves it, and not into 32 parts.
CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
EMITTERS_FLAG = "--xla_cpu_use_fusion_emitters=false"
SPLIT_FLAG = f"--xla_cpu_parallel_codegen_split_count={max(1, (os.cpu_count() or 1) // 2)}"
VERSIONS = {
    CPU_FLAG: ("0.10.2", "0.12.0.1"),
    EMITTERS_FLAG: ("0.10.2",),
    SPLIT_FLAG: ("0.10.2", "0.12.0.1"),
}
# Without these, XLA for CPUs gathers a sharded state as early as it can, and takes what is
# gathered again for what it has already: a device would hold the whole after all.
FRUGAL: dict[str, str | bool] = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "cse_barrier_expander",
}
FRUGAL_VERSIONS = ("0.10.2",)


def tune_cpu(debug: bool = False) -> None:
    """Set `CPU_FLAG`, and the others for runs of a few steps, where jaxlib knows them.

    Before the first computation, or it does nothing.
    """
    version = importlib.metadata.version("jaxlib")
    for flag in VERSIONS if debug else (CPU_FLAG,):
        flags = os.environ.get("XLA_FLAGS", "")
        if version in VERSIONS[flag] and flag.partition("=")[0] not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def tune_gpu() -> None:
    """The same program gives the same bits at each run: no atomic additions, no autotuning.

    It costs speed, of scatters and of convolutions' gradients above all; a CPU and a TPU need
    nothing.  Before the first computation, or it does nothing.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{flags} {wanted}".strip()


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
            f"--config.batch_size={batch_size} does not divide over {over}; "
            f"give a multiple of {parts}"
        )


def memory() -> dict[str, float]:
    """The most that this process's devices have held, where they tell it."""
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]
    return {"peak_memory_bytes": float(max(peaks))} if peaks else {}


# Operations per second of matrix products in bfloat16, as the makers state them (dense).
PEAKS = {
    "TPU v2": 22.5e12, "TPU v3": 61.5e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
    "TPU v5": 459e12, "TPU v6 lite": 918e12, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12, "NVIDIA L4": 121e12, "Tesla T4": 65e12, "Tesla V100": 125e12,
}  # fmt: skip


def utilisation(per_step: float, lap: dict[str, float]) -> dict[str, float]:
    """Operations per second of a device, and what share that is of its peak where that is known."""
    if not per_step or not math.isfinite(per_step):
        return {}
    rate = per_step * lap["steps_per_second"]
    kind = jax.devices()[0].device_kind
    peak = max((name for name in PEAKS if kind.startswith(name)), key=len, default=None)
    share = {"model_flops_utilisation": rate / PEAKS[peak]} if peak else {}
    return {"flops_per_second_per_device": rate, **share}


def describe() -> dict[str, Any]:
    """The devices, for `config.json`."""
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
    }


# Processes.


def check_cluster(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Check what the command line says of the processes, before anything starts.

    Raises:
      UserError: the coordinator's address is not HOST:PORT, or there is no such process.
    """
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        known = HOST.fullmatch(host) and re.fullmatch("[0-9]{1,5}", port)
        if not known or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator={coordinator}: must be HOST:PORT, with a port from 1 to 65535 and "
                "an IPv6 address in brackets"
            )
    if process is not None and processes is not None and process >= processes:
        raise UserError(
            f"--process_id={process}: must be less than --num_processes={processes}; the first "
            "process is 0"
        )


def check_host(coordinator: str) -> None:
    """Check that the name of the coordinator's host is known, within `RESOLVE_SECONDS`.

    Raises:
      UserError: it is not.
    """
    host, answers = coordinator.rpartition(":")[0].strip("[]"), threading.Event()

    def look_up() -> None:
        while not gone.is_set():
            with contextlib.suppress(OSError, UnicodeError):
                socket.getaddrinfo(host, None)
                answers.set()
                return
            gone.wait(1.0)

    gone = threading.Event()
    threading.Thread(target=look_up, daemon=True).start()
    known = answers.wait(RESOLVE_SECONDS)
    gone.set()
    if not known:
        raise UserError(
            f"--coordinator={coordinator}: no host of the name {host} was found within "
            f"{RESOLVE_SECONDS:g} s; give the address of process 0"
        )


def check_platform() -> None:
    """Check that jax has devices, as `JAX_PLATFORMS` asks for.

    Raises:
      UserError: there are none of that platform.
    """
    names = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
    name = next((name for name in names if os.environ.get(name)), names[0])
    asked = os.environ.get(name, "")
    try:
        jax.devices()
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = one_line(error, 150) or "there are no such devices"
        raise UserError(
            f"{name}={asked}: jax has no devices of it here: {reason}; unset {name}, or set it to "
            "cpu"
        ) from None
    check_device()


@functools.cache
def check_flags(flags: str) -> None:
    """Check the user's `XLA_FLAGS` in another process, which XLA ends where it lacks one of them.

    Raises:
      UserError: XLA lacks one of them.
    """
    if not flags:
        return
    code = "from jaxlib import xla_client; xla_client.CompileOptions()"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if tried.returncode:
        reason = next((line for line in tried.stderr.splitlines() if "XLA_FLAGS" in line), "")
        raise UserError(
            f"XLA_FLAGS={flags}: {reason.rpartition('] ')[2] or 'XLA refuses it'}; correct it, or "
            "unset XLA_FLAGS"
        )


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes; what is None is asked of the cluster (TPU, SLURM, Kubernetes).

    Raises:
      UserError: there is no cluster to ask, or no coordinator answers.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator is not None:
        check_host(coordinator)
    waiting = threading.Timer(
        SILENT_SECONDS,
        lambda: print(f"waiting for the coordinator at {coordinator}", file=sys.stderr),
    )
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT
        )
        _leave_a_mourner()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed: {str(error).splitlines()[0]}; outside of a cluster give "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from None
    finally:
        waiting.cancel()


# jax aborts a process when another one is gone, which no Python code of its own survives.
MOURNER = """
import sys
if not sys.stdin.read():
    print("stopped: this process ended before its run did: it was killed, or another process of "
          "the run is gone; start all of them again, and the run goes on from its newest "
          "checkpoint", file=sys.stderr)
"""
_mourners: list[subprocess.Popen] = []


def _leave_a_mourner() -> None:
    """A small process that tells of this one's end, unless `leave` was called before it."""
    _mourners.append(
        subprocess.Popen(
            [sys.executable, "-c", MOURNER], stdin=subprocess.PIPE, start_new_session=True
        )
    )
    atexit.register(leave)
    interrupts.before_end.append(leave)


def leave() -> None:
    """Say that this process ends as it means to."""
    while _mourners:
        _mourners.pop().communicate(b"farewell")


def meet_before_leaving() -> None:
    """Let all processes of a run that failed end by themselves.

    jax aborts a process whose coordinator, the first process, is gone: so those that fail together
    wait for each other, for `LEAVE_SECONDS` at most, and the first one ends last.
    """
    client: Any = distributed.global_state.client
    if client is None:
        return
    try:
        client.wait_at_barrier("ddpm_jax/leaving", round(1000 * LEAVE_SECONDS))
    except jax.errors.JaxRuntimeError:  # the others go on, or are gone
        return
    if is_main():
        time.sleep(1.0)


def check_same_everywhere(what: str, value: str) -> None:
    """Raises UserError unless `value` is the first process's, too."""
    first = from_main(lambda: value)
    if first != value:
        raise UserError(f"{what} is {value} here and {first} in the first process")


def is_main() -> bool:
    """Whether this process writes what is for people."""
    return jax.process_index() == 0


def from_main(fn: Callable[[], Any]) -> Any:
    """What `fn` (JSON's types) returns in the first process, in all of them; UserErrors, too."""
    if jax.process_count() == 1:
        return fn()
    found: dict[str, Any] = {}
    own: Exception | None = None
    if is_main():
        try:
            found = {"value": fn()}
        except Exception as error:  # whatever it is, the others wait for word of it
            found, own = {"error": str(error)}, error
    text = json.dumps(found).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(math.ceil(size / 1024) * 1024, np.uint8)
    padded[: len(text) if is_main() else 0] = np.frombuffer(text if is_main() else b"", np.uint8)
    sent = multihost_utils.broadcast_one_to_all(padded)
    found = json.loads(np.asarray(sent, np.uint8).tobytes()[:size])
    if "error" in found:
        raise own or RunError(f"the first process ended: {found['error']}")
    return found["value"]


def from_main_alone(fn: Callable[[], Any], otherwise: Any) -> Any:
    """`fn()` in the first process, once done `otherwise` in the others; UserErrors in all."""
    kept = otherwise

    def run() -> None:
        nonlocal kept
        kept = fn()

    from_main(run)
    return kept


def alone() -> bool:
    """Whether there is one process."""
    return jax.process_count() == 1


def complaint(own: str) -> str:
    """What a process complains of, in its words and the same in all of them; "" if none does."""
    if alone():
        return own
    padded = np.zeros(LONGEST, np.uint8)
    text = own.encode()[:LONGEST]
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    told = np.asarray(multihost_utils.process_allgather(padded))
    words = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in told]
    number, first = next(((i, text) for i, text in enumerate(words) if text), (0, ""))
    return first if all(words) or not first else f"process {number}: {first}"


_meetings = itertools.count()


class Meeting:
    """Where the processes' background threads wait for each other, and hear who cannot go on.

    Nothing runs on the devices for it, which belong to the main threads.  Whoever comes says what
    for; when not all say the same, some have given up, and what they met for is over.
    """

    def __init__(self) -> None:
        self._place, self._count, self._over = "", 0, False

    def begin(self) -> None:
        """All main threads call it before their background threads meet for something new."""
        self._place, self._count, self._over = f"ddpm_jax/{next(_meetings)}", 0, False

    def wait(self, *, key: str, timeout_ms: int) -> None:
        """Wait for the others, who come for `key`, too.

        Raises:
          OSError: one gave up, and why, or none came in time; from then on nobody waits.
        """
        if alone() or self._over:
            return
        client: Any = distributed.global_state.client
        before, here = (f"{self._place}/{self._count + i}/" for i in range(2))
        self._count += 1
        own = sys.exception()  # that ends what others go on with
        reason = f"process {jax.process_index()}: {one_line(own, 150)}" if own else ""
        try:
            client.key_value_set(here + key, reason, allow_overwrite=True)
            client.wait_at_barrier(here, timeout_ms)
            said = client.key_value_dir_get(here)
            if is_main():
                client.key_value_delete(before)
        except jax.errors.JaxRuntimeError:
            self._over = True
            raise TimeoutError(f"a process was not done in {timeout_ms / 1000:.0f} s") from None
        if len(said) > 1:
            self._over = True
            raise OSError("; ".join(text for _, text in said if text) or "a process gave up")


def one_line(error: BaseException, length: int = 200) -> str:
    """The end of what an error says, where the file system's own words are."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"...{text[-length:]}"


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
