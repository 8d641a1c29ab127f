"""Where figures and pictures can be watched besides the run directory's own files."""

import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.system.record import Record


class Board(NamedTuple):
    """log(step, {name: value}); log_image(step, name, uint8 [H, W, C]); flush(); close()."""

    log: Callable[[int, dict[str, float]], None]
    log_image: Callable[[int, str, np.ndarray], None]
    flush: Callable[[], None]
    close: Callable[[], None]


def tensorboard(folder: pathlib.Path, step: int) -> Board:
    """Return a writer of TensorBoard's event files in `folder`; events after `step` are hidden.

    Written in the caller's thread: tensorboardX's own hangs for good when the clock jumps back.
    """
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder.mkdir(exist_ok=True)
    writer = EventsWriter(str(folder / "events"), filename_suffix=f".{step}")

    def write(step: int, **what: Any) -> None:
        writer.write_event(Event(wall_time=time.time(), step=step, **what))

    write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            write(step, summary=summary.scalar(name, value))

    def log_image(step: int, name: str, image: np.ndarray) -> None:
        write(step, summary=summary.image(name, image, dataformats="HWC"))

    return Board(log, log_image, writer.flush, writer.close)


def weights_and_biases(workdir: pathlib.Path, record: Record) -> Board:
    """Return a run of Weights & Biases, named as `workdir` and resumed with it.

    Raises:
      UserError: it is not installed.
    """
    wandb = _wandb()
    known = workdir / "wandb_id"
    if not known.exists():
        known.write_text(wandb.util.generate_id() + "\n")
    run = wandb.init(
        project="ddpm_jax",
        name=workdir.name,
        id=known.read_text().strip(),
        resume="allow",
        dir=str(workdir),
        config=record,
    )

    def log(step: int, metrics: dict[str, float]) -> None:
        run.log(metrics, step=step)

    def log_image(step: int, name: str, image: np.ndarray) -> None:
        run.log({f"images/{name}": wandb.Image(image)}, step=step)

    return Board(log, log_image, lambda: None, run.finish)


def check_wandb() -> None:
    """Check that Weights & Biases is installed.

    Raises:
      UserError: it is not.
    """
    _wandb()


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb: Weights & Biases is not installed; pip install wandb") from None
    return wandb
