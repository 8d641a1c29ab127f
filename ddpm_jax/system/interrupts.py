"""Immediate handling of signals, also while the main thread compiles or computes.

Python calls the handler of a signal in the main thread between two Python instructions, so the call
is delayed while XLA compiles, which may take minutes.  But C code of the interpreter immediately
writes the number of each signal to a pipe (`signal.set_wakeup_fd`).  In this file, a thread reads
the pipe.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from ddpm_jax.system import terminal

ENDED = 130  # the exit code after Ctrl-C
before_end: list[Callable[[], None]] = []  # `end_now` calls these functions


def end_now(line: str = "interrupted: by Ctrl-C", code: int = ENDED) -> None:
    """Print `line` to stderr and end the process with the exit code `code` immediately."""
    for function in before_end:
        function()
    terminal.print_error(line)
    os._exit(code)


@contextlib.contextmanager
def on_signals(on_signal: Callable[[int], None]) -> Iterator[None]:
    """Call `on_signal(number)` in a thread, immediately, for each signal during this context.

    Only signals with a Python handler cause a call.  In a thread other than the main thread, this
    context has no effect.
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
    """Return a function for `on_signals` that calls `warn` once, then ends at Ctrl-C.

    It calls `warn` at the first signal of `numbers`.  If a Ctrl-C follows, it ends the process.

    Args:
      warn: Function without arguments that logs a warning.
      *numbers: Numbers of signals, such as `signal.SIGTERM`.
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
    """End the process immediately at Ctrl-C, unless training or sampling handles the signal."""

    def on_signal(number: int) -> None:
        if number == signal.SIGINT:
            end_now()

    before = signal.signal(signal.SIGINT, lambda *_: None)  # the thread ends the process
    try:
        with on_signals(on_signal):
            yield
    finally:
        signal.signal(signal.SIGINT, before)
