"""Byte tokenizer of captions, for all languages and without a vocabulary file.

Each token is one byte of the text in UTF-8.  Token 0 is padding, so characters with code 0 are
removed from texts.
"""

from collections.abc import Iterable

import numpy as np

PADDING = 0


def tokenize(texts: Iterable[str], length: int) -> np.ndarray:
    """Return the tokens of texts, uint8 [texts, length], truncated or padded to `length`.

    A text is truncated between two characters, not within the bytes of a character.
    """
    rows = [_bytes(text)[: length + 1] for text in texts]
    tokens = np.full((len(rows), length), PADDING, np.uint8)
    for row, content in zip(tokens, rows, strict=True):
        if len(content) > length:  # in UTF-8, only the first byte of a character is not 10xxxxxx
            end = length
            while end and content[end] & 0xC0 == 0x80:
                end -= 1
            content = content[:end]
        row[: len(content)] = np.frombuffer(content, np.uint8)
    return tokens


MAX_LENGTH = 256  # the largest number of tokens of a caption of a data set


def padded_length(texts: Iterable[str]) -> int:
    """Return the number of tokens of the longest caption, rounded up to a multiple of 16.

    The result is at most `MAX_LENGTH`; longer captions are truncated.
    """
    longest = max((size(text) for text in texts), default=0)
    return min(-(-max(longest, 1) // 16) * 16, MAX_LENGTH)


def untokenize(tokens: np.ndarray) -> list[str]:
    """Return the texts of tokens, uint8 [texts, length], without padding."""
    return [bytes(row[row != PADDING]).decode(errors="replace") for row in tokens]


def size(text: str) -> int:
    """Return the number of tokens of a text before truncation and padding."""
    return len(_bytes(text))


def _bytes(text: str) -> bytes:
    return text.replace("\0", "").encode(errors="replace")  # UTF-8 cannot encode lone surrogates
