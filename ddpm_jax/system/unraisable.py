"""Errors that Python can only print, as nobody is there to catch them."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_event_loop() -> Iterator[None]:
    """Print the first error alone of a read of many arrays that fails.

    Those of the arrays that are read beside it find asyncio's loop closed, some of them later: so
    where one has failed they are kept quiet from then on.
    """
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = before
