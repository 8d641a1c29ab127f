"""Errors that the program reports in one line, and functions that format such lines."""

import difflib
import re
from collections.abc import Iterable

# Control characters, lone surrogates, and characters that break lines or reverse text.
HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


class UserError(Exception):
    """An error that the user can correct; the message states what to change (exit code 2)."""


class ConfigError(UserError):
    """An error about fields of a config that contradict each other or the data set.

    The message begins with the first field, as in "--config.PATH=VALUE: ...".

    Attributes:
      others: Paths of the other fields of the contradiction.
    """

    def __init__(self, message: str, *others: str) -> None:
        self.others = others
        super().__init__(message)


class RunError(Exception):
    """A failure during training or evaluation, such as a loss that is not finite (exit code 1)."""


def printable(text: str, lines: bool = False) -> str:
    r"""Return `text` with every control character escaped, such as \x1b.

    File names and texts in run directories and data sets may come from other people. They must not
    send commands to the terminal, reverse the direction of the text or start a new line.

    Args:
      text: The text.
      lines: If True, line breaks are not escaped, because this program has added them.
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        if lines and character == "\n":
            return character
        return character.encode("unicode_escape").decode("ascii")

    return HIDDEN.sub(escape, text)


def suggestion(word: str, words: Iterable[str]) -> str:
    """Return the end of an error message that suggests words instead of an unknown `word`.

    The text is `; did you mean "steps"?`, with the most similar of `words`. If no word is similar,
    all words are listed. If `words` is empty, the text is empty.
    """
    words = sorted(words)
    similar = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if similar:
        return f'; did you mean "{similar[0]}"?'
    return f"; there are: {', '.join(words)}" if words else ""


def one_line(error: BaseException, length: int = 200) -> str:
    """Return an error message in one line: its last `length` characters, which state the cause."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else f"...{text[-length:]}"


class NonFinite(RunError):
    """An error about an image that cannot be saved because some values are not finite."""


class MissingData(UserError):
    """An error about a data set that is neither on disk nor available for download.

    The caller may use another data set instead.
    """
