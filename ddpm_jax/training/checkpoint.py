"""Checkpoints, through orbax: the only file that imports it.

A checkpoint is a state's arrays and a small record of the host's (JSON).  It is written in
the background and appears under its name whole or not at all, so a process killed at any
moment leaves the one before it.

With several processes, each writes and reads its part.  If one of them cannot, all of them give
up: they try the folder before they write, meet when they have written, and compare what they have
read.
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
    Meeting,
    alone,
    complaint,
    from_main,
    is_main,
    without_client,
)
from ddpm_jax.progress import log, log_once
from ddpm_jax.system.unraisable import quiet_event_loop
from ddpm_jax.training.check_sums import agree, check_record, check_sums
from ddpm_jax.training.records import FORMAT

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

WRITE_SECONDS = 600  # after which a process that has not written its part is not waited for
KEEP_NEWEST = 3
KEEP_BEST = 1
BEST = "validation/loss"  # lower is better
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, or what a user may use of it
SUMS = "check_sums"  # in the host's record

STRUCTURE = "tree structures do not match"  # of a checkpoint and a state, as orbax says it


class Checkpoints(NamedTuple):
    """The checkpoints of one run directory."""

    manager: "ocp.CheckpointManager"
    meeting: Meeting
    read_only: bool = False

    def save(
        self,
        step: int,
        state: PyTree,
        host: Mapping[str, object],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Start writing `state` and the host's record; returns before they are on disk.

        Both are copied first: a training step donates, and so overwrites, its state, and the
        host goes on with its record.  A failure to write is logged, and the ones before stay.

        Args:
          step: number of steps done.
          state: arrays.
          host: the host's record, of JSON's types.
          metrics: of the evaluation, which decide on the best checkpoint; None: none.
        """
        import orbax.checkpoint as ocp

        self.wait()
        why = "" if alone() else complaint(self._refusal())
        if why:
            log(f"cannot write the checkpoint of step {step}: {why}; the run goes on without it")
            return
        self.meeting.begin()
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
        """Return why this process cannot write into the folder, by trying; "" if it can."""
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
        """Return the step of the newest checkpoint, if there is one."""
        return cast(int | None, self.manager.latest_step())

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, object]]:
        """Return (state, host record) of a step; `like` has the state's shapes and placement.

        What is `...` in it is not read, and is `...` in the state.

        Raises:
          UserError: it is damaged, here or where another process reads it.
        """
        import orbax.checkpoint as ocp

        state: PyTree = None
        host: dict[str, object] = {}
        sums, why = None, ""
        how = ocp.checkpoint_utils.construct_restore_args(like)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(like, how), host=ocp.args.JsonRestore()
        )
        try:
            with quiet_event_loop(), contextlib.closing(_reader()) as reader:
                read = reader.restore(pathlib.Path(self.manager.directory) / str(step), args=args)
            state, host = read.state, dict(read.host)
            version = host.pop("format", 1)
            if version != FORMAT:
                raise ValueError(f"it is of format {version}; this version reads {FORMAT}")
            # A checkpoint of before there were any has none.
            sums = check_record(host, host.pop(SUMS, None))
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # of the machine, not of the file
        except Exception as error:  # of many kinds, from orbax's own to the JSON reader's
            why = " ".join(str(error).split())[:200] or repr(error)
        why = complaint(why)
        if not why:  # all have their part, of which the sums are taken together
            same = sums is None or agree(sums, check_sums(state, host))
            why = complaint("" if same else "its check sums differ")
        if why:
            kind = "of another version of the code" if STRUCTURE in why else "damaged"
            raise UserError(f"the checkpoint of step {step} is {kind}: {why}")
        return state, host

    def restore_newest(self, like: PyTree) -> tuple[int, PyTree | None, dict[str, object]]:
        """Return (step, state, host record) of the newest undamaged one, or (0, None, {}).

        Damaged ones are logged and, where this may write and there is a good one, set aside.

        Raises:
          UserError: all of them are.
        """
        steps = from_main(lambda: sorted(self.manager.all_steps(), reverse=True))
        damaged = []
        for step in steps:
            try:
                state, host = self.restore(step, like)
            except UserError as error:
                log(f"{error}; trying the one before")
                damaged.append(step)
                continue
            for bad_step in [] if self.read_only else damaged:
                self._set_aside(bad_step)
            return step, state, host
        if steps:
            raise UserError(
                f"every checkpoint in {self.manager.directory} is damaged, or of another version "
                "of the code; they stay as they are: give another --workdir"
            )
        return 0, None, {}

    def _set_aside(self, step: int) -> None:
        folder = pathlib.Path(self.manager.directory)
        aside = folder.with_name("damaged") / str(step)

        def move() -> None:
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(exist_ok=True)
                (folder / str(step)).rename(aside)
            except OSError as error:
                raise RunError(
                    f"cannot move the damaged checkpoint {folder / str(step)} to {aside}: "
                    f"{error.strerror}"
                ) from None

        from_main(move)
        self.manager.reload()

    def check_written(self, step: int) -> None:
        """Check that the checkpoint of `step`, the last one, is on disk; waits for it.

        Raises:
          RunError: it is not; the message names the newest one that is.
        """
        self.wait()

        def newest() -> int | None:
            steps = pathlib.Path(self.manager.directory).glob("[0-9]*")
            return max((int(path.name) for path in steps if path.name.isdigit()), default=None)

        written = from_main(newest)
        if written == step:
            return
        left = "there is none" if written is None else f"the newest is of step {written}"
        raise RunError(
            f"the checkpoint of step {step}, the last one, could not be written to "
            f"{self.manager.directory}: {left}; see to it that there is room and that the "
            "directory can be written to, and the same command goes on from there"
        )

    def wait(self) -> None:
        """Wait until what was started is on disk, or log that it could not be written."""
        with self._reporting():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of many kinds, as the file system and orbax please
            folder = pathlib.Path(self.manager.directory)
            drafts = sorted(folder.glob("*.orbax-checkpoint-tmp"))
            for draft in drafts if is_main() else []:  # what is there of it takes room
                shutil.rmtree(draft, ignore_errors=True)
            which = f" of step {drafts[-1].name.partition('.')[0]}" if drafts else ""
            log(
                f"cannot write the checkpoint{which}: {one_line(error)}; the run goes on without it"
            )

    def close(self) -> None:
        """Finish writing and let go."""
        self.wait()
        self.manager.close()


