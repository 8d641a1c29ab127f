"""The run directory, with the config, the metrics, the images and the checkpoints of a run.

config.json       experiment, config, seed, data, versions, devices, git commit: the record
metrics.jsonl     one line per logged step; equal runs write equal lines, bit for bit
timing.jsonl      times in seconds, memory in bytes, and operations per second
tensorboard/      metrics and images for TensorBoard
images/           images and animations
checkpoints/      one directory per checkpoint, named by the number of training steps
damaged/          checkpoints that could not be read
summary.json      the final metrics
"""

import contextlib
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np

from ddpm_jax import errors, plots
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.progress import log
from ddpm_jax.system.files import append
from ddpm_jax.system.record import Record
from ddpm_jax.training.metric_writers import MetricWriter, tensorboard, weights_and_biases
from ddpm_jax.training.records import (
    check_entries,
    check_same,
    read_record,
    replace_file,
    write_json,
)

Line = Record  # a line of a .jsonl file: {"step": 100, "train/loss": 0.5, ...}

TRAINED = (
    "checkpoints/[0-9]*",
    "damaged/[0-9]*",
    "*/config.json",
)  # at least one exists after the first training step

OF_SYSTEMS = ("lost+found", "desktop.ini")  # files that operating systems create on a disk


class RunDir(NamedTuple):
    """An open run directory, which is locked so that only one run at a time can use it.

    In a run of several processes only the first process writes. If a line of metrics cannot be
    written, for instance on a full disk, the training continues, and the line is written later.
    """

    path: pathlib.Path
    record: Record  # the content of config.json
    lock: IO[str] | None  # the open lock file; None in a process that does not write
    writers: list[MetricWriter]  # writers to TensorBoard and W&B, which `begin` adds
    pending: dict[str, list[Line]]  # lines that are not written yet, by the name of the file

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl, and write the metrics to TensorBoard and W&B."""
        self._append("metrics.jsonl", {"step": step, **metrics})
        with self._reporting("the events of TensorBoard"):
            for writer in self.writers:
                writer.log(step, metrics)

    def time(self, step: int, **seconds: float) -> None:
        """Append a line to timing.jsonl: the step, the Unix time and the given measurements."""
        self._append("timing.jsonl", {"step": step, "time": time.time(), **seconds})

    def write_image(
        self, name: str, image: np.ndarray | errors.NonFinite, step: int, last: bool = False
    ) -> None:
        """Write an image or an animation to the directory `images`.

        Args:
          name: The name of the file, without its extension.
          image: An image, uint8 [H, W, C], or an animation of F frames, uint8 [F, H, W, C]. If it
            is an error, the error is logged and no file is written.
          step: Number of training steps taken. It is appended to the name of the file, unless
            `last` is True.
          last: Whether the image is from the final evaluation.
        """
        if self.lock is None:
            return
        stem = name if last else f"{name}_{step:08d}"
        if isinstance(image, errors.NonFinite):
            log(f"the image {stem} was not written: {image}; the run continues")
            return
        with self._reporting(f"the image {stem}"):
            for writer in self.writers if image.ndim == 3 else ():
                writer.log_image(step, name, image)
            plots.save_image(self.path / "images" / stem, image)

    @contextlib.contextmanager
    def _reporting(self, output: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log(
                f"cannot write {output}: {error.strerror}; the run continues; check the free space "
                f"and the permissions of {self.path}"
            )

    def check_exists(self) -> None:
        """Check that the run directory still exists.

        Raises:
          RunError: If the run directory was removed or renamed.
        """
        if self.lock is None:
            return
        for name in ("lock", "config.json"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (self.path / name).stat()
                return
        raise RunError(
            f"{self.path} was removed or renamed during the run, so nothing more can be written; "
            "restore the directory, then run the same command again to continue"
        )

    def _append(self, name: str, line: Line) -> None:
        if self.lock is None:
            return
        self.check_exists()
        self.pending.setdefault(name, []).append(line)
        self._write_pending(name)

    def _write_pending(self, name: str) -> bool:
        lines = self.pending[name]
        path = self.path / name
        try:
            append(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        except OSError as error:
            log(
                f"cannot write to {path}: {error.strerror}; the run continues and writes these "
                "lines later; free disk space or correct the permissions"
            )
            return False
        lines.clear()
        return True

    def lines(self) -> list[Line]:
        """Return the lines of metrics.jsonl, each as a dictionary."""
        return plots.read_lines(self.path / "metrics.jsonl")

    def evaluated(self, step: int) -> bool:
        """Return whether metrics.jsonl has an evaluation on the validation split at this step."""
        return any(line["step"] == step and "validation/loss" in line for line in self.lines())

    def begin(self, step: int, last: bool = False, wandb: bool = False) -> None:
        """Open the writers and remove lines of later training steps than `step` from .jsonl files.

        Incomplete lines are removed too. If `last` is True, `step` is the last training step; lines
        of the final evaluation are then removed, because that evaluation may be incomplete.
        """

        def final(line: Line) -> bool:
            return "run_seconds" in line or any(name.startswith("test/") for name in line)

        def is_valid(line: Line) -> bool:
            return line["step"] < step or (line["step"] == step and not (last and final(line)))

        for name in ("metrics.jsonl", "timing.jsonl"):
            path = self.path / name
            if not path.exists():
                continue
            valid = []
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    if line.endswith(b"\n") and is_valid(json.loads(line)):
                        valid.append(line)
                except (ValueError, KeyError, TypeError, RecursionError):
                    pass
            replace_file(path, b"".join(valid))
        with self._reporting("the events of TensorBoard"):
            self.writers.append(tensorboard(self.path / "tensorboard", step))
        if wandb:
            self.writers.append(weights_and_biases(self.path, self.record))

    def finish(self, summary: dict[str, object], title: str) -> None:
        """Write summary.json, and a plot of all metrics with the heading `title`.

        Raises:
          RunError: If metrics.jsonl or summary.json cannot be written. The run is then unfinished.
        """
        if not self.flush():
            raise RunError(
                f"cannot write {self.path / 'metrics.jsonl'}; free disk space or correct the "
                "permissions, then run the same command again to finish the run"
            )
        with self._reporting("images/curves.png"):
            plots.curves(self.path / "images" / "curves.png", self.lines(), title)
        write_json(self.path / "summary.json", summary)

    def write_record(self) -> None:
        """Write the attribute `record` to config.json, which marks a directory as a run."""
        write_json(self.path / "config.json", self.record)

    def flush(self) -> bool:
        """Write all pending lines to disk; return whether metrics.jsonl has all lines now.

        Raises:
          RunError: If the run directory was removed or renamed.
        """
        self.check_exists()
        with self._reporting("the events of TensorBoard"):
            for writer in self.writers:
                writer.flush()
        failed = [
            name for name, lines in self.pending.items() if lines and not self._write_pending(name)
        ]
        return "metrics.jsonl" not in failed

    def close(self) -> None:
        """Close the writers and release the lock."""
        with self._reporting("the events of TensorBoard"):
            for writer in self.writers:
                writer.close()
        if self.lock is not None:
            self.lock.close()


def open_run(
    workdir: pathlib.Path,
    record: Record,
    may_change: set[str],
    defaults: Record | None = None,
) -> RunDir:
    """Open and lock a run directory, for a new run or to resume the run in the directory.

    If no training has started in the directory, config.json may have other values than `record`.

    Args:
      workdir: The directory, which is created if it does not exist.
      record: The content of config.json for this run: experiment, config, seed, data.
      may_change: Paths of config fields that may differ from config.json in the directory, such as
        "train.steps".
      defaults: Defaults of the config fields by path, for fields that config.json lacks.

    Raises:
      UserError: If the directory contains a run with another experiment, config, seed or data set,
        if another process uses the directory, or if the directory cannot be written.
    """
    try:
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"{workdir} is a file; give a directory as --workdir")
        if workdir.is_symlink() and not workdir.exists():
            raise UserError(
                f"{workdir} is a link to {workdir.readlink()}, which does not exist; create that "
                "directory, or give another --workdir"
            )
        workdir.mkdir(parents=True, exist_ok=True)
        earlier = read_record(workdir)
        if earlier is None:
            _check_free(workdir)
        check_entries(workdir)
        if earlier is not None and any(any(workdir.glob(pattern)) for pattern in TRAINED):
            check_same(workdir, earlier, record, may_change, defaults)
        lock = _locked(workdir)
    except OSError as error:
        raise UserError(
            f"cannot write to {workdir}: {error.strerror}; give another --workdir"
        ) from None
    return RunDir(workdir, record, lock, [], {})


def _locked(workdir: pathlib.Path) -> IO[str]:
    """Lock a directory and return the open lock file; closing this file releases the lock."""
    handle = os.open(workdir / "lock", os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
    lock = os.fdopen(handle, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(
            f"another process is training in {workdir}; wait until it ends, or give another "
            "--workdir"
        ) from None
    except OSError as error:  # some network drives do not support locks
        log(
            f"cannot lock {workdir} ({error.strerror}); the run continues without a lock; make "
            "sure that no other process trains in this directory"
        )
    return lock


def _check_free(workdir: pathlib.Path) -> None:
    """Check that a directory without config.json contains no files of other programs or runs."""
    inner = next(workdir.glob("*/config.json"), None)
    if inner is not None:
        raise UserError(
            f"{workdir} holds other runs, such as {inner.parent.name}; give a new directory as "
            "--workdir"
        )
    if any(any(workdir.glob(pattern)) for pattern in TRAINED):
        raise UserError(f"{workdir} holds checkpoints but no config.json; give another --workdir")
    for path in sorted(workdir.iterdir()):
        expected = path.name == "lock" or (path.name == "checkpoints" and not _has_entries(path))
        if not expected and not path.name.startswith(".") and path.name not in OF_SYSTEMS:
            raise UserError(
                f"{workdir} is not empty and holds no run ({path.name} exists, config.json does "
                "not); give another --workdir"
            )


def _has_entries(path: pathlib.Path) -> bool:
    """Return whether a path is a file, or a directory with files that are not hidden."""
    return not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir())


def non_writing_run_dir(workdir: pathlib.Path, record: Record) -> RunDir:
    """Return a run directory whose methods write nothing, for all processes but the first."""
    return RunDir(workdir, record, None, [], {})
