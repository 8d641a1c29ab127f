"""An experiment's `Config`: a frozen dataclass whose fields the command line overrides.

A field's annotation says what it takes.  `int`, `float`, `bool`, `str`, `Literal[...]`,
`tuple[int, ...]` and `... | None` are parsed; `Annotated[int, AtLeast(1)]` is checked too,
and `Annotated[..., FROM_DATA]` is set from the data set and cannot be overridden.

A field whose value may change when a run is resumed (a length or an interval: it says
nothing of what is trained, only for how long and how often something is told) is
annotated `MAY_CHANGE`.
"""

import dataclasses
import errno
import math
import os
import pathlib
import types
import typing
from typing import Annotated, Any, Literal

from ddpm_jax.errors import UserError, nearest
from ddpm_jax.fields import (
    FROM_DATA,
    FROM_PARTS,
    LARGEST_FLOAT,
    LARGEST_INT,
    MAY_CHANGE,
    PATH,
    SMALLEST_FLOAT,
    AtLeast,
    AtMost,
    Count,
    Interval,
    Length,
    Levels,
    MoreThan,
    NonNegative,
    Positive,
    Shape,
    Share,
    ValidationImages,
)


def fields(config: Any) -> dict[str, Any]:
    """The annotation of every field, by name."""
    cls = config if isinstance(config, type) else type(config)
    return typing.get_type_hints(cls, include_extras=True)


def marked(config: Any, mark: str) -> set[str]:
    """The names of the fields that are annotated with `mark`."""
    return {name for name, hint in fields(config).items() if mark in _notes(hint)}


def override(config: Any, texts: dict[str, str]) -> Any:
    """Replace fields of `config` by what the user typed.

    Args:
      config: a frozen dataclass.
      texts: field name -> text, as in `--config.steps=100`.

    Raises:
      UserError: an unknown field (with the nearest one), a value that is not of the
        field's type or out of its range, or a field that the data set decides.
    """
    hints = fields(config)
    values = {}
    for name, text in texts.items():
        if name not in hints:
            raise UserError(f'unknown field "--config.{name}"{nearest(name, hints)}')
        if FROM_DATA in _notes(hints[name]):
            raise UserError(f"--config.{name} follows from the data set and cannot be set")
        if FROM_PARTS in _notes(hints[name]):
            raise UserError(f"--config.{name} follows from the parts and cannot be set")
        try:
            values[name] = _parse(text, hints[name])
        except ValueError as error:
            raise UserError(f"--config.{name}={text}: {error}") from None
        if name == "data" or PATH in _notes(hints[name]):
            expanded(f"--config.{name}", text.removeprefix("folder:"))
    return dataclasses.replace(config, **values)


def expanded(flag: str, text: str) -> pathlib.Path:
    """The path that a flag gives, `~` and `~user` replaced by the home directory.

    Raises:
      UserError: there is no such user, or the system takes no path of that length.
    """
    try:
        path = pathlib.Path(text).expanduser()
        os.lstat(path)
    except RuntimeError:
        name = text.partition("/")[0]
        raise UserError(f"{flag}={text}: there is no home directory of {name}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{flag}={text}: is not a path: {reason}; give a shorter one") from None
    return path


def describe(cls: type) -> list[tuple[str, str, str]]:
    """(field, type, default) of every field that can be overridden, for `--help`."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    return [
        (name, _type_name(hint), str(defaults[name]))
        for name, hint in fields(cls).items()
        if not {FROM_DATA, FROM_PARTS} & set(_notes(hint))
    ]


def _notes(hint: Any) -> tuple:
    return hint.__metadata__ if typing.get_origin(hint) is Annotated else ()


def _bare(hint: Any) -> Any:
    return hint.__origin__ if typing.get_origin(hint) is Annotated else hint


def _type_name(hint: Any) -> str:
    bare = _bare(hint)
    if typing.get_origin(bare) is Literal:
        return "|".join(str(value) for value in typing.get_args(bare))
    if typing.get_origin(bare) in (typing.Union, types.UnionType):
        return "|".join(_type_name(arg) for arg in typing.get_args(bare)).replace(
            "NoneType", "none"
        )
    if typing.get_origin(bare) is tuple:
        names = [_type_name(arg) for arg in typing.get_args(bare) if arg is not Ellipsis]
        return ",".join(names + ["..."] * (Ellipsis in typing.get_args(bare)))
    return bare.__name__ if isinstance(bare, type) else str(bare)


def _parse(text: str, hint: Any) -> Any:
    """Read `text` as a value of the annotated type `hint`; ValueError says what is wrong."""
    value = _read(text, _bare(hint))
    _check_range(value, hint)
    return value


def _check_range(value: Any, hint: Any) -> None:
    """Raises ValueError unless a number is in the range of its annotation, and of a program's."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    for note in _notes(hint):
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