def open_checkpoints(folder: pathlib.Path, read_only: bool = False) -> Checkpoints:
    """Return the checkpoints below `folder`, which keeps the newest few and the best."""
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
    folder, meeting = folder.resolve(), Meeting()
    if without_client():
        log_once(without_client())
    if not (alone() or read_only):
        from_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    options = ocp.CheckpointManagerOptions(
        async_options=ocp.AsyncOptions(WRITE_SECONDS, barrier_sync_fn=meeting.barrier()),
        preservation_policy=None if read_only else policy,
        cleanup_tmp_directories=not read_only,
        create=alone() and not read_only,
        multiprocessing_options=_processes(range(jax.process_count())),
        read_only=read_only,
    )
    return Checkpoints(ocp.CheckpointManager(folder, options=options), meeting, read_only)


def check_store(folder: pathlib.Path) -> None:
    """Check, by writing and reading a tiny one, that checkpoints can be kept below `folder`.

    Of several processes, of which one alone cannot save, it only tries to write a file.

    Raises:
      UserError: they cannot; there are paths that the store cannot take.
      RunError: the disk is full, and there is no checkpoint that a run could go on from; where
        there is one, the full disk is logged.
    """
    import orbax.checkpoint as ocp

    folder = folder.resolve()
    refused = f"checkpoints cannot be kept in {folder}: "
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UserError(f"{refused}the path is not UTF-8; give another --workdir") from None
    if "\\" in str(folder):  # which the store reads as a slash
        raise UserError(f"{refused}the path holds a backslash; give another --workdir")
    state, host = {"probe": np.arange(3)}, {"probe": 1}
    args = {"state": ocp.args.StandardSave(state), "host": ocp.args.JsonSave(host)}
    like = {"state": ocp.args.StandardRestore(state), "host": ocp.args.JsonRestore()}
    place = None
    try:
        folder.mkdir(exist_ok=True)
        # A new folder: an open manager removes unfinished checkpoints that lie beside its own.
        place = pathlib.Path(tempfile.mkdtemp(prefix=".probe.", dir=folder))
        (place / "file").write_bytes(bytes(4096))
        if not alone():
            return
        with quiet_event_loop(), contextlib.closing(_reader()) as store:
            store.save(place / "0", args=ocp.args.Composite(**args))
            read = store.restore(place / "0", args=ocp.args.Composite(**like))
        if read.state["probe"].tolist() != [0, 1, 2] or read.host != host:
            raise ValueError("what was written is not what is read")
    except Exception as error:  # of many kinds, from the store's to Python's own
        text = str(error)
        why = next((os.strerror(n) for n in FULL if os.strerror(n) in text), None)
        if why and not any(folder.glob("[0-9]*")):
            raise RunError(f"{refused}{why}; make room") from None
        if why:
            log(f"cannot write to {folder}: {why}; make room, the run goes on")
            return
        if isinstance(error, OSError):
            raise UserError(f"{refused}{one_line(error)}; give another --workdir") from None
        raise UserError(
            f"{refused}the store does not take this path ({one_line(error)}); give another "
            "--workdir"
        ) from None
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


def _processes(numbers: Iterable[int]) -> Any:
    """Return orbax's options for the processes that wait for each other.

    Named, they wait through the coordinator, for at most 5 minutes. By default they would wait
    through the devices, without a limit, even for a process that has given up.
    """
    import orbax.checkpoint as ocp

    active = set(numbers)
    if alone():
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(primary_host=min(active), active_processes=active)


def _reader() -> Any:
    """Return a reader that does not wait for other processes, which may have failed."""
    import orbax.checkpoint as ocp

    options = _processes([jax.process_index()])
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=options)
