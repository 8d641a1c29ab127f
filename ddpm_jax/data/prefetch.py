"""Batches made one call ahead, in a thread, so that the device never waits for data."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, NamedTuple, TypeVar

AHEAD = 2
A = TypeVar("A")
B = TypeVar("B")


@dataclasses.dataclass(frozen=True)
class _Ready(Generic[B]):
    """A batch that is ready."""

    batch: B


class _End(NamedTuple):
    """After the last batch: `error` is what making the next one raised, if anything."""

    error: BaseException | None = None


def prefetch(batches: Iterator[A], place: Callable[[A], B]) -> Generator[B, None, None]:
    """Yield `place(batch)` for every batch; up to two are computed ahead, in a thread.

    Closing the generator ends the thread.

    Raises:
      BaseException: whatever `batches` or `place` raised, where the next batch is asked for.
    """
    ready: queue.Queue[_Ready[B] | _End] = queue.Queue(AHEAD)
    closed = threading.Event()

    def put(item: _Ready[B] | _End) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for batch in batches:
                put(_Ready(place(batch)))
                if closed.is_set():
                    return
            put(_End())
        except BaseException as error:
            put(_End(error))

    thread = threading.Thread(target=make, daemon=True, name="prefetch")

    def take() -> Generator[B, None, None]:
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, _Ready):
                    yield item.batch
                elif item.error is not None:
                    raise item.error
                else:
                    return
        finally:
            closed.set()
            thread.join()

    return take()
