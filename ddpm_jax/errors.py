"""The two ways in which a run can end badly, each reported in one line."""

import difflib
import re
from collections.abc import Iterable

# Control characters, lone surrogates, and what changes lines or the direction of the text.
HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


class UserError(Exception):
    """What the user asked for cannot be done; the message says what to do (exit code 2)."""


class ConfigError(UserError):
    """Fields of a config contradict each other, or the data.

    The message begins with --config.PATH=VALUE; `others` are the paths of further fields that the
    contradiction is about.
    """

    def __init__(self, message: str, *others: str) -> None:
        self.others = others
        super().__init__(message)


class RunError(Exception):
    """The run itself went wrong, as a loss that is not finite does (exit code 1)."""


def printable(text: str, lines: bool = False) -> str:
    """Return `text` with every control character in a visible form, such as \\x1b.

    A run directory, a data set or a file name may be a stranger's: nothing in them may reach the
    terminal as a command, reverse the text or start a line of its own.

    Args:
      text: the text.
      lines: keep line breaks, of a text that the program itself laid out in lines.
    """

    def visible(match: re.Match[str]) -> str:
        character = match[0]
        if lines and character == "\n":
            return character
        return character.encode("unicode_escape").decode("ascii")

    return HIDDEN.sub(visible, text)


def nearest(word: str, words: Iterable[str]) -> str:
    """Return a hint such as `; did you mean "steps"?`, or the whole choice where none is near."""
    words = sorted(words)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; there are: {', '.join(words)}" if words else ""


def one_line(error: BaseException, length: int = 200) -> str:
    """Return the end of what an error says, where the file system's own words are."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"...{text[-length:]}"


class NonFinite(RunError):
    """Images hold values that are not finite, so there is no picture of them."""


class MissingData(UserError):
    """The data set is not at hand and cannot be had; a fallback may take its place."""
