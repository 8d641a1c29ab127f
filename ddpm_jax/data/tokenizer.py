"""Captions as bytes: a tokenizer of any language without a vocabulary file.

Token b is byte b of the text in UTF-8; 0, which a text does not hold, is padding.  Numpy alone.
"""

from collections.abc import Iterable

import numpy as np

PADDING = 0


def tokenize(texts: Iterable[str], length: int) -> np.ndarray:
    """Return texts as rows of bytes [texts, length] uint8, cut at a character and padded."""
    rows = [_bytes(text)[: length + 1] for text in texts]
    tokens = np.full((len(rows), length), PADDING, np.uint8)
    for row, content in zip(tokens, rows, strict=True):
        if len(content) > length:  # not within a character: its first byte is not 10xxxxxx
            end = length
            while end and content[end] & 0xC0 == 0x80:
                end -= 1
            content = content[:end]
        row[: len(content)] = np.frombuffer(content, np.uint8)
    return tokens


LONGEST = 256  # tokens of a data set's captions, at the most


def fitting(texts: Iterable[str]) -> int:
    """Return how many tokens a data set's captions need, in sixteens, up to `LONGEST`."""
    longest = max((size(text) for text in texts), default=0)
    return min(-(-max(longest, 1) // 16) * 16, LONGEST)


def untokenize(tokens: np.ndarray) -> list[str]:
    """Return the texts of tokens [texts, length], as far as they were not cut."""
    return [bytes(row[row != PADDING]).decode(errors="replace") for row in tokens]


def size(text: str) -> int:
    """Return how many tokens the whole of a text has."""
    return len(_bytes(text))


def _bytes(text: str) -> bytes:
    return text.replace("\0", "").encode(errors="replace")  # lone surrogates are not UTF-8
