"""Configs: frozen dataclasses of fields and sections, which the command line can change.

A field has a value (see `fields`). A section is a part of a config: a dataclass, such as a Flax
module, that contains fields and sections. If the annotation of a section is a union of dataclasses,
these are its alternatives. Paths such as `task.network.channels` name fields and sections. The flag

    --config.task.network.channels=64    sets a field,
    --config.task.network=dit            chooses an alternative of a section, and
    --config.data=folder:PATH            sets the field `name` of a section.

The order of the flags does not matter: alternatives are chosen before fields are set.
"""

import dataclasses
import errno
import functools
import inspect
import os
import pathlib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from ddpm_jax.errors import UserError, suggestion
from ddpm_jax.fields import (
    BOUND,
    FROM_PARTS,
    PATH,
    Hint,
    Value,
    bare_type,
    marks_of,
    origin_of,
    parse,
)

SET_BY_PROGRAM = {BOUND, FROM_PARTS}
FLAX_FIELDS = {"parent", "name"}  # fields that Flax adds to every module
NAMES = {"DiT": "dit"}  # exceptions from snake case on the command line
MAX_SUGGESTIONS = 3  # largest number of suggested paths in an error message
T = TypeVar("T")
Setting: TypeAlias = Any  # a section or the value of a field
Alternatives: TypeAlias = Mapping[str, Sequence[Setting]]  # path of a section: possible sections


class Field(NamedTuple):
    """A field of a config, with the value of the field.

    Attributes:
      path: Names of the sections that contain the field and name of the field, joined by dots.
      value: Value of the field.
      hint: Annotation of the field.
      marks: Marks (such as BOUND) of the field and of all sections that contain the field.
      owner: Class of the innermost section that contains the field.
    """

    path: str
    value: Setting
    hint: Hint
    marks: frozenset[str]
    owner: type

    @property
    def help(self) -> str:
        """The description of the field in the docstring of its class; "" if there is none."""
        return _attributes(self.owner).get(self.path.rpartition(".")[2], "")


def hints_of(cls: type) -> dict[str, Hint]:
    """Return a dictionary from the names of a section's fields and sections to annotations."""
    return _hints_of(cls)


@functools.cache
def _hints_of(cls: type) -> dict[str, Hint]:
    hints = typing.get_type_hints(cls, include_extras=True)
    skipped = FLAX_FIELDS if hasattr(cls, "setup") and hasattr(cls, "apply") else set()
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    return {name: hints[name] for name in names if name not in skipped}


def alternatives_of(hint: Hint) -> tuple[type, ...]:
    """Return the dataclasses in the annotation of a section; return () for a field."""
    bare = bare_type(hint)
    args = typing.get_args(bare) if _is_union(bare) else (bare,)
    return tuple(
        a for a in map(bare_type, args) if isinstance(a, type) and dataclasses.is_dataclass(a)
    )


def _is_union(hint: Hint) -> bool:
    return origin_of(hint) in (typing.Union, types.UnionType)


def choice_name(section: Setting) -> str:
    """Return the name of a section or its class on the command line, such as "linear_betas"."""
    if section is None:
        return "none"
    name = (section if isinstance(section, type) else type(section)).__name__
    return NAMES.get(name, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())


def is_section(value: Setting, hint: Hint) -> bool:
    """Return True for a section, which has a dataclass as its value or in its annotation."""
    if BOUND in marks_of(hint):  # the program sets it as a single value
        return False
    return (dataclasses.is_dataclass(value) and not isinstance(value, type)) or bool(
        alternatives_of(hint)
    )


def fields_of(
    config: Setting, prefix: str = "", marks: frozenset[str] = frozenset()
) -> Iterator[Field]:
    """Yield all fields in a config and in its sections; add `prefix` and `marks` to each."""
    if config is None:
        return
    for name, hint in hints_of(type(config)).items():
        value, path = getattr(config, name), prefix + name
        all_marks = marks | {note for note in marks_of(hint) if isinstance(note, str)}
        if is_section(value, hint):
            yield from fields_of(value, f"{path}.", all_marks)
        else:
            yield Field(path, value, hint, all_marks, type(config))


