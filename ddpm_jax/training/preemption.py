"""Stop a training after a signal; all processes of the run stop after the same training step."""

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
    "stopping: waiting for the current step to end and for its checkpoint to be written; press "
    "Ctrl-C again to end at once, with the newest checkpoint written so far"
)

Handler = Callable[[int, FrameType | None], object] | int | None  # the type of `signal.signal`


class Interrupted(Exception):
    """An exception that ends an evaluation after a stop signal; a resumed run evaluates again."""


class Preemption:
    """Handlers of SIGTERM and Ctrl-C, which stop a training in all its processes.

    A second Ctrl-C ends the process at once. With several processes, each process puts a flag
    (whether it received a signal) on the devices between training steps, and reads the flags of all
    processes. All processes therefore stop after the same training step.

    Args:
      partitioner: The partitioner, which puts the flags on the devices.
    """

    def __init__(self, partitioner: Partitioner) -> None:
        self._partitioner = partitioner
        self._signalled = False
        self._ends_at_once = False
        self._flags: Array | None = None  # flags of all processes; None before `announce`
        self._before: dict[int, Handler] = {}
        # A separate thread logs at once, because the main thread may be compiling.
        notice = interrupts.warning(lambda: log(WAITING), signal.SIGTERM, signal.SIGINT)
        self._watch = interrupts.on_signals(notice)

    def __enter__(self) -> "Preemption":
        """Install the signal handlers."""
        with contextlib.suppress(ValueError):  # only the main thread receives signals
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
        """Restore the previous signal handlers."""
        self._watch.__exit__(None, None, None)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if self._ends_at_once:
            raise Interrupted

    def announce(self) -> None:
        """Put the flag of this process (whether it received a signal) on the devices."""
        if not processes.is_single_process():
            rows = self._partitioner.rows(self._partitioner.devices)
            flags = np.full(rows.stop - rows.start, self._signalled, np.int32)
            self._flags = replicate(self._partitioner.shard(flags))

    def requested(self) -> bool:
        """Return whether any process had received a signal when `announce` was last called.

        In a run of one process, return whether the process has received a signal until now.
        """
        if processes.is_single_process():
            return self._signalled
        return self._flags is not None and bool(np.max(self._flags))

    def check(self) -> None:
        """End an evaluation if any process received a signal; called between its batches.

        Raises:
          Interrupted: If any process of several received a signal. In a run of one process the
            signal handler raises this exception instead.
        """
        if not processes.is_single_process():
            self.announce()
            if self.requested():
                raise Interrupted

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Return a context whose body ends early, without an error, after a stop signal."""
        self._ends_at_once = (
            processes.is_single_process()
        )  # other processes would wait for this one
        try:
            yield
        except Interrupted:
            pass
        finally:
            self._ends_at_once = False
