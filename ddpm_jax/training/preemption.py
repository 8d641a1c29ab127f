"""Stop a training when it is asked to, in all its processes after the same step."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

import numpy as np
from jaxtyping import Array

from ddpm_jax.parallel import processes
from ddpm_jax.parallel.partitioner import Partitioner, replicate
from ddpm_jax.progress import log
from ddpm_jax.system import interrupts

WAITING = (
    "waiting for the current step and its checkpoint; press Ctrl-C again to end at once (the "
    "newest checkpoint stays)"
)

Handler = Callable[[int, FrameType | None], object] | int | None  # as `signal.signal` has it


class Interrupted(Exception):
    """An evaluation is ended, which can be done again later."""


class Preemption:
    """Whether a training is asked to stop: by SIGTERM or Ctrl-C, here or in another process.

    A second Ctrl-C ends the process at once.  Of several processes each announces its flag on the
    devices, in turn with the steps, and reads what all announced: so all stop after the same step.
    """

    def __init__(self, partitioner: Partitioner) -> None:
        self._partitioner = partitioner
        self._signalled = False
        self._ends_at_once = False
        self._flags: Array | None = None  # of all processes; None: nothing is announced
        self._before: dict[int, Handler] = {}
        # In a thread of its own, and at once: the main thread may be compiling.
        notice = interrupts.warning(lambda: log(WAITING), signal.SIGTERM, signal.SIGINT)
        self._watch = interrupts.watched(notice)

    def __enter__(self) -> "Preemption":
        """Handle the signals."""
        with contextlib.suppress(ValueError):  # not in the main thread: nobody signals it
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        self._watch.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Handle the signals as before."""
        self._watch.__exit__(None, None, None)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if self._ends_at_once:
            raise Interrupted

    def announce(self) -> None:
        """Put this process's flag on the devices; not waited for."""
        if not processes.alone():
            rows = self._partitioner.rows(self._partitioner.devices)
            flags = np.full(rows.stop - rows.start, self._signalled, np.int32)
            self._flags = replicate(self._partitioner.shard(flags))

    def requested(self) -> bool:
        """Return whether a process was asked to stop by the latest announcement; alone, by now."""
        if processes.alone():
            return self._signalled
        return self._flags is not None and bool(np.max(self._flags))

    def check(self) -> None:
        """Announce and read the flags, between the batches of an evaluation.

        Raises:
          Interrupted: the training is asked to stop. A process alone is interrupted at once.
        """
        if not processes.alone():
            self.announce()
            if self.requested():
                raise Interrupted

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """End what can be done again later as soon as the training is asked to stop."""
        self._ends_at_once = processes.alone()  # or others wait for this one's share of the work
        try:
            yield
        except Interrupted:
            pass
        finally:
            self._ends_at_once = False
