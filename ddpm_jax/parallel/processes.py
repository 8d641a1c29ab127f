"""Communication between the processes of a run on several hosts."""

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
MAX_MESSAGE_BYTES = 256  # of an error message that a process sends to the others


@runtime_checkable
class Coordinator(Protocol):
    """The client of jax's coordination service: barriers with a time limit, key-value store."""

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None:
        """Wait until all processes have arrived, or raise JaxRuntimeError."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Store a value."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Return (key, value) of all keys below a key."""

    def key_value_delete(self, key: str) -> None:
        """Delete a key and all keys below it."""


def coordination_client() -> Coordinator | None:
    """Return jax's client of the coordination service; None in a run of one process.

    The client is private to jax, which has no public barrier with a time limit.  For a version of
    jax that has moved it, None is returned in a run of several processes, too; then
    `missing_client_warning` returns a text.
    """
    try:
        from jax._src import distributed

        client: Coordinator | None = distributed.global_state.client
        return client
    except (ImportError, AttributeError):
        return None


def missing_client_warning() -> str:
    """Return a warning if several processes run without jax's client; "": no warning."""
    if is_single_process() or coordination_client() is not None:
        return ""
    return (
        f"ddpm_jax was not tested with jax {jax.__version__}: checkpoints use the barriers of "
        "orbax, and a process that fails to write one is not named in the log"
    )


def check_same_everywhere(what: str, value: str) -> None:
    """Check that all processes have the same `value`, which `what` names in the error message.

    Raises:
      UserError: If the value differs from that of the first process.
    """
    first = from_main(lambda: value)
    if first != value:
        raise UserError(
            f"{what} is {value} in process {jax.process_index()} and {first} in the first process; "
            "give all processes the same"
        )


def is_main() -> bool:
    """Return whether this process is the first one, which alone prints and writes records."""
    return bool(jax.process_index() == 0)


def from_main(fn: Callable[[], T]) -> T:
    """Call `fn` in the first process, and return its result, of JSON types, in all processes.

    Raises:
      Exception: If `fn` raises it; in the first process.
      RunError: If `fn` raises an exception; in the other processes, with its message.
    """
    if jax.process_count() == 1:
        return fn()
    message: dict[str, object] = {}
    failure: Exception | None = None
    if is_main():
        try:
            message = {"value": fn()}
        except Exception as error:  # the other processes wait for the message
            message, failure = {"error": str(error)}, error
    text = json.dumps(message).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(math.ceil(size / 1024) * 1024, np.uint8)
    padded[: len(text) if is_main() else 0] = np.frombuffer(text if is_main() else b"", np.uint8)
    sent = multihost_utils.broadcast_one_to_all(padded)
    message = json.loads(np.asarray(sent, np.uint8).tobytes()[:size])
    if "error" in message:
        raise failure or RunError(f"the first process failed: {message['error']}")
    return cast(T, message["value"])


def on_main(fn: Callable[[], T], otherwise: T) -> T:
    """Return `fn()` in the first process, and `otherwise` in the other processes.

    Errors of `fn` are raised in all processes, as by `from_main`.
    """
    result = otherwise

    def run() -> None:
        nonlocal result
        result = fn()

    from_main(run)
    return result


def is_single_process() -> bool:
    """Return whether the run has only one process."""
    return bool(jax.process_count() == 1)


def first_error(text: str) -> str:
    """Return in all processes the error message of the first that has one; "": no error."""
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
    """A barrier function, as an argument of orbax."""

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait for the other processes."""


class ThreadBarrier:
    """A barrier for the background threads of all processes.

    It does not use the devices, because only the main threads may.  Each process sends a key; if
    the keys differ, a process has failed, and the barrier raises an error in all processes.
    """

    def __init__(self) -> None:
        self._directory, self._count, self._failed = "", 0, False

    def begin(self) -> None:
        """Start a new barrier; all main threads call it before their background threads wait."""
        self._directory, self._count, self._failed = f"ddpm_jax/{next(_barriers)}", 0, False

    def barrier(self) -> Barrier | None:
        """Return `wait`; None if there is no client, in which case orbax uses its own barrier."""
        return None if missing_client_warning() else self.wait

    def wait(self, *, key: str, timeout_ms: int) -> None:
        """Wait at most `timeout_ms` milliseconds for the other processes, which send the same key.

        After an error, further calls return at once.

        Raises:
          OSError: If a process has failed, with its reason, or has not arrived in time.
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
