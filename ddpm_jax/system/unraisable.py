"""Errors that Python cannot raise, but only print (`sys.unraisablehook`)."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_event_loop() -> Iterator[None]:
    """Suppress the errors that follow the first one when a parallel read of arrays fails.

    After the first error, asyncio's event loop is closed, and the other reads fail with "Event loop
    is closed", some of them after this context; so after an error, such messages stay suppressed.
    """
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = before
