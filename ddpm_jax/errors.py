"""Errors of users and of runs, which are reported in one line, and the text of such lines."""

import difflib
import re
from collections.abc import Iterable

# Control characters, lone surrogates, and characters that break lines or reverse the text.
HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


class UserError(Exception):
    """A request that cannot be fulfilled; the message states what to change (exit code 2)."""


class ConfigError(UserError):
    """Fields of a config that contradict each other or the data.

    Attributes:
      others: Paths of the other fields of the contradiction. The message begins with the first
        field, as in --config.PATH=VALUE.
    """

    def __init__(self, message: str, *others: str) -> None:
        self.others = others
        super().__init__(message)


class RunError(Exception):
    """A failure during a run, such as a loss that is not finite (exit code 1)."""


def printable(text: str, lines: bool = False) -> str:
    r"""Return `text` with every control character escaped, such as \x1b.

    Texts of run directories, data sets and file names may come from a stranger. They must not send
    commands to the terminal, reverse the text or start a line.

    Args:
      text: The text.
      lines: Whether to keep line breaks, of a text that this program has formatted.
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        if lines and character == "\n":
            return character
        return character.encode("unicode_escape").decode("ascii")

    return HIDDEN.sub(escape, text)


def suggestion(word: str, words: Iterable[str]) -> str:
    """Return a hint such as `; did you mean "steps"?`, or all words if none is similar."""
    words = sorted(words)
    similar = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if similar:
        return f'; did you mean "{similar[0]}"?'
    return f"; there are: {', '.join(words)}" if words else ""


def one_line(error: BaseException, length: int = 200) -> str:
    """Return the last `length` characters of an error message, which state the cause."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"...{text[-length:]}"


class NonFinite(RunError):
    """Images with values that are not finite, which cannot be shown."""


class MissingData(UserError):
    """A data set that is neither stored nor available for download; a fallback may replace it."""