def sections_of(config: Setting, prefix: str = "") -> Iterator[tuple[str, Setting, Hint]]:
    """Yield (path, section, annotation) of all sections of a config, nested sections included."""
    if config is None:
        return
    for name, hint in hints_of(type(config)).items():
        value = getattr(config, name)
        if is_section(value, hint):
            yield prefix + name, value, hint
            yield from sections_of(value, f"{prefix}{name}.")


def _attributes(cls: type) -> dict[str, str]:
    """Return the descriptions of fields, by name, in the docstrings of a class and its bases."""
    entries: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, text = (inspect.cleandoc(base.__dict__.get("__doc__") or "")).partition(
            "Attributes:\n"
        )
        for match in re.finditer(r"^  (\w[\w, ]*): ((?:.+\n?(?:^    .*\n?)*))", text, re.MULTILINE):
            for name in match[1].split(", "):
                entries[name] = " ".join(match[2].split())
    return entries


def marked_paths(config: Setting, mark: str) -> set[str]:
    """Return the paths of all fields that have a mark or are in a section with this mark."""
    value = config() if isinstance(config, type) else config
    return {field.path for field in fields_of(value) if mark in field.marks}


def values_by_path(config: Setting) -> dict[str, Setting]:
    """Return the values of all fields that are not BOUND, and the chosen alternatives, by path."""
    values = {field.path: field.value for field in fields_of(config) if BOUND not in field.marks}
    for path, section, hint in sections_of(config):
        if has_choice(hint):
            values[path] = choice_name(section)
    return values


def has_choice(hint: Hint) -> bool:
    """Return True if the annotation of a section allows at least two classes, or None."""
    bare = bare_type(hint)
    return _is_union(bare) and len(typing.get_args(bare)) > 1


def get(config: Setting, path: str) -> Setting:
    """Return the value of the field, or the section, at `path`."""
    return functools.reduce(getattr, path.split("."), config)


def replace(config: T, values: Mapping[str, Setting]) -> T:
    """Return a copy of `config` in which `values`, by path, replace fields or sections."""
    for path in sorted(values, key=lambda path: path.count(".")):
        config = _replace_one(config, path.split("."), values[path])
    return config


def _replace_one(config: Setting, names: list[str], value: Setting) -> Setting:
    name, *rest = names
    if rest:
        value = _replace_one(getattr(config, name), rest, value)
    return dataclasses.replace(config, **{name: value})


def override(
    config: T,
    texts: Mapping[str, str],
    debug: Mapping[str, Setting] | None = None,
    alternatives: Alternatives | None = None,
) -> T:
    """Return a copy of `config` with the values that the user has set.

    Args:
      config: A frozen dataclass of fields and sections.
      texts: The flags of the user: {"train.steps": "100"} for `--config.train.steps=100`.
      debug: Values by path that `--debug` sets. They replace defaults but not values in `texts`.
        Paths that the chosen sections do not have are ignored.
      alternatives: Tuned sections of the experiment, by path. If the user chooses an alternative
        that is not among them, the default values of its class are used.

    Raises:
      UserError: If a field or alternative does not exist, if a value is not of the type of the
        field or is out of range, or if the user may not set the field.
    """
    sections = {path for path, _, _ in sections_of(config)}
    choices = {path: text for path, text in texts.items() if path in sections}
    for path in sorted(set(texts) - sections, key=lambda path: path.count(".")):
        if _in_alternative(config, path, choices, alternatives or {}):
            choices[path] = texts[path]
    for path in sorted(choices, key=lambda path: path.count(".")):
        config = _choose(config, path, choices[path], alternatives or {})
    paths = {field.path for field in fields_of(config)}
    paths |= {path for path, _, _ in sections_of(config)} - choices.keys()
    config = replace(config, {path: v for path, v in (debug or {}).items() if path in paths})
    fields = {field.path: field for field in fields_of(config)}
    values = {}
    for path, text in texts.items():
        if path in choices:
            continue
        if path not in fields:
            raise UserError(_unknown(config, path))
        values[path] = _parse_field(fields[path], text)
    return replace(config, values)


def _in_alternative(
    config: Setting, path: str, choices: Mapping[str, str], alternatives: Alternatives
) -> bool:
    """Return True if the user's `choices` include an alternative that has a section at `path`."""
    parent = path.rpartition(".")[0]
    if parent not in choices:
        return False
    chosen = _choose(config, parent, choices[parent], alternatives)
    return path in {path for path, _, _ in sections_of(chosen)}


