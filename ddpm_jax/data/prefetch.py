"""Batches made one call ahead, in a thread, so that the device never waits for data."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

AHEAD = 2
_END = object()


def prefetch(batches: Iterator[Any], place: Callable[[Any], Any]) -> Generator[Any, None, None]:
    """`place(batch)` for every batch, up to two of them ready before they are asked for.

    What the making raises is raised where the batch is asked for; closing it ends the thread.
    """
    ready: queue.Queue = queue.Queue(AHEAD)
    closed = threading.Event()

    def put(item: Any) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for batch in batches:
                put((place(batch), None))
                if closed.is_set():
                    return
            put((_END, None))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=make, daemon=True, name="prefetch")

    def take() -> Generator[Any, None, None]:
        thread.start()
        try:
            while True:
                batch, error = ready.get()
                if error is not None:
                    raise error
                if batch is _END:
                    return
                yield batch
        finally:
            closed.set()
            thread.join()

    return take()
