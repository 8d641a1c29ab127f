"""Conversion of a config to the JSON values in config.json, and back to an equal config."""

import dataclasses
import os
import typing
from typing import TypeVar

from ddpm_jax.config import (
    Setting,
    alternatives_of,
    choice_name,
    fields_of,
    has_choice,
    hints_of,
    is_section,
)
from ddpm_jax.errors import UserError
from ddpm_jax.fields import BOUND, Hint, Json, Value, bare_type, from_json, marks_of, shorten

T = TypeVar("T")


def to_record(config: Setting) -> dict[str, Json]:
    """Convert a config to nested dictionaries of JSON values.

    Fields with the mark BOUND are left out, because they follow from the data set. A section that
    has alternatives gets the entry "type": the name of the chosen alternative.
    """
    record: dict[str, Json] = {}
    for name, hint in hints_of(type(config)).items():
        value = getattr(config, name)
        if BOUND in marks_of(hint):
            continue
        if is_section(value, hint):
            inner = None if value is None else to_record(value)
            if inner is not None and has_choice(hint):
                inner = {"type": choice_name(value), **inner}
            record[name] = inner
        else:
            record[name] = list(value) if isinstance(value, tuple) else value
    return record


def defaults_by_path(config: Setting) -> dict[str, Setting]:
    """Return the defaults that the classes of the sections give to the fields, by path."""
    defaults: dict[str, Setting] = {}
    for field in fields_of(config):
        by_name = {f.name: f.default for f in dataclasses.fields(field.owner)}
        default = by_name[field.path.rpartition(".")[2]]
        if BOUND not in field.marks and default is not dataclasses.MISSING:
            defaults[field.path] = default
    return defaults


def restore(like: T | type[T], values: Json, directory: str | os.PathLike[str]) -> T:
    """Return the config that `to_record` has converted to JSON values.

    Args:
      like: A config with the same sections, such as the default config of the experiment, or its
        class.
      values: The JSON values. A field that is missing gets the default value of its class.
      directory: The run directory with the file config.json, for error messages.

    Raises:
      UserError: If `values` has fields or sections that `like` does not have, or if a value is not
        of the type of the field or is out of range.
    """
    default: T = like() if isinstance(like, type) else like
    return _restore(default, values, directory, "")


def _restore(like: T, values: Json, directory: str | os.PathLike[str], prefix: str) -> T:
    damaged = f"the config.json of the run in {directory} is damaged"
    if not isinstance(values, dict):
        path = prefix.rstrip(".") or "config"
        raise UserError(
            f"{damaged}: its {path} must be a section, but is {shorten(values)}; give another run"
        )
    hints = hints_of(type(like))
    unknown = sorted(prefix + name for name in set(values) - set(hints))
    if unknown:
        raise UserError(
            f"the run in {directory} was made by another version of this program, with unknown "
            f"config fields: {', '.join(unknown)}; use that version, or give another run"
        )
    restored = {}
    for name, value in values.items():
        hint, default = hints[name], getattr(like, name)
        if is_section(default, hint):
            restored[name] = _restore_section(default, hint, value, directory, prefix + name)
            continue
        try:
            restored[name] = from_json(value, hint)
        except ValueError as error:
            raise UserError(
                f"{damaged}: its {prefix}{name} {error}, but is {shorten(value)}; give another run"
            ) from None
    for field in dataclasses.fields(like):  # type: ignore[arg-type]
        if field.name in hints and field.name not in restored and _is_required(field):
            raise UserError(f"{damaged}: its {prefix}{field.name} is missing; give another run")
    return type(like)(**restored)


def _is_required(field: dataclasses.Field[Value]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _restore_section(
    default: Setting, hint: Hint, value: Json, directory: str | os.PathLike[str], path: str
) -> Setting:
    if not has_choice(hint):
        return _restore(default, value, directory, f"{path}.")
    classes: dict[str, type] = {choice_name(cls): cls for cls in alternatives_of(hint)}
    if value is None and type(None) in typing.get_args(bare_type(hint)):
        return None
    chosen = value.get("type") if isinstance(value, dict) else None
    if not isinstance(chosen, str) or chosen not in classes:
        raise UserError(
            f"the config.json of the run in {directory} is damaged: its {path} must have a type, "
            f"one of {', '.join(classes)}, but is {shorten(value)}; give another run"
        )
    inner = {name: item for name, item in value.items() if name != "type"}
    like = default if choice_name(default) == chosen else classes[chosen]()
    return _restore(like, inner, directory, f"{path}.")
