"""The record of a run, config.json, and the files of its directory."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import stat
import subprocess
from collections.abc import Collection, Iterator
from typing import Any

from ddpm_jax.errors import RunError, UserError
from ddpm_jax.system.files import draft_of
from ddpm_jax.system.record import Record

FORMAT = 2  # of config.json and of checkpoints; 1 had flat configs

LAST_OF_FORMAT_1 = "97e069b"  # the last commit that reads runs of format 1

FILES = (
    "config.json", "eval.json", "lock", "metrics.jsonl", "summary.json", "timing.jsonl", "wandb_id"
)  # fmt: skip

FOLDERS = ("checkpoints", "damaged", "images", "profile", "tensorboard", "wandb")

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def read_record(workdir: pathlib.Path) -> Record | None:
    """Return what config.json of a run directory says; None where there is none.

    Raises:
      UserError: there is one, and it cannot be read.
    """
    path = workdir / "config.json"
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f"{path} is not a file; give another --workdir")
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from None
    record = _parsed(text)
    kinds = {"experiment": str, "config": dict, "data": dict, "seed": int}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name), kind) for name, kind in kinds.items()
    ):
        raise UserError(
            f"{path} is damaged, or is another program's and not the record of a run; give "
            "another --workdir"
        )
    return record


def check_entries(workdir: pathlib.Path) -> None:
    """Check that nothing in a run directory leads out of it, or is of another kind than it must be.

    It may be a stranger's. What begins with a dot is left out: no file of a run does.

    Raises:
      UserError: there is a link, a pipe, or a file in the place of a folder.
    """
    folders = [workdir]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except FileNotFoundError:  # removed meanwhile, by a process that trains there
            continue
        except OSError as error:
            raise UserError(f"cannot read {folder}: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            _check_entry(entry)
            # Nothing is written into a checkpoint, nor by us into what Weights & Biases keeps.
            within = folder != workdir and folder.name in ("checkpoints", "damaged")
            sealed = within or entry.name == "wandb"
            if entry.is_dir(follow_symlinks=False) and not sealed:
                folders.append(folder / entry.name)


def _check_entry(entry: os.DirEntry[str]) -> None:
    is_folder = entry.is_dir(follow_symlinks=False)
    wrong = ""
    if entry.is_symlink():
        wrong = "is a link, which nothing is written through"
    elif is_folder and entry.name in FILES:
        wrong = "is a directory, where a run has a file"
    elif not is_folder and entry.name in FOLDERS:
        wrong = "is a file, where a run has a directory"
    elif not is_folder and not entry.is_file(follow_symlinks=False):
        wrong = "is neither a file nor a directory"
    if wrong:
        raise UserError(f"{entry.path} {wrong}; move it away, or give another --workdir")


def check_same(
    workdir: pathlib.Path,
    earlier: Record,
    record: Record,
    may_change: Collection[str] = (),
) -> None:
    """Check that `record` goes on with the run of `earlier`.

    Args:
      workdir: the run's directory, for messages.
      earlier: the record in the directory.
      record: the record of this run.
      may_change: paths of config fields that may differ.

    Raises:
      UserError: the records differ in something else, which it names.
    """
    if earlier["experiment"] != record["experiment"]:
        raise UserError(
            f"{workdir} holds a run of {earlier['experiment']}, not of {record['experiment']}; "
            "give another --workdir"
        )
    old = {"part": earlier.get("part", ""), "seed": earlier.get("seed")}
    new = {"part": record.get("part", ""), "seed": record["seed"]}
    old |= flatten(earlier.get("config", {}))
    new |= flatten(record["config"])
    old |= {f"data {key}": value for key, value in earlier.get("data", {}).items()}
    new |= {f"data {key}": value for key, value in record["data"].items()}
    same = json.loads(_json(new))
    if same.get("data fingerprint") and same["data fingerprint"] == old.get("data fingerprint"):
        may_change = {
            *may_change,
            "data.name",
            "data name",
            "data title",
        }  # the same data by any name
    differ = [
        f"{name} was {old.get(name)}, is {same.get(name)}"
        for name in [*same, *(name for name in old if name not in same)]
        if old.get(name) != same.get(name) and name not in may_change
    ]
    if differ:
        raise UserError(
            f"{workdir} holds a run with another setting ({'; '.join(differ[:4])}); "
            "give another --workdir, or the same setting"
        )


def flatten(config: Record, prefix: str = "") -> Record:
    """Return the values of a recorded config by their paths, such as `train.steps`."""
    values: Record = {}
    for name, value in config.items():
        if isinstance(value, dict):
            values |= flatten(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def provenance() -> Record:
    """Return versions and git commit; None for a package that is not installed, nor needed yet."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"versions": versions, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    here = pathlib.Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None if described.returncode == 0 else None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _parsed(text: bytes) -> Any:
    """Return what a JSON text says; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a record, whole or not at all.

    Raises:
      RunError: it cannot be written.
    """
    replace_file(path, _json(value))


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with can_write(path), draft_of(path, durable=True) as file:
        file.write(content)


@contextlib.contextmanager
def can_write(path: pathlib.Path) -> Iterator[None]:
    """Turn a failure to write into an error that names `path`.

    Raises:
      RunError: something cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; make room, and the same command goes on"
        ) from None
