"""The content of config.json (the record of a run), and checks of run directories."""

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
from ddpm_jax.system.files import open_atomic
from ddpm_jax.system.record import Record

# The format of config.json and of checkpoints; format 1 had flat configs. If you raise it, add a
# reader of the present format (tests/experiment/test_format.py).
FORMAT = 2

LAST_OF_FORMAT_1 = "97e069b"  # the last commit that reads runs of format 1

FILES = (
    "config.json", "eval.json", "lock", "metrics.jsonl", "summary.json", "timing.jsonl", "wandb_id"
)  # fmt: skip

FOLDERS = ("checkpoints", "damaged", "images", "profile", "tensorboard", "wandb")

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def read_record(workdir: pathlib.Path) -> Record | None:
    """Return the content of config.json in a run directory; None if the file does not exist.

    Raises:
      UserError: If the file exists, but cannot be read or is not a config.json of this program.
    """
    path = workdir / "config.json"
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UserError(f"{path} is not a regular file; give another --workdir")
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a path that contains NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}; give another --workdir") from None
    record = _parsed(text)
    types = {"experiment": str, "config": dict, "data": dict, "seed": int}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name), value_type) for name, value_type in types.items()
    ):
        raise UserError(
            f"{path} is damaged or was not written by this program; give another --workdir"
        )
    return record


def check_entries(workdir: pathlib.Path) -> None:
    """Check that a run directory contains no links and only the expected types of files.

    The directory may come from an untrusted source. Files whose names begin with a dot are not
    checked, because a run does not write to such files.

    Raises:
      UserError: If the directory contains a link or a pipe, a file in place of a directory of a
        run, or a directory in place of a file of a run.
    """
    directories = [workdir]
    while directories:
        directory = directories.pop()
        try:
            with os.scandir(directory) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except FileNotFoundError:  # removed by another process that trains in this directory
            continue
        except OSError as error:
            raise UserError(
                f"cannot read {directory}: {error.strerror}; give another --workdir"
            ) from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            _check_entry(entry)
            # This program writes nothing into an existing checkpoint or into the directory wandb.
            is_checkpoint = directory != workdir and directory.name in ("checkpoints", "damaged")
            skipped = is_checkpoint or entry.name == "wandb"
            if entry.is_dir(follow_symlinks=False) and not skipped:
                directories.append(directory / entry.name)


def _check_entry(entry: os.DirEntry[str]) -> None:
    is_directory = entry.is_dir(follow_symlinks=False)
    problem = ""
    if entry.is_symlink():
        problem = "is a link, and a run writes nothing through links"
    elif is_directory and entry.name in FILES:
        problem = "is a directory, but must be a file"
    elif not is_directory and entry.name in FOLDERS:
        problem = "is a file, but must be a directory"
    elif not is_directory and not entry.is_file(follow_symlinks=False):
        problem = "is neither a file nor a directory"
    if problem:
        raise UserError(f"{entry.path} {problem}; move it away, or give another --workdir")


def check_same(
    workdir: pathlib.Path,
    earlier: Record,
    record: Record,
    may_change: Collection[str] = (),
    defaults: Record | None = None,
) -> None:
    """Check that the config, the seed and the data of this command are those of an earlier run.

    A config field that `earlier` lacks, because it was added to the program later, has its default.

    Args:
      workdir: The run directory, for error messages.
      earlier: The content of config.json in the run directory.
      record: The content that config.json would have for this command.
      may_change: Paths of the config fields that may differ, such as "train.steps".
      defaults: Defaults of the config fields by path (`config_records.defaults_by_path`).

    Raises:
      UserError: If other values differ. The message lists up to four of these values.
    """
    if earlier["experiment"] != record["experiment"]:
        raise UserError(
            f"{workdir} holds a run of {earlier['experiment']}, not of {record['experiment']}; "
            "give another --workdir"
        )
    old = {"part": earlier.get("part", ""), "seed": earlier.get("seed")}
    new = {"part": record.get("part", ""), "seed": record["seed"]}
    old |= json.loads(_json(defaults or {})) | flatten(earlier.get("config", {}))
    new |= flatten(record["config"])
    old |= {f"data {key}": value for key, value in earlier.get("data", {}).items()}
    new |= {f"data {key}": value for key, value in record["data"].items()}
    same = json.loads(_json(new))
    if same.get("data fingerprint") and same["data fingerprint"] == old.get("data fingerprint"):
        # The fingerprints are equal, so the data are the same under another name.
        may_change = {*may_change, "data.name", "data name", "data title"}
    differ = [
        f"{name} was {old.get(name)}, is {same.get(name)} now"
        for name in [*same, *(name for name in old if name not in same)]
        if old.get(name) != same.get(name) and name not in may_change
    ]
    if differ:
        raise UserError(
            f"{workdir} holds a run with another setting ({'; '.join(differ[:4])}); "
            "give another --workdir, or give the same values as before"
        )


def flatten(config: Record, prefix: str = "") -> Record:
    """Return the values of a nested config in one dictionary, by paths such as "train.steps"."""
    values: Record = {}
    for name, value in config.items():
        if isinstance(value, dict):
            values |= flatten(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def provenance() -> Record:
    """Return package versions and the git commit; None for a package that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"versions": versions, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=pathlib.Path(__file__).parent,
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
    """Return the value of a JSON text; None if the text is not valid JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write `value` to a JSON file; a killed process leaves the old or the new content.

    Raises:
      RunError: If the file cannot be written.
    """
    replace_file(path, _json(value))


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Write `content` to a file; a killed process leaves the old or the new content.

    Raises:
      RunError: If the file cannot be written.
    """
    with reporting_write_errors(path), open_atomic(path, durable=True) as file:
        file.write(content)


@contextlib.contextmanager
def reporting_write_errors(path: pathlib.Path) -> Iterator[None]:
    """Return a context that replaces an OSError of its body by an error message with `path`.

    Raises:
      RunError: If the body raises an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; free disk space or correct the permissions, "
            "then run the same command again"
        ) from None
