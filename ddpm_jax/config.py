"""Configs: frozen dataclasses of sections and fields, set from the command line and recorded.

A field of a config is a value (see `fields`) or a section: a dataclass, or a union of dataclasses
that are its alternatives. A Flax module is a section, too. Its path names a field:
`task.network.channels`. On the command line,

    --config.task.network.channels=64    sets a field
    --config.task.network=dit            chooses an alternative of a section
    --config.data=folder:PATH            sets the `name` of a section that has one

in any order: alternatives are chosen before fields are set.
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

from ddpm_jax.errors import UserError, nearest
from ddpm_jax.fields import (
    BOUND,
    FROM_PARTS,
    PATH,
    Hint,
    Value,
    bare_type,
    notes,
    origin_of,
    parse,
)

SET_BY_PROGRAM = {BOUND, FROM_PARTS}
OF_FLAX = {"parent", "name"}  # fields that Flax adds to every module
NAMES = {"DiT": "dit"}  # where snake case is another word
SHOWN = 3  # paths that an error names
T = TypeVar("T")
Setting: TypeAlias = Any  # a section or the value of a field
Alternatives: TypeAlias = Mapping[str, Sequence[Setting]]  # of sections, by their paths


class Field(NamedTuple):
    """A field of a config that is not a section.

    Attributes:
      path: names of the sections and of the field, with dots between them.
      value: what it is.
      hint: its annotation.
      marks: its marks, and those of the sections that it lies in.
      owner: the class of the section that has it.
    """

    path: str
    value: Setting
    hint: Hint
    marks: frozenset[str]
    owner: type

    @property
    def help(self) -> str:
        """What its class's docstring says of it under "Attributes:"; "" if nothing."""
        return _attributes(self.owner).get(self.path.rpartition(".")[2], "")


def hints_of(cls: type) -> dict[str, Hint]:
    """Return the annotation of every field of a section's class that is its own."""
    return _hints_of(cls)


@functools.cache
def _hints_of(cls: type) -> dict[str, Hint]:
    hints = typing.get_type_hints(cls, include_extras=True)
    skipped = OF_FLAX if hasattr(cls, "setup") and hasattr(cls, "apply") else set()
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    return {name: hints[name] for name in names if name not in skipped}


def alternatives_of(hint: Hint) -> tuple[type, ...]:
    """Return the classes of a section's annotation; () of a field that is not a section."""
    bare = bare_type(hint)
    args = typing.get_args(bare) if _is_union(bare) else (bare,)
    return tuple(
        a for a in map(bare_type, args) if isinstance(a, type) and dataclasses.is_dataclass(a)
    )


def _is_union(hint: Hint) -> bool:
    return origin_of(hint) in (typing.Union, types.UnionType)


def choice_name(section: Setting) -> str:
    """Return how an alternative is called on the command line: `LinearBetas` -> linear_betas."""
    if section is None:
        return "none"
    name = (section if isinstance(section, type) else type(section)).__name__
    return NAMES.get(name, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())


def is_section(value: Setting, hint: Hint) -> bool:
    """Return whether a field is a section, by its value or its annotation."""
    if BOUND in notes(hint):  # the program sets the whole of it
        return False
    return (dataclasses.is_dataclass(value) and not isinstance(value, type)) or bool(
        alternatives_of(hint)
    )


def fields_of(
    config: Setting, prefix: str = "", marks: frozenset[str] = frozenset()
) -> Iterator[Field]:
    """Yield every field of a config that is not a section, in order."""
    if config is None:
        return
    for name, hint in hints_of(type(config)).items():
        value, path = getattr(config, name), prefix + name
        whole = marks | {note for note in notes(hint) if isinstance(note, str)}
        if is_section(value, hint):
            yield from fields_of(value, f"{path}.", whole)
        else:
            yield Field(path, value, hint, whole, type(config))


def sections_of(config: Setting, prefix: str = "") -> Iterator[tuple[str, Setting, Hint]]:
    """Yield (path, section, annotation) of every section within a config."""
    if config is None:
        return
    for name, hint in hints_of(type(config)).items():
        value = getattr(config, name)
        if is_section(value, hint):
            yield prefix + name, value, hint
            yield from sections_of(value, f"{prefix}{name}.")


def _attributes(cls: type) -> dict[str, str]:
    """Return the entries under "Attributes:" in a class's docstring and those of its bases."""
    entries: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, text = (inspect.cleandoc(base.__dict__.get("__doc__") or "")).partition(
            "Attributes:\n"
        )
        for match in re.finditer(r"^  (\w[\w, ]*): ((?:.+\n?(?:^    .*\n?)*))", text, re.MULTILINE):
            for name in match[1].split(", "):
                entries[name] = " ".join(match[2].split())
    return entries


def marked(config: Setting, mark: str) -> set[str]:
    """Return the paths of the fields that carry `mark`, or lie in a section that does."""
    value = config() if isinstance(config, type) else config
    return {field.path for field in fields_of(value) if mark in field.marks}


def flat(config: Setting) -> dict[str, Setting]:
    """Return every field's value by its path, and the choice of every section that has several."""
    values = {field.path: field.value for field in fields_of(config) if BOUND not in field.marks}
    for path, section, hint in sections_of(config):
        if has_choice(hint):
            values[path] = choice_name(section)
    return values


