"""Configs: frozen dataclasses of fields and sections, which the command line can change.

A field is a value (see `fields`) or a section. A section is a dataclass, such as a Flax module, or
a union of dataclasses, which are its alternatives. A field is named by its path, such as
`task.network.channels`. On the command line,

    --config.task.network.channels=64    sets a field
    --config.task.network=dit            chooses an alternative of a section
    --config.data=folder:PATH            sets the field `name` of a section

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
NAMES = {"DiT": "dit"}  # classes whose name on the command line is not in snake case
MAX_SUGGESTIONS = 3  # largest number of paths in an error message
T = TypeVar("T")
Setting: TypeAlias = Any  # a section or the value of a field
Alternatives: TypeAlias = Mapping[str, Sequence[Setting]]  # sections by their path


class Field(NamedTuple):
    """A field of a config that is not a section.

    Attributes:
      path: Names of the sections and of the field, separated by dots.
      value: Value of the field.
      hint: Annotation of the field.
      marks: Marks of the field and of the sections that contain it.
      owner: Class of the section that contains the field.
    """

    path: str
    value: Setting
    hint: Hint
    marks: frozenset[str]
    owner: type

    @property
    def help(self) -> str:
        """The entry of the field under "Attributes:" in the docstring of its class, or ""."""
        return _attributes(self.owner).get(self.path.rpartition(".")[2], "")


def hints_of(cls: type) -> dict[str, Hint]:
    """Return the annotations of the fields of a section's class, without those of Flax."""
    return _hints_of(cls)


@functools.cache
def _hints_of(cls: type) -> dict[str, Hint]:
    hints = typing.get_type_hints(cls, include_extras=True)
    skipped = FLAX_FIELDS if hasattr(cls, "setup") and hasattr(cls, "apply") else set()
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    return {name: hints[name] for name in names if name not in skipped}


def alternatives_of(hint: Hint) -> tuple[type, ...]:
    """Return the classes in the annotation of a section; () for a field with a value."""
    bare = bare_type(hint)
    args = typing.get_args(bare) if _is_union(bare) else (bare,)
    return tuple(
        a for a in map(bare_type, args) if isinstance(a, type) and dataclasses.is_dataclass(a)
    )


def _is_union(hint: Hint) -> bool:
    return origin_of(hint) in (typing.Union, types.UnionType)


def choice_name(section: Setting) -> str:
    """Return the name of an alternative on the command line, such as linear_betas."""
    if section is None:
        return "none"
    name = (section if isinstance(section, type) else type(section)).__name__
    return NAMES.get(name, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())


def is_section(value: Setting, hint: Hint) -> bool:
    """Return whether a field is a section, by its value or its annotation."""
    if BOUND in marks_of(hint):  # the user can set no field of it
        return False
    return (dataclasses.is_dataclass(value) and not isinstance(value, type)) or bool(
        alternatives_of(hint)
    )


def fields_of(
    config: Setting, prefix: str = "", marks: frozenset[str] = frozenset()
) -> Iterator[Field]:
    """Yield the fields of a config and of its sections, with `prefix` before their paths."""
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
    """Yield (path, section, annotation) for the sections of a config and their sections."""
    if config is None:
        return
    for name, hint in hints_of(type(config)).items():
        value = getattr(config, name)
        if is_section(value, hint):
            yield prefix + name, value, hint
            yield from sections_of(value, f"{prefix}{name}.")


def _attributes(cls: type) -> dict[str, str]:
    """Return the entries under "Attributes:" in the docstrings of a class and its bases."""
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
    """Return the paths of the fields with a mark, or in a section with the mark."""
    value = config() if isinstance(config, type) else config
    return {field.path for field in fields_of(value) if mark in field.marks}


def values_by_path(config: Setting) -> dict[str, Setting]:
    """Return the values of all fields and the names of chosen alternatives, by their paths."""
    values = {field.path: field.value for field in fields_of(config) if BOUND not in field.marks}
    for path, section, hint in sections_of(config):
        if has_choice(hint):
            values[path] = choice_name(section)
    return values


def has_choice(hint: Hint) -> bool:
    """Return whether a section has at least two alternatives."""
    bare = bare_type(hint)
    return _is_union(bare) and len(typing.get_args(bare)) > 1


def get(config: Setting, path: str) -> Setting:
    """Return the field or section at `path`."""
    return functools.reduce(getattr, path.split("."), config)


def replace(config: T, values: Mapping[str, Setting]) -> T:
    """Return `config` with fields or sections replaced by their paths, sections first."""
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
    """Return `config` with the values that the user has set.

    Args:
      config: A frozen dataclass of fields and sections.
      texts: Texts by path, such as {"train.steps": "100"} for `--config.train.steps=100`.
      debug: Values of fields, or sections, by path. They are set after the choice of alternatives
        and before the other `texts`. Paths that the chosen sections do not have are ignored.
      alternatives: Tuned alternatives of the experiment by the path of their section.

    Raises:
      UserError: If a field or alternative is unknown, a value is not of the type of its field or is
        out of range, or a field is set by the program.
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
    """Return whether `path` is a section of an alternative in `choices`."""
    parent = path.rpartition(".")[0]
    if parent not in choices:
        return False
    chosen = _choose(config, parent, choices[parent], alternatives)
    return path in {path for path, _, _ in sections_of(chosen)}


def _choose(config: T, path: str, text: str, alternatives: Alternatives) -> T:
    """Return `config` with an alternative chosen at `path`, or the field `name` set there."""
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
        raise UserError(f"{flag} follows from the data set and cannot be set; leave it out")
    if FROM_PARTS in field.marks:
        raise UserError(f"{flag} follows from the parts and cannot be set; leave it out")
    try:
        value = parse(text, field.hint)
    except ValueError as error:
        raise UserError(f"{flag}={text}: {error}") from None
    if PATH in field.marks:
        expand_path(flag, text.removeprefix("folder:"))
    return value


def settable(config: Setting) -> list[str]:
    """Return the paths that the command line can set: first fields, then sections."""
    paths = [field.path for field in fields_of(config) if not SET_BY_PROGRAM & field.marks]
    return paths + [path for path, _, _ in sections_of(config)]


def paths_named(config: Setting, name: str) -> list[str]:
    """Return the paths that the command line can set and whose last word is `name`."""
    return [path for path in settable(config) if path == name or path.endswith(f".{name}")]


def _unknown(config: Setting, path: str) -> str:
    """Return the error message of an unknown path, which suggests at most three others."""
    known = settable(config)
    message = f'unknown field "--config.{path}"'
    for section, value, hint in sections_of(config):
        name = path.removeprefix(f"{section}.")
        others = [cls for cls in alternatives_of(hint) if cls is not type(value)]
        owner = next((cls for cls in others if name in hints_of(cls)), None)
        if path.startswith(f"{section}.") and owner:
            return (
                f"--config.{path} is a field of {choice_name(owner)}, and --config.{section} is "
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
    """Return the path in `text`, with `~` and `~user` replaced by the home directory.

    Args:
      flag: The flag with the path, for error messages.
      text: The path.

    Raises:
      UserError: If there is no such user, or if the path is too long for the system.
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
            raise UserError(f"{flag}={text}: is not a path: {reason}; give a shorter one") from None
    return path
