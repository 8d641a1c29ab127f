"""Write and read checkpoints with orbax; no other file imports orbax.

A checkpoint consists of the arrays of a state and a host record (values that are stored as JSON).
It gets its final name when it is complete; a killed process leaves the previous checkpoint. Each
process writes and reads its part of the arrays. If one fails, no process uses the checkpoint.
"""

import contextlib
import copy
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ddpm_jax.errors import RunError, UserError, one_line
from ddpm_jax.parallel.processes import (
    ThreadBarrier,
    first_error,
    from_main,
    is_main,
    is_single_process,
    missing_client_warning,
)
from ddpm_jax.progress import log, log_once
from ddpm_jax.system.unraisable import quiet_event_loop
from ddpm_jax.training.check_sums import agree, check_record, check_sums
from ddpm_jax.training.records import FORMAT

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

WRITE_SECONDS = 600  # time limit for every process to write its part
KEEP_NEWEST = 3
KEEP_BEST = 1
BEST = "validation/loss"  # the metric of the best checkpoint, which has the lowest value
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space on the disk or within the quota
SUMS = "check_sums"  # key of the check sums in the host record
# Parts of the error messages (the first is orbax's) for checkpoints of another version of the code.
OTHER_VERSION = ("tree structures do not match", "its format is")


class Checkpoints(NamedTuple):
    """The checkpoints of one run directory."""

    manager: "ocp.CheckpointManager"
    barrier: ThreadBarrier  # every process waits at the barrier after it has written its part
    read_only: bool = False  # if True, no file in the directory is changed

    def save(
        self,
        step: int,
        state: PyTree,
        host: Mapping[str, object],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copy a state and write a checkpoint in the background; log an error if that fails.

        Args:
          step: Number of training steps taken.
          state: The arrays of the training state. The next training step may overwrite them.
          host: The host record: values of JSON types, which are stored as JSON.
          metrics: Metrics of the evaluation at this step, of which "validation/loss" selects the
            best checkpoint. If None, the checkpoint cannot become the best.
        """
        import orbax.checkpoint as ocp

        self.wait()
        why = "" if is_single_process() else first_error(self._refusal())
        if why:
            self._log_failure(f" of step {step}", why)
            return
        self.barrier.begin()
        record = copy.deepcopy(dict(host))
        record |= {SUMS: check_sums(state, record), "format": FORMAT}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.map(jnp.copy, state)),
            host=ocp.args.JsonSave(record),
        )
        best = {BEST: metrics[BEST]} if metrics else None
        with self._reporting():
            self.manager.save(step, args=args, metrics=best, force=True)

    def _refusal(self) -> str:
        """Write a test file; return the error message, or an empty string if it was written."""
        probe = pathlib.Path(self.manager.directory) / f"probe.{jax.process_index()}"
        try:
            try:
                probe.write_bytes(bytes(4096))
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            return str(error)
        return ""

    def newest(self) -> int | None:
        """Return the training step of the newest checkpoint, or None without a checkpoint."""
        return cast(int | None, self.manager.latest_step())

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, object]]:
        """Read a checkpoint and return (state, host record).

        Args:
          step: The training step of the checkpoint.
          like: A tree with the shapes, types and shardings of the arrays. If an entry is `...`,
            this array is not read, and the returned entry is `...`.

        Raises:
          UserError: If the checkpoint is damaged or was written by another version of the code.
        """
        import orbax.checkpoint as ocp

        state: PyTree = None
        host: dict[str, object] = {}
        sums, why = None, ""
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(like, restore_args), host=ocp.args.JsonRestore()
        )
        try:
            with quiet_event_loop(), contextlib.closing(_reader()) as reader:
                read = reader.restore(pathlib.Path(self.manager.directory) / str(step), args=args)
            state, host = read.state, dict(read.host)
            version = host.pop("format", 1)
            if version != FORMAT:
                raise ValueError(f"its format is {version}; this code reads format {FORMAT} only")
            sums = check_record(host, host.pop(SUMS, None))  # None in old checkpoints
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # the machine causes these errors, not the files
        except Exception as error:  # orbax and its libraries raise exceptions of many types
            why = " ".join(str(error).split())[:200] or repr(error)
        why = first_error(why)
        if not why:  # all processes have read the checkpoint; they compute the sums together
            same = sums is None or agree(sums, check_sums(state, host))
            why = first_error("" if same else "its arrays do not match their check sums")
        if why:
            newer = any(text in why for text in OTHER_VERSION)
            problem = "was written by another version of the code" if newer else "is damaged"
            raise UserError(f"the checkpoint of step {step} {problem}: {why}")
        return state, host

    def restore_newest(self, like: PyTree) -> tuple[int, PyTree | None, dict[str, object]]:
        """Return (step, state, host record) of the newest checkpoint that can be read.

        Return (0, None, {}) without a checkpoint. Newer checkpoints that cannot be read are logged
        and, unless `read_only` is True, moved to the directory `damaged`. For `like` see `restore`.

        Raises:
          UserError: If the directory has checkpoints, but none of them can be read.
        """
        steps = from_main(lambda: sorted(self.manager.all_steps(), reverse=True))
        damaged = []
        for step in steps:
            try:
                state, host = self.restore(step, like)
            except UserError as error:
                log(f"{error}; the run reads the previous checkpoint instead")
                damaged.append(step)
                continue
            for bad_step in [] if self.read_only else damaged:
                self._set_aside(bad_step)
            return step, state, host
        if steps:
            raise UserError(
                f"every checkpoint in {self.manager.directory} is damaged or of another version of "
                "the code, and none was changed; give another --workdir, or use the version of the "
                "code that config.json lists as git_commit"
            )
        return 0, None, {}

    def _set_aside(self, step: int) -> None:
        source = pathlib.Path(self.manager.directory) / str(step)
        target = source.parent.with_name("damaged") / str(step)

        def move() -> None:
            try:
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(exist_ok=True)
                source.rename(target)
            except OSError as error:
                raise RunError(
                    f"cannot move the damaged checkpoint {source} to {target}: {error.strerror}; "
                    "move it yourself, then run the same command again to continue"
                ) from None

        from_main(move)
        log(f"moved the checkpoint of step {step} to {target}")
        self.manager.reload()

    def check_written(self, step: int) -> None:
        """Wait for the checkpoint of `step`, the last training step; check that it is on disk.

        Raises:
          RunError: If the checkpoint is not on disk.
        """
        self.wait()

        def newest() -> int | None:
            steps = pathlib.Path(self.manager.directory).glob("[0-9]*")
            return max((int(path.name) for path in steps if path.name.isdigit()), default=None)

        written = from_main(newest)
        if written == step:
            return
        start = "the beginning" if written is None else f"the newest checkpoint, of step {written}"
        raise RunError(
            f"the last checkpoint, of step {step}, could not be written to "
            f"{self.manager.directory}; free disk space or correct the permissions of this "
            f"directory, then run the same command again to continue from {start}"
        )

    def wait(self) -> None:
        """Wait until the started checkpoint is on disk; log the error if it cannot be written."""
        with self._reporting():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # orbax and the file system raise exceptions of many types
            directory = pathlib.Path(self.manager.directory)
            drafts = sorted(directory.glob("*.orbax-checkpoint-tmp"))
            for draft in drafts if is_main() else []:  # delete incomplete checkpoints
                shutil.rmtree(draft, ignore_errors=True)
            of_step = f" of step {drafts[-1].name.partition('.')[0]}" if drafts else ""
            self._log_failure(of_step, one_line(error))

    def _log_failure(self, of_step: str, why: str) -> None:
        log(
            f"cannot write the checkpoint{of_step}: {why}; the run continues, and earlier "
            f"checkpoints remain; check the free space and permissions of {self.manager.directory}"
        )

    def close(self) -> None:
        """Wait until the started checkpoint is on disk, and close the orbax manager."""
        self.wait()
        self.manager.close()


def open_checkpoints(folder: pathlib.Path, read_only: bool = False) -> Checkpoints:
    """Open the checkpoints in `folder`; saving deletes all but the newest three and the best."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers

    policy = checkpoint_managers.AnyPreservationPolicy(
        [
            checkpoint_managers.LatestN(KEEP_NEWEST),
            checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics[BEST],
                reverse=True,
                n=KEEP_BEST,
                keep_checkpoints_without_metrics=False,
            ),
        ]
    )
    folder, barrier = folder.resolve(), ThreadBarrier()
    if missing_client_warning():
        log_once(missing_client_warning())
    if not (is_single_process() or read_only):
        from_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    options = ocp.CheckpointManagerOptions(
        async_options=ocp.AsyncOptions(WRITE_SECONDS, barrier_sync_fn=barrier.barrier()),
        preservation_policy=None if read_only else policy,
        cleanup_tmp_directories=not read_only,
        create=is_single_process() and not read_only,
        multiprocessing_options=_processes(range(jax.process_count())),
        read_only=read_only,
    )
    return Checkpoints(ocp.CheckpointManager(folder, options=options), barrier, read_only)


