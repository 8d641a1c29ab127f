"""Signal handling that is immediate, also while the main thread compiles or computes.

Python calls the handler of a signal in the main thread, between two Python instructions; so it
waits while XLA compiles, which may take minutes.  But the interpreter's C code writes the number of
each signal to a pipe at once (`signal.set_wakeup_fd`), and a thread reads the pipe.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from ddpm_jax.system import terminal

ENDED = 130  # the exit code after Ctrl-C
before_end: list[Callable[[], None]] = []  # functions that `end_now` calls


def end_now(line: str = "interrupted: by Ctrl-C", code: int = ENDED) -> None:
    """Print a line to stderr and end the process at once, without waiting for other threads."""
    for function in before_end:
        function()
    terminal.print_error(line)
    os._exit(code)


@contextlib.contextmanager
def on_signals(on_signal: Callable[[int], None]) -> Iterator[None]:
    """Call `on_signal(number)` at once, in a thread, for each signal that arrives in this context.

    Only signals with a Python handler are reported.  Outside of the main thread, this context has
    no effect.
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
            on_signal(number)

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
    """Return an `on_signal` function for `on_signals`: a first signal warns, a later Ctrl-C ends.

    Args:
      warn: Function that is called at the first signal of `numbers`; it logs what the program waits
        for.
      *numbers: Numbers of the signals.
    """
    warned = False

    def on_signal(number: int) -> None:
        nonlocal warned
        if number == signal.SIGINT and warned:
            end_now()
        if number in numbers and not warned:
            warned = True
            warn()

    return on_signal


@contextlib.contextmanager
def end_on_ctrl_c() -> Iterator[None]:
    """End the process at once at Ctrl-C, unless training handles it (`training.loop.fit`)."""

    def on_signal(number: int) -> None:
        if number == signal.SIGINT:
            end_now()

    before = signal.signal(signal.SIGINT, lambda *_: None)  # only the thread ends the process
    try:
        with on_signals(on_signal):
            yield
    finally:
        signal.signal(signal.SIGINT, before)
