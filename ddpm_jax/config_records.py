"""The record of a config in config.json: written, and read back as an equal value."""

import dataclasses
import os
import typing
from typing import TypeVar

from ddpm_jax.config import Setting, alternatives_of, choice_name, has_choice, hints_of, is_section
from ddpm_jax.errors import UserError
from ddpm_jax.fields import BOUND, Hint, Json, Value, bare_type, from_record, notes, shorten

T = TypeVar("T")


def to_record(config: Setting) -> dict[str, Json]:
    """Return a config as JSON holds it: every field but bound ones, and the type of choices."""
    record: dict[str, Json] = {}
    for name, hint in hints_of(type(config)).items():
        value = getattr(config, name)
        if BOUND in notes(hint):
            continue
        if is_section(value, hint):
            inner = None if value is None else to_record(value)
            if inner is not None and has_choice(hint):
                inner = {"type": choice_name(value), **inner}
            record[name] = inner
        else:
            record[name] = list(value) if isinstance(value, tuple) else value
    return record


def restore(like: T | type[T], values: Json, where: str | os.PathLike[str]) -> T:
    """Return the config that config.json recorded.

    Args:
      like: the experiment's config, or its class: the types of the sections.
      values: what `to_record` returned, from JSON. A field that it lacks keeps its class's default.
      where: the run's directory, for errors.

    Raises:
      UserError: the record has fields or sections that `like` lacks: it is of another version; or a
        value that is not of its field's type or out of its range.
    """
    default: T = like() if isinstance(like, type) else like
    return _restore(default, values, where, "")


def _restore(like: T, values: Json, where: str | os.PathLike[str], prefix: str) -> T:
    damaged = f"the config.json of the run in {where} is damaged"
    if not isinstance(values, dict):
        at = prefix.rstrip(".") or "config"
        raise UserError(
            f"{damaged}: its {at} must be a section, and is {shorten(values)}; give another run"
        )
    hints = hints_of(type(like))
    odd = sorted(prefix + name for name in set(values) - set(hints))
    if odd:
        raise UserError(
            f"the run in {where} was made by another version, with unknown config fields: "
            f"{', '.join(odd)}"
        )
    known = {}
    for name, value in values.items():
        hint, here = hints[name], getattr(like, name)
        if is_section(here, hint):
            known[name] = _restore_section(here, hint, value, where, prefix + name)
            continue
        try:
            known[name] = from_record(value, hint)
        except ValueError as error:
            raise UserError(
                f"{damaged}: its {prefix}{name} {error}, and is {shorten(value)}; give another run"
            ) from None
    for field in dataclasses.fields(like):  # type: ignore[arg-type]
        if field.name in hints and field.name not in known and _is_required(field):
            raise UserError(f"{damaged}: its {prefix}{field.name} is missing; give another run")
    return type(like)(**known)


def _is_required(field: dataclasses.Field[Value]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _restore_section(
    here: Setting, hint: Hint, value: Json, where: str | os.PathLike[str], path: str
) -> Setting:
    if not has_choice(hint):
        return _restore(here, value, where, f"{path}.")
    classes: dict[str, type] = {choice_name(cls): cls for cls in alternatives_of(hint)}
    if value is None and type(None) in typing.get_args(bare_type(hint)):
        return None
    chosen = value.get("type") if isinstance(value, dict) else None
    if not isinstance(chosen, str) or chosen not in classes:
        raise UserError(
            f"the config.json of the run in {where} is damaged: its {path} must have a type, one "
            f"of {', '.join(classes)}, and is {shorten(value)}; give another run"
        )
    inner = {name: item for name, item in value.items() if name != "type"}
    like = here if choice_name(here) == chosen else classes[chosen]()
    return _restore(like, inner, where, f"{path}.")