def check_can_store(folder: pathlib.Path) -> None:
    """Write and read a small checkpoint, to check that checkpoints can be stored in `folder`.

    With several processes only a file is written. A full disk is only logged if checkpoints exist.

    Raises:
      UserError: If `folder` cannot be written, or if orbax does not accept its path.
      RunError: If the disk is full and `folder` has no checkpoint.
    """
    import orbax.checkpoint as ocp

    folder = folder.resolve()
    refused = f"cannot store checkpoints in {folder}: "
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(f"{refused}the path is not valid UTF-8; give another --workdir") from None
    if "\\" in str(folder):  # orbax reads it as a slash
        raise UserError(f"{refused}the path contains a backslash; give another --workdir")
    state, host = {"probe": np.arange(3)}, {"probe": 1}
    args = {"state": ocp.args.StandardSave(state), "host": ocp.args.JsonSave(host)}
    like = {"state": ocp.args.StandardRestore(state), "host": ocp.args.JsonRestore()}
    probe = None
    try:
        folder.mkdir(exist_ok=True)
        # A new directory: a manager that is open in `folder` deletes incomplete checkpoints there.
        probe = pathlib.Path(tempfile.mkdtemp(prefix=".probe.", dir=folder))
        (probe / "file").write_bytes(bytes(4096))
        if not is_single_process():
            return
        with quiet_event_loop(), contextlib.closing(_reader()) as checkpointer:
            checkpointer.save(probe / "0", args=ocp.args.Composite(**args))
            read = checkpointer.restore(probe / "0", args=ocp.args.Composite(**like))
        if read.state["probe"].tolist() != [0, 1, 2] or read.host != host:
            raise ValueError("the checkpoint that was read differs from what was written")
    except Exception as error:  # orbax and the file system raise exceptions of many types
        text = str(error)
        why = next((os.strerror(n) for n in FULL if os.strerror(n) in text), None)
        if why and not any(folder.glob("[0-9]*")):
            raise RunError(f"{refused}{why}; free disk space, then run the command again") from None
        if why:
            log(f"{refused}{why}; the run continues from its newest checkpoint; free disk space")
            return
        if isinstance(error, OSError):
            raise UserError(f"{refused}{one_line(error)}; give another --workdir") from None
        raise UserError(
            f"{refused}orbax does not accept this path ({one_line(error)}); give another --workdir"
        ) from None
    finally:
        if probe is not None:
            shutil.rmtree(probe, ignore_errors=True)


def _processes(indices: Iterable[int]) -> Any:
    """Return options of orbax: the processes `indices` wait for each other at most 5 minutes."""
    import orbax.checkpoint as ocp

    active = set(indices)
    if is_single_process():
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(primary_host=min(active), active_processes=active)


def _reader() -> Any:
    """Return an orbax checkpointer that does not wait for other processes, which may fail."""
    import orbax.checkpoint as ocp

    options = _processes([jax.process_index()])
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=options)
