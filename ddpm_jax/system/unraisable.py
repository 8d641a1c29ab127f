"""Suppression of errors that Python prints instead of raising (`sys.unraisablehook`)."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_event_loop() -> Iterator[None]:
    """Suppress messages "Event loop is closed" while orbax reads arrays in parallel.

    If one read fails, orbax closes asyncio's event loop, and the other reads print this message,
    some after the end of this context; so after an error in this context, the messages remain
    suppressed.
    """
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = before