def _read(text: str, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        for choice in args:
            if text == str(choice):
                return choice
        raise ValueError(f"must be one of {', '.join(map(str, args))}")
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none":
            return None
        (inner,) = (arg for arg in args if arg is not type(None))
        return _parse(text, inner)
    if origin is tuple:
        words = [word for word in text.strip("()[] ").split(",") if word.strip()]
        if not words:
            raise ValueError("must be one value or more, with commas between them")
        item = args[0]
        if args[-1] is not Ellipsis and len(words) != len(args):
            raise ValueError(f"must be {len(args)} values with commas between them")
        return tuple(_parse(word.strip(), item) for word in words)
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


@dataclasses.dataclass(frozen=True)
class Training:
    """The fields that every trained experiment has: what means the same is named the same.

    Changing `steps` of a run that decays its learning rate changes the decay, too.
    """

    data: str = "digits"
    validation: ValidationImages = None
    steps: Length = 1000
    batch_size: Count = 128
    learning_rate: Positive = 1e-3
    warmup: Annotated[int, AtLeast(0)] = 0  # steps of linear warm-up
    decay: Literal["none", "cosine"] = "none"  # to 0 at the last step
    optimizer: Literal["adam", "muon"] = "adam"  # Muon: of matrices, beside Adam of the rest
    beta2: Share = 0.999  # of Adam
    weight_decay: NonNegative = 0.0  # AdamW's; 0 is Adam
    clip: NonNegative = 0.0  # of the gradient's global norm; 0: none
    ema_half_life: NonNegative = 0.0  # in images; 0: no averaging
    ema_others: tuple[NonNegative, ...] = ()  # half-lives of further averages
    ema_power: tuple[Positive, ...] = ()  # widths of power-function averages, after those
    ema: Annotated[int, AtLeast(0), MAY_CHANGE] = 0  # which of them is evaluated and drawn from
    log_every: Annotated[int, AtLeast(1), MAY_CHANGE] = 100
    eval_every: Interval = 0
    checkpoint_every: Interval = 0
    steps_per_call: Count = 1  # steps that one dispatch runs on the device
    accumulate: Annotated[int, AtLeast(1), MAY_CHANGE] = 1  # parts that a batch is taken in
    precision: Literal["float32", "bfloat16"] = "float32"  # that networks compute in
    skip_nonfinite: Annotated[int, AtLeast(0), MAY_CHANGE] = 0  # steps in a row; 0: stop at one
    shape: Shape = (8, 8, 1)
    levels: Levels = 17


def inside(precision: str) -> str | None:
    """The type that networks compute in, which have their inputs' by default."""
    return None if precision == "float32" else precision


def restore(cls: type, values: dict[str, Any], where: Any) -> Any:
    """A config as config.json recorded it; fields that were not there then keep their defaults.

    Raises:
      UserError: the record has fields that `cls` lacks: it is of another version; or a value
        that is not of its field's type or out of its range.
    """
    odd = set(values) - {field.name for field in dataclasses.fields(cls)}
    if odd:
        raise UserError(
            f"the run in {where} was made by another version, with fields that are no more: "
            f"{', '.join(sorted(odd))}"
        )
    hints = fields(cls)
    known = {}
    for name, value in values.items():
        try:
            known[name] = _recorded(value, hints[name])
        except ValueError as error:
            raise UserError(
                f"the config.json of the run in {where} is damaged: its {name} {error}, and is "
                f"{_short(value)}; give another run"
            ) from None
    return cls(**known)


def _recorded(value: Any, hint: Any) -> Any:
    """A value of JSON as one of the annotated type `hint`; ValueError says what is wrong."""
    bare = _bare(hint)
    origin, args = typing.get_origin(bare), typing.get_args(bare)
    if origin is Literal:
        if type(value) not in map(type, args) or value not in args:
            raise ValueError(f"must be one of {', '.join(map(str, args))}")
    elif origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (arg for arg in args if arg is not type(None))
        return _recorded(value, inner)
    elif origin is tuple:
        endless = args[-1] is Ellipsis
        if not isinstance(value, list | tuple) or not (endless or len(value) == len(args)):
            raise ValueError("must be a list" + ("" if endless else f" of {len(args)} values"))
        items = [args[0]] * len(value) if endless else args
        return tuple(_recorded(item, kind) for item, kind in zip(value, items, strict=True))
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
    _check_range(value, hint)
    return value


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _short(value: Any, length: int = 60) -> str:
    """A value as a message shows it."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # more digits or levels than Python writes
        return "too large to show"
    return text if len(text) <= length else f"{text[:length]}..."
