"""Checks of what can be known before a run trains, evaluates or samples: each is one line."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator

from ddpm_jax.errors import UserError, printable
from ddpm_jax.fields import LARGEST_INT
from ddpm_jax.system.record import Record
from ddpm_jax.training.records import FORMAT, LAST_OF_FORMAT_1, read_record

RECORD_TYPES: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "experiment": (str,),
    "part": (str,),
    "config": (dict,),
    "seed": (int,),
    "debug": (bool,),
    "data": (dict,),
    "data_asked_for": (str,),
    "data_note": (str,),
    "data_dir": (str, type(None)),
}

DATA_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "title": (str,),
    "shape": (list,),
    "levels": (int,),
    "train": (int,),
    "test": (int,),
    "validation": (int, type(None)),
    "classes": (list,),
    "caption_length": (int,),
    "fingerprint": (str, type(None)),
}

SUMMARY_TYPES: dict[str, tuple[type, ...]] = {
    "experiment": (str,),
    "step": (int,),
    "data": (str,),
    "data_note": (str,),
    "parameters": (int,),
    "metrics": (dict,),
}


def read_run(workdir: pathlib.Path, complete: bool = False) -> Record | None:
    """Return the record of a run directory, checked; None where there is none.

    Args:
      complete: whether the names of the data must be there.

    Raises:
      UserError: it cannot be read, or a value is not of the type that it should have.
    """
    path = workdir / "config.json"
    with _readable(path):
        record = read_record(workdir)
        if record is not None:
            check_format(workdir, record)
            json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
            check_types(record, RECORD_TYPES)
            check_types(record["data"], DATA_TYPES, "data ")
            if not all(isinstance(name, str) for name in record["data"].get("classes", ())):
                raise ValueError("its data classes are not texts")
            if complete:
                _check_data(record["data"])
            if not 0 <= record["seed"] < 2**32:
                raise ValueError("its seed must be between 0 and 4294967295")
    return record


def check_format(workdir: pathlib.Path, record: Record) -> None:
    """Check that a run has the format that this version writes.

    Raises:
      UserError: it has another one.
    """
    version = record.get("format", 1)
    if version == 1:
        raise UserError(
            f"the run in {workdir} is of format 1, which commit {LAST_OF_FORMAT_1} of this project "
            "was the last to read; use that commit, or train again in another --workdir"
        )
    if version != FORMAT:
        raise UserError(
            f"the run in {workdir} is of format {printable(str(version))[:40]}, and this version "
            f"reads format {FORMAT}; use the version that made it"
        )


def _check_data(data: Record) -> None:
    """Raise ValueError unless a record says enough of the data to build the task."""
    if not {"name", "title", "shape", "levels"} <= set(data):
        raise ValueError("its data has no name, title, shape or levels")
    if len(data["shape"]) != 3 or not all(
        type(size) is int and 1 <= size <= LARGEST_INT for size in data["shape"]
    ):
        raise ValueError(f"its data shape must be three whole numbers from 1 to {LARGEST_INT:,}")
    if not 2 <= data["levels"] <= LARGEST_INT:
        raise ValueError("its data levels must be at least 2")
    if not 0 <= data.get("caption_length", 0) <= LARGEST_INT:
        raise ValueError("its data caption_length must be at least 0")


def read_summary(workdir: pathlib.Path) -> Record | None:
    """Return the final metrics of a run directory, checked; None where the run is not finished.

    Raises:
      UserError: the file cannot be read, or a value is not of the type that it should have.
    """
    path = workdir / "summary.json"
    if not os.path.exists(path):
        return None
    advice = "remove that file, and the same command evaluates again"
    with _readable(path, advice):
        summary = json.loads(path.read_bytes())
        if not isinstance(summary, dict):
            raise ValueError("it is not an object")
        missing = [name for name in SUMMARY_TYPES if name not in summary]
        if missing:
            raise ValueError(f"it has no {missing[0]}")
        check_types(summary, SUMMARY_TYPES)
        for name, value in summary["metrics"].items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"its metric {ascii(name)[:60]} is not a finite number")
    return summary


def check_types(values: Record, types: dict[str, tuple[type, ...]], of: str = "") -> None:
    """Check the types of the values that are there; True is not a number.

    Raises:
      ValueError: a value has another type, or a text has control characters.
    """
    for name, allowed in types.items():
        if name in values and type(values[name]) not in allowed:
            raise ValueError(f"its {of}{name} is of another type")
        if isinstance(values.get(name), str) and any(ord(a) < 32 for a in values[name]):
            raise ValueError(f"its {of}{name} holds control characters")


@contextlib.contextmanager
def _readable(path: pathlib.Path, advice: str = "give another run's directory") -> Iterator[None]:
    """Make one line of whatever is wrong with a file of JSON."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120] if isinstance(error, ValueError) else "it nests"
        raise UserError(f"{path} is damaged ({reason}); {advice}") from None


def _without_duplicates(pairs: list[tuple[str, object]]) -> Record:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("it names a value twice")
    return names


def check_parts(workdir: pathlib.Path, experiment: str, parts: Iterable[str]) -> None:
    """Check the directories of several runs before the first is trained.

    Args:
      workdir: the directory of all.
      experiment: the experiment's name.
      parts: the runs' directories.

    Raises:
      UserError: one holds a run of another experiment or part.
    """
    for part in parts:
        record = read_run(workdir / part)
        if record is None:
            continue
        recorded = (record["experiment"], record.get("part", ""))
        if recorded != (experiment, part):
            raise UserError(
                f"{workdir / part} holds a run of {'/'.join(filter(None, recorded))}, not of "
                f"{experiment}/{part}; give another --workdir"
            )
