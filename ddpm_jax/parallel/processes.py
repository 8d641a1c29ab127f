"""Communication between the processes of a training on several hosts."""

import itertools
import json
import math
import sys
from collections.abc import Callable
from typing import Protocol, TypeVar, cast, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils

from ddpm_jax.errors import RunError, UserError, one_line

T = TypeVar("T")
MAX_MESSAGE_BYTES = 256  # longer error messages are cut for other processes


@runtime_checkable
class Coordinator(Protocol):
    """The client of jax's coordination service, with barriers and a key-value store."""

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None:
        """Wait until all processes call this method; raise JaxRuntimeError at the time limit."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Store `value` under `key`, where all processes can read it."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Return the pairs (key, value) of all keys that begin with the directory `key`."""

    def key_value_delete(self, key: str) -> None:
        """Delete `key` and all keys that begin with the directory `key`."""


def coordination_client() -> Coordinator | None:
    """Return jax's client of the coordination service; return None if there is only one process.

    The client is private to jax, because jax has no public barrier with a time limit.  If this
    version of jax has no such private object, return None also for several processes;
    `missing_client_warning` then returns a warning.
    """
    try:
        from jax._src import distributed

        client: Coordinator | None = distributed.global_state.client
        return client
    except (ImportError, AttributeError):
        return None


def missing_client_warning() -> str:
    """Return a warning if several processes have no client, otherwise an empty string."""
    if is_single_process() or coordination_client() is not None:
        return ""
    return (
        f"ddpm_jax was not tested with jax {jax.__version__}: checkpoints use the barriers of "
        "orbax, and a process that fails to write one is not named in the log"
    )


def check_same_everywhere(what: str, value: str) -> None:
    """Check that all processes have the same value.

    Args:
      what: Name of the value in the error message, such as "the data set".
      value: The value in this process.

    Raises:
      UserError: If the value of this process differs from the value of process 0.
    """
    first = from_main(lambda: value)
    if first != value:
        raise UserError(
            f"{what} is {value} in process {jax.process_index()} and {first} in process 0; "
            "start all processes with the same files and flags"
        )


def is_main() -> bool:
    """Return whether this is process 0; only process 0 prints and writes JSON files."""
    return bool(jax.process_index() == 0)


def from_main(fn: Callable[[], T]) -> T:
    """Call `fn` in process 0, and return the result, of JSON types, in all processes.

    Raises:
      Exception: In process 0, if `fn` raises it.
      RunError: In the other processes, if `fn` raises an exception; with the same message.
    """
    if jax.process_count() == 1:
        return fn()
    message: dict[str, object] = {}
    failure: Exception | None = None
    if is_main():
        try:
            message = {"value": fn()}
        except Exception as error:  # sent too, because the other processes wait for a message
            message, failure = {"error": str(error)}, error
    text = json.dumps(message).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(math.ceil(size / 1024) * 1024, np.uint8)
    padded[: len(text) if is_main() else 0] = np.frombuffer(text if is_main() else b"", np.uint8)
    sent = multihost_utils.broadcast_one_to_all(padded)
    message = json.loads(np.asarray(sent, np.uint8).tobytes()[:size])
    if "error" in message:
        raise failure or RunError(f"process 0 failed: {message['error']}")
    return cast(T, message["value"])


def on_main(fn: Callable[[], T], otherwise: T) -> T:
    """Return `fn()` in process 0, and `otherwise` in the other processes.

    If `fn` raises an error, all processes raise an error, as in `from_main`.
    """
    result = otherwise

    def run() -> None:
        nonlocal result
        result = fn()

    from_main(run)
    return result


def is_single_process() -> bool:
    """Return whether there is only one process."""
    return bool(jax.process_count() == 1)


def first_error(text: str) -> str:
    """Return the error message of the lowest-numbered process that has one.

    All processes must call this function together, each with its own message `text`, which is empty
    if there is no error.  All get the same result, which is empty if no process has an error.
    """
    if is_single_process():
        return text
    padded = np.zeros(MAX_MESSAGE_BYTES, np.uint8)
    content = text.encode()[:MAX_MESSAGE_BYTES]
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
    process, first = next(((i, text) for i, text in enumerate(texts) if text), (0, ""))
    return first if all(texts) or not first else f"process {process}: {first}"


_barriers = itertools.count()


@runtime_checkable
class Barrier(Protocol):
    """A barrier function, with the arguments that orbax requires."""

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait until all processes have called the barrier with the same `key`."""


class ThreadBarrier:
    """A barrier at which the background threads of all processes wait for each other.

    The threads communicate through jax's coordination service, because only main threads may use
    the devices.  Each process sends a key; if the keys differ, a process has failed, and the
    barrier raises an error in all processes.
    """

    def __init__(self) -> None:
        self._directory, self._count, self._failed = "", 0, False

    def begin(self) -> None:
        """Start a new barrier; the main thread of each process calls this before any `wait`."""
        self._directory, self._count, self._failed = f"ddpm_jax/{next(_barriers)}", 0, False

    def barrier(self) -> Barrier | None:
        """Return `wait`, or None if there is no client; orbax then uses a barrier of its own."""
        return None if missing_client_warning() else self.wait

    def wait(self, *, key: str, timeout_ms: int) -> None:
        """Wait until all processes have called `wait` with the same `key`.

        After an error, further calls return immediately.

        Raises:
          OSError: If the keys differ, which means that a process has failed, or if a process does
            not call `wait` within `timeout_ms` milliseconds.
        """
        if is_single_process() or self._failed:
            return
        client = coordination_client()
        assert client is not None
        previous, current = (f"{self._directory}/{self._count + i}/" for i in range(2))
        self._count += 1
        failure = sys.exception()  # the error that this thread is handling, if any
        reason = f"process {jax.process_index()}: {one_line(failure, 150)}" if failure else ""
        try:
            client.key_value_set(current + key, reason, allow_overwrite=True)
            client.wait_at_barrier(current, timeout_ms)
            messages = client.key_value_dir_get(current)
            if is_main():
                client.key_value_delete(previous)
        except jax.errors.JaxRuntimeError:
            self._failed = True
            raise TimeoutError(
                f"a process did not finish within {timeout_ms / 1000:.0f} s"
            ) from None
        if len(messages) > 1:
            self._failed = True
            raise OSError("; ".join(text for _, text in messages if text) or "a process failed")
