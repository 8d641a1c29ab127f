"""Read and check the JSON files of a run directory before a run trains, evaluates or samples."""

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

# Allowed types of the values in config.json, of its entry "data", and of those in summary.json.
RECORD_TYPES: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "experiment": (str,),
    "part": (str,),
    "config": (dict,),
    "seed": (int,),
    "debug": (bool,),
    "data": (dict,),
    "data_requested": (str,),
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
    """Return the checked content of config.json; return None if the file does not exist.

    Args:
      workdir: Directory of the run.
      complete: If true, the file must contain the values of the data set that a task depends on.

    Raises:
      UserError: If config.json cannot be read, or a value has a wrong type.
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
                raise ValueError("the data classes are not strings")
            if complete:
                _check_data(record["data"])
            if not 0 <= record["seed"] < 2**32:
                raise ValueError("the seed must be between 0 and 4294967295")
    return record


def check_format(workdir: pathlib.Path, record: Record) -> None:
    """Check that the record (config.json) of a run has the format number of this version.

    Raises:
      UserError: If the record has another format number.
    """
    version = record.get("format", 1)
    if version == 1:
        raise UserError(
            f"the run in {workdir} has format 1, and commit {LAST_OF_FORMAT_1} of this project "
            "was the last that could read it; use that commit, or train again in another --workdir"
        )
    if version != FORMAT:
        raise UserError(
            f"the run in {workdir} has format {printable(str(version))[:40]}, and this version "
            f"reads format {FORMAT}; use the version that wrote the run"
        )


def _check_data(data: Record) -> None:
    """Raise ValueError unless the values of the data set on which a task depends are valid."""
    if not {"name", "title", "shape", "levels"} <= set(data):
        raise ValueError("the data has no name, title, shape or levels")
    if len(data["shape"]) != 3 or not all(
        type(size) is int and 1 <= size <= LARGEST_INT for size in data["shape"]
    ):
        raise ValueError(f"the data shape must be three whole numbers from 1 to {LARGEST_INT:,}")
    if not 2 <= data["levels"] <= LARGEST_INT:
        raise ValueError("the data levels must be at least 2")
    if not 0 <= data.get("caption_length", 0) <= LARGEST_INT:
        raise ValueError("the data caption_length must be at least 0")


def read_summary(workdir: pathlib.Path) -> Record | None:
    """Return the checked content of summary.json; return None if the file does not exist.

    Raises:
      UserError: If summary.json cannot be read, or a value has a wrong type.
    """
    path = workdir / "summary.json"
    if not os.path.exists(path):
        return None
    advice = "remove that file and run the same command, which evaluates again"
    with _readable(path, advice):
        summary = json.loads(path.read_bytes())
        if not isinstance(summary, dict):
            raise ValueError("the content is not a JSON object")
        missing = [name for name in SUMMARY_TYPES if name not in summary]
        if missing:
            raise ValueError(f"the value {missing[0]} is missing")
        check_types(summary, SUMMARY_TYPES)
        for name, value in summary["metrics"].items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"the metric {ascii(name)[:60]} is not a finite number")
    return summary


def check_types(values: Record, types: dict[str, tuple[type, ...]], of: str = "") -> None:
    """Check the types of the values that are present. A boolean is not a valid integer.

    Args:
      values: Values by name.
      types: Allowed types by name.
      of: Text before the name of a value in error messages, such as "data ".

    Raises:
      ValueError: If a value has a wrong type, or a string has control characters.
    """
    for name, allowed in types.items():
        if name in values and type(values[name]) not in allowed:
            raise ValueError(f"the value of {of}{name} has a wrong type")
        if isinstance(values.get(name), str) and any(ord(char) < 32 for char in values[name]):
            raise ValueError(f"the value of {of}{name} holds control characters")


@contextlib.contextmanager
def _readable(path: pathlib.Path, advice: str = "give another run's directory") -> Iterator[None]:
    """Convert errors of the body, which reads a JSON file, to a UserError with the file's name."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        too_deep = isinstance(error, RecursionError)
        reason = "it is nested too deeply" if too_deep else str(error).splitlines()[0][:120]
        raise UserError(f"{path} is damaged ({reason}); {advice}") from None


def _without_duplicates(pairs: list[tuple[str, object]]) -> Record:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return values


def check_parts(workdir: pathlib.Path, experiment: str, parts: Iterable[str]) -> None:
    """Check the run directories of an experiment of several runs before any run is trained.

    Args:
      workdir: Directory of the experiment.
      experiment: Name of the experiment.
      parts: Names of the runs' directories within `workdir`.

    Raises:
      UserError: If a directory holds a run of another experiment or part.
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
