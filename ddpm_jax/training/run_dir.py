"""A run's directory: what it is (config.json), what it said (metrics.jsonl), what came out.

config.json       experiment, config, seed, data, versions, devices, git commit
metrics.jsonl     one line per logged step, reproducible to the bit
timing.jsonl      all that a clock says
tensorboard/      the same for TensorBoard
images/           pictures
checkpoints/      see checkpoint.py
summary.json      the final figures
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
from ddpm_jax.training.metric_writers import Board, tensorboard, weights_and_biases
from ddpm_jax.training.records import (
    check_entries,
    check_same,
    read_record,
    replace_file,
    write_json,
)

Line = Record  # of JSON: a step, and figures by name

TRAINED = ("checkpoints/[0-9]*", "damaged/[0-9]*", "*/config.json")

OF_SYSTEMS = ("lost+found", "desktop.ini")  # what a new disk or a shared drive holds


class RunDir(NamedTuple):
    """An open run directory; one process at a time has it, and of a run's several the first.

    A failure to write, as on a full disk, is logged and does not end the training: lines are
    kept for later, and `flush` returns whether all of them are written.
    """

    path: pathlib.Path
    record: Record  # what config.json says
    lock: IO[str] | None  # None: another process of this run writes
    boards: list[Board]  # that follow, once training has begun
    late: dict[str, list[Line]]  # by file, lines not written yet

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append a line of figures."""
        self._append("metrics.jsonl", {"step": step, **metrics})
        with self._reporting("what TensorBoard shows"):
            for board in self.boards:
                board.log(step, metrics)

    def time(self, step: int, **seconds: float) -> None:
        """Append a line of what a clock says."""
        self._append("timing.jsonl", {"step": step, "time": time.time(), **seconds})

    def write_image(
        self, name: str, image: np.ndarray | errors.NonFinite, step: int, last: bool = False
    ) -> None:
        """Write an image or an animation.

        Args:
          name: of the file, without its ending.
          image: [h, w, c], or [frames, h, w, c]; or why there is none, which is logged.
          step: number of steps done, which the file's name states unless `last`.
          last: whether it is the only one by that name.
        """
        if self.lock is None:
            return
        stem = name if last else f"{name}_{step:08d}"
        if isinstance(image, errors.NonFinite):
            log(f"no picture {stem}: {image}")
            return
        with self._reporting(f"the picture {stem}"):
            for board in self.boards if image.ndim == 3 else ():
                board.log_image(step, name, image)
            plots.save_image(self.path / "images" / stem, image)

    @contextlib.contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log(f"cannot write {what}: {error.strerror}")

    def check_there(self) -> None:
        """Check that the directory is where it was opened.

        Raises:
          RunError: it was removed or renamed.
        """
        if self.lock is None:
            return
        for name in ("lock", "config.json"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                (self.path / name).stat()
                return
        raise RunError(
            f"{self.path} is gone: it was removed or renamed during the run, of which nothing "
            "more can be written; rename it back, and the same command goes on"
        )

    def _append(self, name: str, line: Line) -> None:
        if self.lock is None:
            return
        self.check_there()
        self.late.setdefault(name, []).append(line)
        self._write_late(name)

    def _write_late(self, name: str) -> bool:
        lines = self.late[name]
        path = self.path / name
        try:
            append(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        except OSError as error:
            log(f"cannot write to {path}: {error.strerror}; kept for later")
            return False
        lines.clear()
        return True

    def lines(self) -> list[Line]:
        """Return the lines of metrics.jsonl."""
        return plots.read_lines(self.path / "metrics.jsonl")

    def evaluated(self, step: int) -> bool:
        """Return whether there is a line of an evaluation on the validation split at `step`."""
        return any(line["step"] == step and "validation/loss" in line for line in self.lines())

    def begin(self, step: int, last: bool = False, wandb: bool = False) -> None:
        """Make it as it was at `step`: what was said later, and torn lines, are cut.

        With `last`, the final evaluation at `step` is dropped, too: it may be incomplete.
        """

        def final(line: Line) -> bool:
            return "run_seconds" in line or any(name.startswith("test/") for name in line)

        def kept_line(line: Line) -> bool:
            return line["step"] < step or (line["step"] == step and not (last and final(line)))

        for name in ("metrics.jsonl", "timing.jsonl"):
            path = self.path / name
            if not path.exists():
                continue
            kept = []
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    if line.endswith(b"\n") and kept_line(json.loads(line)):
                        kept.append(line)
                except (ValueError, KeyError, TypeError, RecursionError):
                    pass
            replace_file(path, b"".join(kept))
        with self._reporting("what TensorBoard shows"):
            self.boards.append(tensorboard(self.path / "tensorboard", step))
        if wandb:
            self.boards.append(weights_and_biases(self.path, self.record))

    def finish(self, summary: dict[str, object], title: str) -> None:
        """Write the final figures, and the curves of all of them.

        Raises:
          RunError: they cannot be written; the run is not finished then.
        """
        if not self.flush():
            raise RunError(f"cannot write to {self.path}; make room, and the same command goes on")
        with self._reporting("the curves"):
            plots.curves(self.path / "images" / "curves.png", self.lines(), title)
        write_json(self.path / "summary.json", summary)

    def write_record(self) -> None:
        """Write config.json: from here on the directory is this run's."""
        write_json(self.path / "config.json", self.record)

    def flush(self) -> bool:
        """Put everything on disk; whether every line of figures is there.

        Raises:
          RunError: the directory is gone.
        """
        self.check_there()
        with self._reporting("what TensorBoard shows"):
            for board in self.boards:
                board.flush()
        late = [name for name, lines in self.late.items() if lines and not self._write_late(name)]
        return "metrics.jsonl" not in late

    def close(self) -> None:
        """Let go of the directory."""
        with self._reporting("what TensorBoard shows"):
            for board in self.boards:
                board.close()
        if self.lock is not None:
            self.lock.close()


def open_run(workdir: pathlib.Path, record: Record, may_change: set[str]) -> RunDir:
    """Open a run directory for training, new or to go on with; writes nothing but the lock.

    A directory that nothing was trained in yet may become another run's.

    Args:
      workdir: the directory.
      record: what this run is: experiment, config, seed, data, ...
      may_change: fields of the config that need not be what they were.

    Raises:
      UserError: it belongs to another experiment, config, seed or data; another process
        is using it; it cannot be written.
    """
    try:
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"{workdir} is a file; give a directory as --workdir")
        if workdir.is_symlink() and not workdir.exists():
            raise UserError(
                f"{workdir} is a link to {workdir.readlink()}, which is not there; make that "
                "directory, or give another --workdir"
            )
        workdir.mkdir(parents=True, exist_ok=True)
        earlier = read_record(workdir)
        if earlier is None:
            _check_free(workdir)
        check_entries(workdir)
        if earlier is not None and any(any(workdir.glob(place)) for place in TRAINED):
            check_same(workdir, earlier, record, may_change)
        lock = _locked(workdir)
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror}") from None
    return RunDir(workdir, record, lock, [], {})


