"""Ctrl-C that is noticed at once, also while the main thread compiles or computes.

Python calls a signal's handler in the main thread, and only between two of its instructions: not
while XLA compiles, which may take minutes.  The interpreter's C code writes each signal's number
to a pipe at once (`signal.set_wakeup_fd`), and a thread reads it there.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from ddpm_jax.system import terminal

ENDED = 130  # the exit code after Ctrl-C
before_end: list[Callable[[], None]] = []  # what is called before the process ends at once


def end_now(line: str = "interrupted: by Ctrl-C", code: int = ENDED) -> None:
    """End the process at once, with a line and an exit code: nothing else is waited for."""
    for function in before_end:
        function()
    terminal.print_error(line)
    os._exit(code)


@contextlib.contextmanager
def watched(notice: Callable[[int], None]) -> Iterator[None]:
    """Call `notice` with a signal's number, in a thread and at once, for each that is handled.

    Only signals with a handler in Python are noticed, and only where this is called in the main
    thread; elsewhere nothing is watched.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    except ValueError:  # not the main thread
        os.close(read)
        os.close(write)
        yield
        return

    def listen() -> None:
        while number := os.read(read, 1)[0]:
            notice(number)

    thread = threading.Thread(target=listen, daemon=True, name="interrupts")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(write, b"\0")
        thread.join()
        os.close(read)
        os.close(write)


def warning(warn: Callable[[], None], *numbers: int) -> Callable[[int], None]:
    """Return what `watched` calls: a first signal of `numbers` warns, a Ctrl-C after it ends.

    Args:
      warn: says what is waited for.
    """
    warned = False

    def notice(number: int) -> None:
        nonlocal warned
        if number == signal.SIGINT and warned:
            end_now()
        if number in numbers and not warned:
            warned = True
            warn()

    return notice


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process at once, unless a training handles it (`training.loop.fit`)."""

    def notice(number: int) -> None:
        if number == signal.SIGINT:
            end_now()

    before = signal.signal(signal.SIGINT, lambda *_: None)  # the thread alone ends the process
    try:
        with watched(notice):
            yield
    finally:
        signal.signal(signal.SIGINT, before)
