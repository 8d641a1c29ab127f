"""Fields of a config: their marks and ranges, and how a text or a value of JSON becomes a value.

A field's annotation says what it takes. `int`, `float`, `bool`, `str`, `Literal[...]`,
`tuple[int, ...]` and `... | None` are parsed; `Annotated[int, AtLeast(1)]` is checked too.
`Annotated[..., MAY_CHANGE]` may change when a run is resumed, and `Annotated[..., BOUND]` is set
by the program.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

Hint: TypeAlias = Any  # an annotation: a type, or what `typing` makes of several
Json: TypeAlias = Any  # what `json` reads and writes
Value: TypeAlias = int | float | bool | str | tuple[object, ...] | None  # of a field


# Bounds are dataclasses, which are equal only to their own kind: Python 3.11.2 gives equal
# annotations one object, so that with tuples `at least 0` became `more than 0`.
@dataclasses.dataclass(frozen=True)
class AtLeast:
    """A lower bound of a number, itself allowed."""

    low: float | int


@dataclasses.dataclass(frozen=True)
class MoreThan:
    """A lower bound of a number, itself not allowed."""

    low: float | int


@dataclasses.dataclass(frozen=True)
class AtMost:
    """An upper bound of a number, itself allowed."""

    high: float | int


Mark: TypeAlias = str | AtLeast | MoreThan | AtMost


class FieldError(ValueError):
    """Fields of a section contradict each other, or the data.

    The message begins with a field and its value, such as "channels=30: must divide by 4".

    Attributes:
      others: Further fields that the contradiction is about; the one that the user set is named.
    """

    def __init__(self, message: str, *others: str) -> None:
        self.others = others
        super().__init__(message)


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
    """Put the name of a section before the fields that a FieldError names.

    Raises:
      FieldError: the body raised one.
    """
    try:
        yield
    except FieldError as error:
        others = [f"{name}.{field}" for field in error.others]
        raise FieldError(f"{name}.{error}", *others) from None


LARGEST_INT = 2**31 - 1  # that a program counts with
SMALLEST_FLOAT, LARGEST_FLOAT = 1.2e-38, 3.4e38  # positive ones that float32 holds
BOUND = "bound"  # set from the data set, the batch size or the precision; not recorded
FROM_PARTS = "from parts"  # from what was trained before, and is built on
MAY_CHANGE = "may change on resuming"
OR_NONE = "an empty tuple means none"
PATH = "path"  # of a run, or a word in its place
Count = Annotated[int, AtLeast(1)]
Layers = Annotated[int, AtLeast(1), AtMost(1000)]  # that a network is built of, one after another
MoreLayers = Annotated[int, AtLeast(0), AtMost(1000)]  # the same, or none
Few = Annotated[int, AtLeast(1), AtMost(1000)]  # copies of each example of a batch
SampleSteps = Annotated[int, AtLeast(1), AtMost(1e6), MAY_CHANGE]  # of a sampler
NoiseSteps = Annotated[int, AtLeast(2), AtMost(1e6)]  # of a table of betas
EvalTimes = Annotated[int, AtLeast(1), AtMost(1e6)]  # at which an image is evaluated
RunPath = Annotated[str, PATH, MAY_CHANGE]
HOST_IMAGES = "images that the host's memory holds"
EVAL_BATCH = "images of a batch of an evaluation"
NumSamples = Annotated[int, AtLeast(1), HOST_IMAGES, MAY_CHANGE]
NumSamplesBetween = Annotated[int, AtLeast(0), HOST_IMAGES, MAY_CHANGE]  # 0: none
EvalBatch = Annotated[int, AtLeast(1), EVAL_BATCH]
Positive = Annotated[float, MoreThan(0.0)]
NonNegative = Annotated[float, AtLeast(0.0)]
Share = Annotated[float, AtLeast(0.0), AtMost(0.99999)]  # as of dropout; never all
Length = Annotated[int, AtLeast(1), MAY_CHANGE]  # a number of steps, or of images to report on
Interval = Annotated[int, AtLeast(0), MAY_CHANGE]  # 0: only at the end

# Validation images; none: the data set's own, or else a tenth of the training images, at most
# 5,000; 0: every training image is trained on, and nothing is evaluated before the end.
ValidationImages = Annotated[int, AtLeast(0)] | None


def origin_of(hint: Hint) -> object:
    """Return what an annotation is made of, such as Literal, Union or tuple; None of a class."""
    origin: object = typing.get_origin(hint)
    return origin


def notes(hint: Hint) -> tuple[Mark, ...]:
    """Return the marks and bounds of an annotation: what follows the type in `Annotated`."""
    return tuple(hint.__metadata__) if origin_of(hint) is Annotated else ()


def bare_type(hint: Hint) -> Hint:
    """Return the type of an annotation, without its marks and bounds."""
    return hint.__origin__ if origin_of(hint) is Annotated else hint


def type_name(hint: Hint) -> str:
    """Return how `--help` writes the type of a field, such as int,... or eps|x0|v."""
    bare = bare_type(hint)
    if origin_of(bare) is Literal:
        return "|".join(str(value) for value in typing.get_args(bare))
    if origin_of(bare) in (typing.Union, types.UnionType):
        return "|".join(type_name(arg) for arg in typing.get_args(bare)).replace("NoneType", "none")
    if origin_of(bare) is tuple:
        names = [type_name(arg) for arg in typing.get_args(bare) if arg is not Ellipsis]
        return ",".join(names + ["..."] * (Ellipsis in typing.get_args(bare)))
    return bare.__name__ if isinstance(bare, type) else str(bare)


def parse(text: str, hint: Hint) -> Value:
    """Read `text` as a value of the annotated type `hint`.

    Raises:
      ValueError: it is not one, or out of range; the message says what is allowed.
    """
    if OR_NONE in notes(hint) and text.strip().lower() in ("", "()", "none"):
        return ()
    value = _read(text, bare_type(hint))
    _check_range(value, hint)
    return value


def _check_range(value: Value, hint: Hint) -> None:
    """Raise ValueError unless a number is in the range of its annotation, and of a program's."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    for note in notes(hint):
        if isinstance(note, AtLeast) and not value >= note.low:
            raise ValueError(f"must be at least {note.low:g}")
        if isinstance(note, MoreThan) and not value > note.low:
            raise ValueError(f"must be more than {note.low:g}")
        if isinstance(note, AtMost) and not value <= note.high:
            raise ValueError(f"must be at most {note.high:g}")
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise ValueError(f"must be at most {LARGEST_INT:,}")
    if isinstance(value, float) and value and not SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT:
        raise ValueError(
            f"must be a number that float32 holds: from {SMALLEST_FLOAT:g} to {LARGEST_FLOAT:g} "
            "in size, or 0"
        )


