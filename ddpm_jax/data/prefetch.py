"""Prefetching of batches in a thread, so that the device does not wait for data."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, NamedTuple, TypeVar

AHEAD = 2  # number of batches that are prepared before they are needed
A = TypeVar("A")
B = TypeVar("B")


@dataclasses.dataclass(frozen=True)
class _Ready(Generic[B]):
    """A queue item that contains a batch."""

    batch: B


class _End(NamedTuple):
    """The last queue item; `error` is the exception that stopped the thread, or None."""

    error: BaseException | None = None


def prefetch(batches: Iterator[A], transfer: Callable[[A], B]) -> Generator[B, None, None]:
    """Yield `transfer(batch)` for every batch; a thread computes up to two results in advance.

    The thread ends when the generator is closed.

    Args:
      batches: The batches on the host.
      transfer: A function that transfers a batch to the devices.

    Raises:
      BaseException: If `batches` or `transfer` raised this exception in the thread.
    """
    ready: queue.Queue[_Ready[B] | _End] = queue.Queue(AHEAD)
    closed = threading.Event()

    def put(item: _Ready[B] | _End) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for batch in batches:
                put(_Ready(transfer(batch)))
                if closed.is_set():
                    return
            put(_End())
        except BaseException as error:
            put(_End(error))

    thread = threading.Thread(target=produce, daemon=True, name="prefetch")

    def consume() -> Generator[B, None, None]:
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

    return consume()
