"""Stop a training at a signal, after the current step and its checkpoint."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from ddpm_jax.progress import tell
from ddpm_jax.system import interrupts

WAITING = (
    "waiting for the current step and its checkpoint; press Ctrl-C again to end at once (the "
    "newest checkpoint stays)"
)


class Signals:
    """SIGTERM and Ctrl-C ask the loop to stop; a second Ctrl-C ends the process at once."""

    def __init__(self, alone: bool) -> None:
        self.stop = False
        self._alone = alone  # or other processes wait for this one's share of the work
        self._interrupt = False
        self._before: dict[int, Any] = {}
        # In a thread of its own, and at once: the main thread may be compiling.
        notice = interrupts.warning(lambda: tell(WAITING), signal.SIGTERM, signal.SIGINT)
        self._watch = interrupts.watched(notice)

    def __enter__(self) -> "Signals":
        with contextlib.suppress(ValueError):  # not in the main thread: nobody signals it
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        self._watch.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self._watch.__exit__(None, None, None)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.stop = True
        if self._interrupt:
            raise Interrupted

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """What can be done again later is broken off at once."""
        self._interrupt = self._alone
        try:
            yield
        except Interrupted:
            pass
        finally:
            self._interrupt = False


class Interrupted(Exception):
    pass
