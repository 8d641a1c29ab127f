"""Printing to stdout and stderr, which may be closed, full, or of an encoding such as ASCII.

Control characters are escaped, because printed text may come from files of unknown origin.
"""

import contextlib
import os
import sys

from ddpm_jax.errors import printable

_failures: list[str] = []  # why lines could not be printed to standard output


def prepare() -> None:
    """Make both streams usable, also if they were closed when the process started.

    A closed descriptor is opened on the null device, because otherwise the next open file would get
    its number.  Characters that the encoding lacks are printed as escapes.
    """
    closed = []
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            closed.append(number)
    while closed and os.open(os.devnull, os.O_RDWR) < closed[-1]:
        pass
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if 1 in closed:
        _failures.append("it is closed")


def show(text: str) -> None:
    """Print to standard output; an error is stored for `failure` instead of raised."""
    if _failures:
        return
    try:
        print(printable(text, lines=True), flush=True)
    except OSError as error:
        _failures.append(error.strerror or str(error))
        _discard(1)


def failure() -> str:
    """Return the reason why printing to standard output failed, and clear it; "" if it did not."""
    reason = next(iter(_failures), "")
    _failures.clear()
    return reason


def print_error(line: str) -> None:
    """Print to standard error; errors are ignored."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(line, lines=True), file=sys.stderr, flush=True)


def flush() -> None:
    """Flush both streams, so that flushing cannot fail when the interpreter ends."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            _discard(number)


def _discard(number: int) -> None:
    """Redirect a stream, with its unwritten content, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