def _locked(workdir: pathlib.Path) -> IO[str]:
    """Return the open lock of a directory, held until it is closed."""
    handle = os.open(workdir / "lock", os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
    lock = os.fdopen(handle, "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(
            f"another process is training in {workdir}; wait for it, or give another --workdir"
        ) from None
    except OSError as error:  # some mounted drives know no locks
        log(
            f"{workdir} cannot be locked ({error.strerror}): see to it that no other process "
            "trains there"
        )
    return lock


def _check_free(workdir: pathlib.Path) -> None:
    """Raise UserError if a directory without a record holds more than a run's very beginning."""
    inner = next(workdir.glob("*/config.json"), None)
    if inner is not None:
        raise UserError(
            f"{workdir} holds other runs, such as {inner.parent.name}; give a directory of this "
            "run's own as --workdir"
        )
    if any(any(workdir.glob(place)) for place in TRAINED):
        raise UserError(f"{workdir} holds checkpoints but no config.json; give another --workdir")
    for path in sorted(workdir.iterdir()):
        begun = path.name == "lock" or (path.name == "checkpoints" and not _has_entries(path))
        if not begun and not path.name.startswith(".") and path.name not in OF_SYSTEMS:
            raise UserError(
                f"{workdir} is not empty and holds no run ({path.name} is there, config.json is "
                "not); give another --workdir"
            )


def _has_entries(path: pathlib.Path) -> bool:
    """Return whether it is anything but a directory without entries, hidden ones left out."""
    return not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir())


def bystander(workdir: pathlib.Path, record: Record) -> RunDir:
    """Return the directory for a process that leaves writing to another one of its run."""
    return RunDir(workdir, record, None, [], {})
