"""Checkpoints, through orbax: the only file that imports it.

A checkpoint is a state's arrays and a small record of the host's (JSON).  It is written in
the background and appears under its name whole or not at all, so a process killed at any
moment leaves the one before it.
"""

import copy
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

KEEP_NEWEST = 3
KEEP_BEST = 1
BEST = "test/loss"  # lower is better


class Checkpoints(NamedTuple):
    """The checkpoints of one run directory."""

    manager: Any

    def save(self, step: int, state: Any, host: dict, metrics: dict | None = None) -> None:
        """Start writing `state` and the host's record; returns before they are on disk.

        Both are copied first: a training step donates, and so overwrites, its state, and the
        host goes on with its record.
        """
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.map(jnp.copy, state)),
            host=ocp.args.JsonSave(copy.deepcopy(host)),
        )
        best = {BEST: metrics[BEST]} if metrics else None
        self.manager.save(step, args=args, metrics=best, force=True)

    def newest(self) -> int | None:
        """The step of the newest checkpoint, if there is one."""
        return self.manager.latest_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict]:
        """(state, host record) of a step; `like` has the state's shapes and placement."""
        import orbax.checkpoint as ocp

        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), host=ocp.args.JsonRestore())
        found = self.manager.restore(step, args=args)
        return found.state, found.host

    def wait(self) -> None:
        """Wait until what was started is on disk."""
        self.manager.wait_until_finished()

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
    return Checkpoints(ocp.CheckpointManager(folder.resolve(), options=options))