def _choose(config: T, path: str, text: str, alternatives: Alternatives) -> T:
    """Set the section at `path` to the alternative `text`, or its field `name` to `text`."""
    hint = {p: hint for p, _, hint in sections_of(config)}[path]
    section = get(config, path)
    if not has_choice(hint):
        if section is not None and "name" in hints_of(type(section)):
            field = next(f for f in fields_of(section, f"{path}.") if f.path == f"{path}.name")
            return replace(config, {f"{path}.name": _parse_field(field, text, f"--config.{path}")})
        fields = fields_of(section, f"{path}.")
        first = next(field.path for field in fields if not SET_BY_PROGRAM & field.marks)
        raise UserError(
            f"--config.{path} has several fields; set one of them, such as --config.{first}=VALUE"
        )
    if choice_name(section) == text:
        return config
    classes: dict[str, type | None] = {choice_name(cls): cls for cls in alternatives_of(hint)}
    if type(None) in typing.get_args(bare_type(hint)):
        classes["none"] = None
    if text not in classes:
        raise UserError(f'--config.{path}: there is no "{text}"{suggestion(text, classes)}')
    tuned = [section for section in alternatives.get(path, ()) if choice_name(section) == text]
    cls = classes[text]
    default = None if cls is None else cls()
    return replace(config, {path: tuned[0] if tuned else default})


def _parse_field(field: Field, text: str, flag: str | None = None) -> Value:
    flag = flag or f"--config.{field.path}"
    if BOUND in field.marks:
        raise UserError(f"{flag} follows from the data set and cannot be set; remove this flag")
    if FROM_PARTS in field.marks:
        raise UserError(f"{flag} follows from the text encoder and autoencoder; remove this flag")
    try:
        value = parse(text, field.hint)
    except ValueError as error:
        raise UserError(f"{flag}={text}: {error}") from None
    if PATH in field.marks:
        expand_path(flag, text.removeprefix("folder:"))
    return value


def settable(config: Setting) -> list[str]:
    """Return the paths that command-line flags can set: first fields, then sections."""
    paths = [field.path for field in fields_of(config) if not SET_BY_PROGRAM & field.marks]
    return paths + [path for path, _, _ in sections_of(config)]


def paths_named(config: Setting, name: str) -> list[str]:
    """Return the paths that command-line flags can set and that end with the word `name`."""
    return [path for path in settable(config) if path == name or path.endswith(f".{name}")]


def _unknown(config: Setting, path: str) -> str:
    """Return the error message for a `path` that does not exist, with similar paths."""
    known = settable(config)
    message = f'unknown field "--config.{path}"'
    for section, value, hint in sections_of(config):
        name = path.removeprefix(f"{section}.")
        others = [cls for cls in alternatives_of(hint) if cls is not type(value)]
        owner = next((cls for cls in others if name in hints_of(cls)), None)
        if path.startswith(f"{section}.") and owner:
            return (
                f"--config.{path} is a field of {choice_name(owner)}, but --config.{section} is "
                f"{choice_name(value)}; give --config.{section}={choice_name(owner)}, too"
            )
    word = path.rpartition(".")[2]
    similar = paths_named(config, word)
    if not similar:
        hint = suggestion(word, {p.rpartition(".")[2] for p in known})
        if "did you mean" in hint:
            similar = paths_named(config, re.findall(r'"(\w+)"', hint)[0])
        elif all("." not in p for p in known):
            return message + hint
    if not similar:
        return f"{message}; --help lists the fields"
    paths = " or ".join(f"--config.{p}" for p in similar[:MAX_SUGGESTIONS])
    if all("." not in p for p in similar):
        paths = f'"{similar[0]}"'
    return f"{message}; did you mean {paths}?"


def expand_path(flag: str, text: str) -> pathlib.Path:
    """Return the path `text` with `~` or `~user` replaced by the home directory of the user.

    Args:
      flag: Name of the flag that has the path as its value, for error messages.
      text: The path.

    Raises:
      UserError: If the user does not exist, or if the operating system does not accept the path.
    """
    try:
        path = pathlib.Path(text).expanduser()
        os.lstat(path)
    except RuntimeError:
        name = text.partition("/")[0]
        raise UserError(
            f"{flag}={text}: there is no home directory of {name}; give the full path"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{flag}={text}: is not a path ({reason}); give another") from None
    return path
