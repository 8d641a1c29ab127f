"""Checks of what can be known before a run trains, evaluates or samples: each is one line."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from ddpm_jax.errors import UserError
from ddpm_jax.progress import tell
from ddpm_jax.task import Task
from ddpm_jax.training import step
from ddpm_jax.training.run_dir import read_record

TIMES_MEMORY = 4  # what needs more than so many times the memory is refused
KEPT_TRAJECTORIES = 2 * 10  # images that are kept of each sampling step: x_t and x0 of ten
RECORD_TYPES: dict[str, tuple[type, ...]] = {
    "experiment": (str,),
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


def read_run(workdir: pathlib.Path, complete: bool = False) -> dict[str, Any] | None:
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
            json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
            check_types(record, RECORD_TYPES)
            check_types(record["data"], DATA_TYPES, "data ")
            if not all(isinstance(name, str) for name in record["data"].get("classes", ())):
                raise ValueError("its data classes are not texts")
            if complete and not {"name", "title"} <= set(record["data"]):
                raise ValueError("its data has no name or no title")
            if not 0 <= record["seed"] < 2**32:
                raise ValueError("its seed must be between 0 and 4294967295")
    return record


def read_summary(workdir: pathlib.Path) -> dict[str, Any] | None:
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


def check_types(values: dict[str, Any], types: dict[str, tuple[type, ...]], of: str = "") -> None:
    """Raises ValueError if a value that is there is of another type; True is not a number."""
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


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("it names a value twice")
    return names


def check_parts(parts: Iterable[tuple[pathlib.Path, str]]) -> None:
    """Check the directories of the runs that an experiment trains, before it trains the first.

    Args:
      parts: each run's directory and its experiment.

    Raises:
      UserError: two runs have the same directory, or one holds a run of another experiment.
    """
    places: set[pathlib.Path] = set()
    for place, name in parts:
        if place in places:
            raise UserError(f"two runs of this command would share {place}; give distinct values")
        places.add(place)
        record = read_run(place)
        if record is not None and record["experiment"] != name:
            raise UserError(
                f"{place} holds a run of {record['experiment']}, not of {name}; give another "
                "--workdir"
            )


def check_sizes(task: Task, config: Any, parallel: str = "jit") -> None:
    """Check that a run can fit into memory: parameters, optimizer and averages, and one batch.

    More than four times the memory is refused, more than half of it is logged.  Nothing of that
    size is made for it.

    Raises:
      UserError: the run cannot fit.
    """
    pixels = math.prod(config.shape)
    example = pixels + 4 + getattr(config, "caption_length", 0)
    batch = example * config.batch_size * config.steps_per_call
    by = f"--config.batch_size={config.batch_size}"
    if config.steps_per_call > 1:
        by += f" x --config.steps_per_call={config.steps_per_call}"
    per_device = max(1, jax.device_count() if _has_memory() else 1)
    _check_bytes(batch // per_device, f"one batch ({by})", f"{by}: is too large")
    if hasattr(config, "eval_batch"):
        by = f"--config.eval_batch={config.eval_batch}"
        _check_bytes(
            4 * pixels * config.eval_batch // per_device,
            f"one batch of evaluation ({by})",
            f"{by}: is too large",
        )
    for field in ("draw", "draw_between", "prompts"):
        check_images(getattr(config, field, 0), config.shape, f"--config.{field}")
    if hasattr(config, "draw_between"):
        steps = config.sample_steps
        check_images(KEPT_TRAJECTORIES * steps, config.shape, "--config.sample_steps", steps)
    try:
        shapes = step.state_shapes(task, config)
        state = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(shapes))
    except (OverflowError, MemoryError):
        state = 2**63
    held = state // per_device if parallel == "fsdp" else state
    need = f"parameters, optimizer and averages of {_size(state)} and a batch of {_size(batch)}"
    _check_bytes(held + batch // per_device, need, "the network is too large")


def check_images(count: int, shape: tuple[int, ...], flag: str, value: int | None = None) -> None:
    """Check that `count` images of float32 can be held in the host's memory.

    Raises:
      UserError: they need more than four times of it.
    """
    value = count if value is None else value
    need = 4 * count * math.prod(shape)
    if need > TIMES_MEMORY * _host_memory():
        raise UserError(
            f"{flag}={value}: the images would need {_size(need)}, and this machine has "
            f"{_size(_host_memory())} of memory; give a smaller number"
        )


def _check_bytes(need: int, what: str, message: str) -> None:
    memory = _memory()
    if need > TIMES_MEMORY * memory:
        raise UserError(
            f"{message}: {what} would need {_size(need)}, and there are {_size(memory)} of memory; "
            "give a smaller number"
        )
    if need > memory / 2:
        tell(f"{what} need {_size(need)} of {_size(memory)} of memory: the run may not fit")


def _has_memory() -> bool:
    """Whether a device has memory of its own."""
    return "bytes_limit" in (jax.local_devices()[0].memory_stats() or {})


def _memory() -> int:
    """Bytes of a device's memory; the host's, where the devices share it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit") or _host_memory())


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(count: int) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:,.0f} PiB"
