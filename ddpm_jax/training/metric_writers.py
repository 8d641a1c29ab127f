"""Writers of metrics and images for TensorBoard and Weights & Biases."""

import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.errors import UserError
from ddpm_jax.system.record import Record


class MetricWriter(NamedTuple):
    """Functions that write the metrics and images of a run to one destination.

    Attributes:
      log: Function (step, {name: value}) that writes metrics.
      log_image: Function (step, name, image) that writes an image, uint8 [H, W, C].
      flush: Function that writes all stored values to disk.
      close: Function that ends the writer.
    """

    log: Callable[[int, dict[str, float]], None]
    log_image: Callable[[int, str, np.ndarray], None]
    flush: Callable[[], None]
    close: Callable[[], None]


def tensorboard(directory: pathlib.Path, step: int) -> MetricWriter:
    """Return a writer of TensorBoard event files for a run that starts or resumes at `step`.

    TensorBoard does not display events of later steps that the run wrote before it was resumed.
    Events are written in the calling thread, because the thread of tensorboardX's `SummaryWriter`
    hangs forever when the system clock is set back.
    """
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    directory.mkdir(exist_ok=True)
    writer = EventsWriter(str(directory / "events"), filename_suffix=f".{step}")

    def write(step: int, **content: Any) -> None:
        writer.write_event(Event(wall_time=time.time(), step=step, **content))

    write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            write(step, summary=summary.scalar(name, value))

    def log_image(step: int, name: str, image: np.ndarray) -> None:
        write(step, summary=summary.image(name, image, dataformats="HWC"))

    return MetricWriter(log, log_image, writer.flush, writer.close)


def weights_and_biases(workdir: pathlib.Path, record: Record) -> MetricWriter:
    """Return a writer to Weights & Biases, where the run has the name of the run directory.

    The file `wandb_id` stores the identifier of the run, so that a resumed run continues the same
    run on Weights & Biases. `record` is the content of config.json.

    Raises:
      UserError: If Weights & Biases is not installed.
    """
    wandb = _wandb()
    id_file = workdir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(wandb.util.generate_id() + "\n")
    run = wandb.init(
        project="ddpm_jax",
        name=workdir.name,
        id=id_file.read_text().strip(),
        resume="allow",
        dir=str(workdir),
        config=record,
    )

    def log(step: int, metrics: dict[str, float]) -> None:
        run.log(metrics, step=step)

    def log_image(step: int, name: str, image: np.ndarray) -> None:
        run.log({f"images/{name}": wandb.Image(image)}, step=step)

    return MetricWriter(log, log_image, lambda: None, run.finish)


def check_wandb() -> None:
    """Check that the package wandb (Weights & Biases) is installed.

    Raises:
      UserError: If wandb is not installed.
    """
    _wandb()


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "--wandb needs the package wandb, which is not installed; run pip install wandb"
        ) from None
    return wandb
