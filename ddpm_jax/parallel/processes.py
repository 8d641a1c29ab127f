"""The processes of a run on several hosts: start, agree, meet and end together."""

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
LONGEST = 256  # bytes of what a process says of itself to the others


@runtime_checkable
class Coordinator(Protocol):
    """What the processes of a run talk through: barriers with a time limit, and keys."""

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None:
        """Wait until all processes have come, or raise JaxRuntimeError."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Store a value."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Return the keys below a key, and their values."""

    def key_value_delete(self, key: str) -> None:
        """Delete what is below a key."""


def coordination_client() -> Coordinator | None:
    """Return what the processes of a run talk through; None in a run of one process.

    It is private to jax, which has no public barrier with a time limit.  Where a version of jax
    has it elsewhere, None is returned in a run of several processes, too (`without_client`).
    """
    try:
        from jax._src import distributed

        client: Coordinator | None = distributed.global_state.client
        return client
    except (ImportError, AttributeError):
        return None


def without_client() -> str:
    """Return what a run of several processes lacks in this version of jax; "": nothing."""
    if alone() or coordination_client() is not None:
        return ""
    return (
        f"jax {jax.__version__} is not known: the processes wait for each other's checkpoints as "
        "orbax does, and which of them failed to write one is not logged"
    )


def check_same_everywhere(what: str, value: str) -> None:
    """Check that all processes have the same `value`.

    Raises:
      UserError: it differs from that of the first process.
    """
    first = from_main(lambda: value)
    if first != value:
        raise UserError(f"{what} is {value} here and {first} in the first process")


def is_main() -> bool:
    """Return whether this process writes what is for people."""
    return bool(jax.process_index() == 0)


def from_main(fn: Callable[[], T]) -> T:
    """Call `fn` in the first process; return its result, of JSON's types, in all processes.

    Raises:
      Exception: what `fn` raised, in the first process.
      RunError: the same message, in the other processes.
    """
    if jax.process_count() == 1:
        return fn()
    message: dict[str, object] = {}
    failure: Exception | None = None
    if is_main():
        try:
            message = {"value": fn()}
        except Exception as error:  # whatever it is, the others wait for word of it
            message, failure = {"error": str(error)}, error
    text = json.dumps(message).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(math.ceil(size / 1024) * 1024, np.uint8)
    padded[: len(text) if is_main() else 0] = np.frombuffer(text if is_main() else b"", np.uint8)
    sent = multihost_utils.broadcast_one_to_all(padded)
    message = json.loads(np.asarray(sent, np.uint8).tobytes()[:size])
    if "error" in message:
        raise failure or RunError(f"the first process ended: {message['error']}")
    return cast(T, message["value"])


def from_main_alone(fn: Callable[[], T], otherwise: T) -> T:
    """Return `fn()` in the first process, `otherwise` in the others; UserErrors in all."""
    kept = otherwise

    def run() -> None:
        nonlocal kept
        kept = fn()

    from_main(run)
    return kept


def alone() -> bool:
    """Return whether there is one process."""
    return bool(jax.process_count() == 1)


def complaint(text: str) -> str:
    """Return a process's complaint, the same in all processes; "" if there is none."""
    if alone():
        return text
    padded = np.zeros(LONGEST, np.uint8)
    content = text.encode()[:LONGEST]
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    words = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
    number, first = next(((i, text) for i, text in enumerate(words) if text), (0, ""))
    return first if all(words) or not first else f"process {number}: {first}"


_meetings = itertools.count()


@runtime_checkable
class Barrier(Protocol):
    """A barrier, as orbax takes it."""

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Wait for the other processes."""


class Meeting:
    """A barrier for the background threads of all processes.

    It uses no devices, which belong to the main threads.  Each process announces a key; if the keys
    differ, a process has given up, and the barrier fails in all of them.
    """

    def __init__(self) -> None:
        self._place, self._count, self._over = "", 0, False

    def begin(self) -> None:
        """Begin a new barrier; all main threads call it before their background threads wait."""
        self._place, self._count, self._over = f"ddpm_jax/{next(_meetings)}", 0, False

    def barrier(self) -> Barrier | None:
        """Return `wait`; None where there is nothing to wait through, and orbax uses its own."""
        return None if without_client() else self.wait

    def wait(self, *, key: str, timeout_ms: int) -> None:
        """Wait for the other processes, which must announce the same `key`.

        Raises:
          OSError: one gave up, and why, or none came in time; from then on nobody waits.
        """
        if alone() or self._over:
            return
        client = coordination_client()
        assert client is not None
        before, here = (f"{self._place}/{self._count + i}/" for i in range(2))
        self._count += 1
        failure = sys.exception()  # that ends what others go on with
        reason = f"process {jax.process_index()}: {one_line(failure, 150)}" if failure else ""
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
