"""The processes of a run on several hosts: start, agree, meet and end together."""

import itertools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from ddpm_jax.errors import RunError, UserError, one_line

LONGEST = 256  # bytes of what a process says of itself to the others


def coordination_client() -> Any:
    """Return what the processes of a run talk through; None in a run of one process.

    It is private to jax, which has no public barrier with a time limit.
    """
    return distributed.global_state.client


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
        client: Any = coordination_client()
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
