"""Start short runs in separate processes, interrupt them and read their results."""

import subprocess
import sys
import time

import jax
import numpy as np

from helpers.launching import ROOT, user_environment

COMMAND = [
    sys.executable, str(ROOT / "launch.py"), "--experiment=vae_digits", "--debug",
    "--config.train.steps=400", "--config.train.checkpoint_every=20",
    "--config.train.eval_every=50", "--config.train.log_every=10",
    "--config.task.eval_batch_size=180",
]  # fmt: skip
# A program that limits the size of files, as on a full disk, and then runs the command `argv`.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
sys.argv = {argv}
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(workdir):
    """Start a run; its output goes to NAME.log beside its directory NAME."""
    log = (workdir.parent / f"{workdir.name}.log").open("a")
    return subprocess.Popen(
        [*COMMAND, f"--workdir={workdir}"], env=user_environment(), stdout=log, stderr=log
    )


def wait_for(condition, process, timeout=60.0):
    """Wait until a condition is true, the process ends or `timeout` seconds have passed."""
    begun = time.monotonic()
    while not condition() and process.poll() is None and time.monotonic() - begun < timeout:
        time.sleep(0.02)


def finish(workdir):
    """Start or resume a run, and wait until it is finished."""
    process = start(workdir)
    assert process.wait(timeout=180) == 0, (workdir.parent / f"{workdir.name}.log").read_text()


def count_logged_lines(workdir):
    """Return the number of lines in metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def result_of(workdir):
    """Return (bytes of each array of the last checkpoint, bytes of metrics.jsonl)."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), host=ocp.args.JsonRestore())
        state = manager.restore(400, args=args).state
    arrays = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    return arrays, (workdir / "metrics.jsonl").read_bytes()


def checkpoint_steps(workdir):
    """Return the steps of the checkpoints, in rising order."""
    return sorted(
        int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
    )


def largest_file(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)
