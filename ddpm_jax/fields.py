"""Types, ranges and marks of config fields, and the conversion of texts and JSON to values.

A field is one value of a config. The annotation of a field states the type: `int`, `float`, `bool`,
`str`, `Literal[...]`, `tuple[int, ...]` or `... | None`. `Annotated` adds bounds and marks to the
type. A bound is a limit of the range, as in `Annotated[int, AtLeast(1)]`. A mark is a property of
the field: the user may change a field with the mark MAY_CHANGE when a run (a training) is resumed,
and the program sets a field with the mark BOUND.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

Hint: TypeAlias = Any  # an annotation: a class, or an expression such as int | None
Json: TypeAlias = Any  # a value that `json` reads or writes
Value: TypeAlias = int | float | bool | str | tuple[object, ...] | None  # the value of a field


# Bounds are dataclasses, because AtLeast(1) and AtMost(1) must not be equal, as named tuples would
# be: Python 3.11.2 reuses an earlier annotation that is equal to a new one.
@dataclasses.dataclass(frozen=True)
class AtLeast:
    """An inclusive lower bound of a number."""

    low: float | int


@dataclasses.dataclass(frozen=True)
class MoreThan:
    """An exclusive lower bound of a number."""

    low: float | int


@dataclasses.dataclass(frozen=True)
class AtMost:
    """An inclusive upper bound of a number."""

    high: float | int


Mark: TypeAlias = str | AtLeast | MoreThan | AtMost


class FieldError(ValueError):
    """An error about fields of a section that contradict each other or the data set.

    The message begins with a field and its value, such as "channels=30: must be divisible by 4".

    Attributes:
      others: Names of the other fields of the contradiction. If the user has set one of these
        fields, the message that is printed begins with that field.
    """

    def __init__(self, message: str, *others: str) -> None:
        self.others = others
        super().__init__(message)


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
    """Add the name of a section before the field names in a FieldError of the `with` block.

    Raises:
      FieldError: If the `with` block raises a FieldError.
    """
    try:
        yield
    except FieldError as error:
        others = [f"{name}.{field}" for field in error.others]
        raise FieldError(f"{name}.{error}", *others) from None


LARGEST_INT = 2**31 - 1  # the largest int32
SMALLEST_FLOAT, LARGEST_FLOAT = 1.2e-38, 3.4e38  # absolute values of normal float32 numbers
BOUND = "bound"  # set by `Task.bind` from data set, batch size and precision; not in config.json
FROM_PARTS = "from parts"  # set from the runs of the text encoder and the autoencoder
MAY_CHANGE = "may change on resuming"
EMPTY_ALLOWED = "an empty tuple means none"
PATH = "path"  # a path, or a name that stands for a path
Count = Annotated[int, AtLeast(1)]
Layers = Annotated[int, AtLeast(1), AtMost(1000)]  # number of layers or blocks of a network
OptionalLayers = Annotated[int, AtLeast(0), AtMost(1000)]  # number of layers; 0 means none
Copies = Annotated[int, AtLeast(1), AtMost(1000)]  # number of copies of each example in a batch
SampleSteps = Annotated[int, AtLeast(1), AtMost(1e6), MAY_CHANGE]  # number of sampling steps
NoiseSteps = Annotated[int, AtLeast(2), AtMost(1e6)]  # T of a discrete noise schedule
EvalTimes = Annotated[int, AtLeast(1), AtMost(1e6)]  # diffusion times per image in evaluations
RunPath = Annotated[str, PATH, MAY_CHANGE]
HOST_IMAGES = "number of images in the memory of the host"
EVAL_BATCH = "number of images of an evaluation batch"
NumSamples = Annotated[int, AtLeast(1), HOST_IMAGES, MAY_CHANGE]
NumSamplesBetween = Annotated[int, AtLeast(0), HOST_IMAGES, MAY_CHANGE]  # 0: no sampling
EvalBatch = Annotated[int, AtLeast(1), EVAL_BATCH]
Positive = Annotated[float, MoreThan(0.0)]
NonNegative = Annotated[float, AtLeast(0.0)]
Share = Annotated[float, AtLeast(0.0), AtMost(0.99999)]  # less than 1, such as a dropout rate
Length = Annotated[int, AtLeast(1), MAY_CHANGE]  # number of steps or of images
Interval = Annotated[int, AtLeast(0), MAY_CHANGE]  # in steps; 0: only after the last step

# Number of validation images. None: the validation split of the data set is used; if the data set
# does not have one, a tenth of the training images is used, at most 5,000. 0: there is no
# validation split, and training is not interrupted by evaluations.
ValidationImages = Annotated[int, AtLeast(0)] | None


def origin_of(hint: Hint) -> object:
    """Return Literal, Union or tuple, the form of an annotation; return None for a class."""
    origin: object = typing.get_origin(hint)
    return origin


def marks_of(hint: Hint) -> tuple[Mark, ...]:
    """Return the marks and bounds in `Annotated[type, ...]`; return () for other annotations."""
    return tuple(hint.__metadata__) if origin_of(hint) is Annotated else ()


def bare_type(hint: Hint) -> Hint:
    """Return the type in an annotation, without `Annotated` and its marks and bounds."""
    return hint.__origin__ if origin_of(hint) is Annotated else hint


def type_name(hint: Hint) -> str:
    """Return the text for a type in `--help`, such as "int,..." or "eps|x0|v"."""
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
    """Convert `text`, the value of a command-line flag, to the annotated type `hint`.

    Raises:
      ValueError: If the text is not a value of the type, or is outside the range of the annotation.
        The message states what is allowed.
    """
    if EMPTY_ALLOWED in marks_of(hint) and text.strip().lower() in ("", "()", "none"):
        return ()
    value = _read(text, bare_type(hint))
    _check_range(value, hint)
    return value


def _check_range(value: Value, hint: Hint) -> None:
    """Raise ValueError if a number is outside the bounds of `hint` or the range of its type.

    The types are int32 and float32. Values that are not numbers are not checked.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    for note in marks_of(hint):
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
            f"must be 0, or have an absolute value that float32 holds: from {SMALLEST_FLOAT:g} to "
            f"{LARGEST_FLOAT:g}"
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
            raise ValueError("must be one value or more, separated by commas")
        item = args[0]
        if args[-1] is not Ellipsis and len(words) != len(args):
            raise ValueError(f"must be {len(args)} values, separated by commas")
        return tuple(parse(word.strip(), item) for word in words)
    if hint is bool:
        values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in values:
            raise ValueError("must be true or false")
        return values[text.lower()]
    if hint is int:
        try:
            # int() raises an error for texts of more than 4,300 digits.
            if text.strip("+-").isdecimal() and len(text) > 4000:
                return LARGEST_INT + 1
            value = float(text) if "e" in text.lower() else int(text)  # also 1e5 and 100_000
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


def from_json(value: Json, hint: Hint) -> Value:
    """Convert a value that is read from JSON to the annotated type `hint`; a list to a tuple.

    Raises:
      ValueError: If the value is not of the type, or is outside the range of the annotation. The
        message states what is allowed.
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
        return from_json(value, inner)
    elif origin is tuple:
        any_length = args[-1] is Ellipsis
        if not isinstance(value, list | tuple) or not (any_length or len(value) == len(args)):
            raise ValueError("must be a list" + ("" if any_length else f" of {len(args)} values"))
        item_hints = [args[0]] * len(value) if any_length else args
        return tuple(from_json(item, h) for item, h in zip(value, item_hints, strict=True))
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
    """Return the text of a value, cut off after `length` characters, for an error message."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # the value has too many digits or nested lists
        return "too large to show"
    return text if len(text) <= length else f"{text[:length]}..."