def has_choice(hint: Hint) -> bool:
    """Return whether a section has alternatives."""
    bare = bare_type(hint)
    return _is_union(bare) and len(typing.get_args(bare)) > 1


def get(config: Setting, path: str) -> Setting:
    """Return the field or section at `path`."""
    return functools.reduce(getattr, path.split("."), config)


def replace(config: T, values: Mapping[str, Setting]) -> T:
    """Return `config` with the fields or sections at some paths replaced; shorter paths first."""
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
    """Return `config` with what the user typed.

    Args:
      config: a frozen dataclass of sections and fields.
      texts: path -> text, as in `--config.train.steps=100`.
      debug: values of fields, or sections, by their paths, set after the choice of sections and
        before `texts`; those that the chosen sections do not have are left out.
      alternatives: by the path of a section, the experiment's tuned alternatives of it.

    Raises:
      UserError: an unknown field or alternative, a value that is not of the field's type or out of
        its range, or a field that the program sets.
    """
    sections = {path for path, _, _ in sections_of(config)}
    choices = {path: text for path, text in texts.items() if path in sections}
    for path in sorted(set(texts) - sections, key=lambda path: path.count(".")):
        if _in_alternative(config, path, choices, alternatives or {}):
            choices[path] = texts[path]
    for path in sorted(choices, key=lambda path: path.count(".")):
        config = _choose(config, path, choices[path], alternatives or {})
    there = {field.path for field in fields_of(config)}
    there |= {path for path, _, _ in sections_of(config)} - choices.keys()
    config = replace(config, {path: v for path, v in (debug or {}).items() if path in there})
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
    """Return whether `path` is a section of an alternative that `choices` choose."""
    parent = path.rpartition(".")[0]
    if parent not in choices:
        return False
    chosen = _choose(config, parent, choices[parent], alternatives)
    return path in {path for path, _, _ in sections_of(chosen)}


def _choose(config: T, path: str, text: str, alternatives: Alternatives) -> T:
    """Return `config` with the section at `path` chosen, or its name set."""
    hint = {p: hint for p, _, hint in sections_of(config)}[path]
    section = get(config, path)
    if not has_choice(hint):
        if section is not None and "name" in hints_of(type(section)):
            field = next(f for f in fields_of(section, f"{path}.") if f.path == f"{path}.name")
            return replace(config, {f"{path}.name": _parse_field(field, text, f"--config.{path}")})
        below = fields_of(section, f"{path}.")
        first = next(field.path for field in below if not SET_BY_PROGRAM & field.marks)
        raise UserError(
            f"--config.{path} has several fields; set one of them, such as --config.{first}=VALUE"
        )
    if choice_name(section) == text:
        return config
    known: dict[str, type | None] = {choice_name(cls): cls for cls in alternatives_of(hint)}
    if type(None) in typing.get_args(bare_type(hint)):
        known["none"] = None
    if text not in known:
        raise UserError(f'--config.{path}: there is no "{text}"{nearest(text, known)}')
    tuned = [section for section in alternatives.get(path, ()) if choice_name(section) == text]
    cls = known[text]
    default = None if cls is None else cls()
    return replace(config, {path: tuned[0] if tuned else default})


def _parse_field(field: Field, text: str, flag: str | None = None) -> Value:
    flag = flag or f"--config.{field.path}"
    if BOUND in field.marks:
        raise UserError(f"{flag} follows from the data set and cannot be set")
    if FROM_PARTS in field.marks:
        raise UserError(f"{flag} follows from the parts and cannot be set")
    try:
        value = parse(text, field.hint)
    except ValueError as error:
        raise UserError(f"{flag}={text}: {error}") from None
    if PATH in field.marks:
        expanded(flag, text.removeprefix("folder:"))
    return value


def settable(config: Setting) -> list[str]:
    """Return the paths that the command line takes: of fields, then of sections."""
    paths = [field.path for field in fields_of(config) if not SET_BY_PROGRAM & field.marks]
    return paths + [path for path, _, _ in sections_of(config)]


def paths_named(config: Setting, name: str) -> list[str]:
    """Return the paths that the command line takes and that end in `name`, such as `steps`."""
    return [path for path in settable(config) if path == name or path.endswith(f".{name}")]


def _unknown(config: Setting, path: str) -> str:
    """Return the message of an unknown path, with at most three paths that end alike."""
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
    same = paths_named(config, word)
    if not same:
        words = {p.rpartition(".")[2]: p for p in reversed(known)}
        near = nearest(word, words)
        if "did you mean" in near:
            nearby = re.findall(r'"(\w+)"', near)[0]
            same = paths_named(config, nearby)
        elif all("." not in p for p in known):
            return message + near
    if not same:
        return f"{message}; --help lists the fields"
    shown = " or ".join(f"--config.{p}" for p in same[:SHOWN])
    if all("." not in p for p in same):
        shown = f'"{same[0]}"'
    return f"{message}; did you mean {shown}?"


def expanded(flag: str, text: str) -> pathlib.Path:
    """Return the path that a flag gives, `~` and `~user` replaced by the home directory.

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
