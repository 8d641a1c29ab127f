"""Where figures and pictures can be watched besides the run directory's own files."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.errors import UserError


class Board(NamedTuple):
    """log(step, {name: value}); picture(step, name, uint8 [H, W, C]); flush(); close()."""

    log: Callable[[int, dict[str, float]], None]
    picture: Callable[[int, str, np.ndarray], None]
    flush: Callable[[], None]
    close: Callable[[], None]


def tensorboard(folder: pathlib.Path, step: int) -> Board:
    """TensorBoard's event files in `folder`; what was there of after `step` is not shown."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=step + 1)

    def log(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def picture(step: int, name: str, image: np.ndarray) -> None:
        writer.add_image(name, image, step, dataformats="HWC")

    return Board(log, picture, writer.flush, writer.close)


def weights_and_biases(workdir: pathlib.Path, record: dict[str, Any]) -> Board:
    """A run of Weights & Biases, named as `workdir` and resumed with it.

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

    def picture(step: int, name: str, image: np.ndarray) -> None:
        run.log({f"images/{name}": wandb.Image(image)}, step=step)

    return Board(log, picture, lambda: None, run.finish)


def check_wandb() -> None:
    """Raises UserError if Weights & Biases is not installed."""
    _wandb()


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb: Weights & Biases is not installed; pip install wandb") from None
    return wandb
