"""Checkpoints, through orbax: the only file that imports it.

A checkpoint is a state's arrays and a small record of the host's (JSON).  It is written in
the background and appears under its name whole or not at all, so a process killed at any
moment leaves the one before it.
"""

import contextlib
import copy
import json
import pathlib
import shutil
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.parallel import from_main
from ddpm_jax.progress import tell

KEEP_NEWEST = 3
KEEP_BEST = 1
BEST = "test/loss"  # lower is better
SUMS = "check_sums"  # in the host's record


class Checkpoints(NamedTuple):
    """The checkpoints of one run directory."""

    manager: Any
    read_only: bool = False

    def save(self, step: int, state: Any, host: dict, metrics: dict | None = None) -> None:
        """Start writing `state` and the host's record; returns before they are on disk.

        Both are copied first: a training step donates, and so overwrites, its state, and the
        host goes on with its record.  What cannot be written is told of, and the ones before stay.
        """
        import orbax.checkpoint as ocp

        self.wait()
        host = copy.deepcopy(host)
        host[SUMS] = check_sums(state, host)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.map(jnp.copy, state)),
            host=ocp.args.JsonSave(host),
        )
        best = {BEST: metrics[BEST]} if metrics else None
        with self._telling():
            self.manager.save(step, args=args, metrics=best, force=True)

    def newest(self) -> int | None:
        """The step of the newest checkpoint, if there is one."""
        return self.manager.latest_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict]:
        """(state, host record) of a step; `like` has the state's shapes and placement.

        Raises:
          UserError: it is damaged.
        """
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), host=ocp.args.JsonRestore())
        try:
            found = self.manager.restore(step, args=args)
            state, host = found.state, dict(found.host)
            sums = host.pop(SUMS, None)  # a checkpoint of before there were any has none
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # of the machine, not of the file
        except Exception as error:  # of many kinds, from orbax's own to the JSON reader's
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the checkpoint of step {step} is damaged: {reason}") from error
        if sums is not None and sums != check_sums(state, host):
            raise UserError(f"the checkpoint of step {step} is damaged: its check sums differ")
        return state, host

    def restore_newest(self, like: Any) -> tuple[int, Any | None, dict]:
        """(step, state, host record) of the newest that is not damaged; (0, None, {}) of none.

        Damaged ones are told of and, where this may write and there is a good one, set aside.

        Raises:
          UserError: all of them are.
        """
        steps, damaged = sorted(self.manager.all_steps(), reverse=True), []
        for step in steps:
            try:
                state, host = self.restore(step, like)
            except UserError as error:
                tell(f"{error}; trying the one before")
                damaged.append(step)
                continue
            for other in [] if self.read_only else damaged:
                self._set_aside(other)
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
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (folder / str(step)).rename(aside)

        from_main(move)
        self.manager.reload()

    def wait(self) -> None:
        """Wait until what was started is on disk, or tell that it could not be written."""
        with self._telling():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of many kinds, as the file system and orbax please
            folder = pathlib.Path(self.manager.directory)
            drafts = sorted(folder.glob("*.orbax-checkpoint-tmp"))
            for draft in drafts:  # what is there of it takes room
                shutil.rmtree(draft, ignore_errors=True)
            reason = " ".join(str(error).split())[-200:]
            which = f" of step {drafts[-1].name.partition('.')[0]}" if drafts else ""
            tell(f"cannot write the checkpoint{which}: ...{reason}; the run goes on without it")

    def close(self) -> None:
        """Finish writing and let go."""
        self.manager.close()


def open_checkpoints(folder: pathlib.Path, read_only: bool = False) -> Checkpoints:
    """The checkpoints below `folder`, which keeps the newest few and the best."""
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
    options = ocp.CheckpointManagerOptions(
        preservation_policy=None if read_only else policy,
        cleanup_tmp_directories=not read_only,
        create=not read_only,
        read_only=read_only,
    )
    return Checkpoints(ocp.CheckpointManager(folder.resolve(), options=options), read_only)


def check_sums(state: Any, host: dict) -> dict[str, Any]:
    """A number for every array, the same however it lies on devices, and one for the record.

    sum of (2 i + 1) word_i modulo 2^32: any one word changed changes it.
    """
    text = json.dumps(host, sort_keys=True).encode()
    sums = np.asarray(_sums(jax.tree.leaves(state)))
    return {"arrays": sums.tolist(), "host": zlib.crc32(text)}


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sum(leaf) for leaf in leaves])


def _sum(array: jax.Array) -> jax.Array:
    words: Any = array
    if array.dtype == bool:
        words = array.astype(jnp.uint8)
    else:  # numbers of 8 bytes become two words of 4
        sizes = {1: jnp.uint8, 2: jnp.uint16}
        words = jax.lax.bitcast_convert_type(array, sizes.get(array.dtype.itemsize, jnp.uint32))
    place = jnp.zeros((), jnp.uint32)
    for axis, length in enumerate(words.shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)