def _read(text: str, hint: Hint) -> Value:
    origin, args = origin_of(hint), typing.get_args(hint)
    if origin is Literal:
        choices: dict[str, Value] = {str(choice): choice for choice in args}
        if text in choices:
            return choices[text]
        raise ValueError(f"must be one of {', '.join(map(str, args))}")
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none":
            return None
        (inner,) = (arg for arg in args if arg is not type(None))
        return parse(text, inner)
    if origin is tuple:
        words = [word for word in text.strip("()[] ").split(",") if word.strip()]
        if not words:
            raise ValueError("must be one value or more, with commas between them")
        item = args[0]
        if args[-1] is not Ellipsis and len(words) != len(args):
            raise ValueError(f"must be {len(args)} values with commas between them")
        return tuple(parse(word.strip(), item) for word in words)
    if hint is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in known:
            raise ValueError("must be true or false")
        return known[text.lower()]
    if hint is int:
        try:
            if text.strip("+-").isdecimal() and len(text) > 4000:  # more than Python reads
                return LARGEST_INT + 1
            value = float(text) if "e" in text.lower() else int(text)  # 1e5 and 100_000 too
            if value != int(value):
                raise ValueError
        except (ValueError, OverflowError):
            raise ValueError("must be a whole number") from None
        return int(value)
    if hint is float:
        try:
            number = float(text)
        except ValueError:
            raise ValueError("must be a number") from None
        _check_range(number, float)
        return number
    return text


def from_record(value: Json, hint: Hint) -> Value:
    """Return a value of JSON as one of the annotated type `hint`.

    Raises:
      ValueError: it is not one, or out of range; the message says what is allowed.
    """
    bare = bare_type(hint)
    origin, args = origin_of(bare), typing.get_args(bare)
    if origin is Literal:
        if type(value) not in map(type, args) or value not in args:
            raise ValueError(f"must be one of {', '.join(map(str, args))}")
    elif origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (arg for arg in args if arg is not type(None))
        return from_record(value, inner)
    elif origin is tuple:
        endless = args[-1] is Ellipsis
        if not isinstance(value, list | tuple) or not (endless or len(value) == len(args)):
            raise ValueError("must be a list" + ("" if endless else f" of {len(args)} values"))
        items = [args[0]] * len(value) if endless else args
        return tuple(from_record(item, kind) for item, kind in zip(value, items, strict=True))
    else:
        allowed = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}[bare]
        if type(value) not in allowed:
            raise ValueError(f"must be {_NAMES[bare]}")
        if bare is float:
            if abs(value) > LARGEST_FLOAT:
                raise ValueError(f"must be at most {LARGEST_FLOAT:g}")
            value = float(value)
        if bare is str and any(ord(letter) < 32 for letter in value):
            raise ValueError("must be a text without control characters")
    result: Value = value
    _check_range(result, hint)
    return result


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def shorten(value: object, length: int = 60) -> str:
    """Return a value as a message shows it."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # more digits or levels than Python writes
        return "too large to show"
    return text if len(text) <= length else f"{text[:length]}..."
