"""Functions that print to stdout and stderr, also if these are closed, full or ASCII only.

Control characters are escaped, because printed text may come from files of unknown origin.
"""

import contextlib
import os
import sys

from ddpm_jax.errors import printable

_failures: list[str] = []  # the reason why a line could not be printed to standard output


def prepare() -> None:
    """Prepare stdout and stderr for printing, also if they were closed when the process started.

    Each closed standard descriptor (0 to 2) is opened on the null device, because otherwise the
    next file that is opened would get this number.  Characters that the encoding lacks are printed
    as escape sequences.
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
    """Print `text` to standard output; instead of raising an error, store it for `failure`."""
    if _failures:
        return
    try:
        print(printable(text, lines=True), flush=True)
    except OSError as error:
        _failures.append(error.strerror or str(error))
        _discard(1)


def failure() -> str:
    """Return and clear the reason why `show` failed, or return an empty string if it did not."""
    reason = next(iter(_failures), "")
    _failures.clear()
    return reason


def print_error(line: str) -> None:
    """Print `line` to standard error; ignore errors of printing."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(line, lines=True), file=sys.stderr, flush=True)


def flush() -> None:
    """Flush stdout and stderr, so that Python does not fail to flush them when it ends."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            _discard(number)


def _discard(number: int) -> None:
    """Redirect the file descriptor `number` to the null device, which discards all content."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
