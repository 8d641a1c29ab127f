"""The two ways in which a run can end badly, each told in one line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What the user asked for cannot be done; the message says what to do (exit code 2)."""


class RunError(Exception):
    """The run itself went wrong, as a loss that is not finite does (exit code 1)."""


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint such as `; did you mean "steps"?`, or the whole choice where none is near."""
    words = sorted(words)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; there are: {', '.join(words)}" if words else ""
