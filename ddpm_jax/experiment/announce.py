"""Log the data set, the devices and the directory of a run at its start."""

import pathlib

from ddpm_jax.data.types import ENDLESS, Data, Loaded, Split
from ddpm_jax.errors import printable
from ddpm_jax.parallel import hardware
from ddpm_jax.progress import log

SHOWN_CLASSES = 20  # largest number of class names in the log of a run's start


def log_start(name: str, loaded: Loaded, workdir: pathlib.Path) -> None:
    """Log the data set of a run, the devices, and the directory of its files.

    Args:
      name: Title of the run, such as text_to_image_shapes/autoencoder.
      loaded: Data set of the run.
      workdir: Directory of the run.
    """
    devices, data = hardware.describe(), loaded.data
    height, width, channels = data.shape
    log(
        f"{name} on {data.title}: {_size(data.train)} training images, "
        f"{_held_out(data)}{len(data.test.images)} test images, "
        f"{height}x{width}x{channels}, {data.levels} levels, {_classes(data.classes)}\n"
        f"devices: {devices['count']} x {devices['kind']} ({devices['platform']}); "
        f"run directory: {workdir}"
    )
    for note in data.notes:
        log(f"{data.title}: {note}")
    log_loudly(loaded.note)


def _classes(names: tuple[str, ...]) -> str:
    """Return a text such as "3 classes: cat, dog, fish", or "no classes"."""
    if not names:
        return "no classes"
    shown = ", ".join(printable(name) for name in names[:SHOWN_CLASSES])
    return f"{len(names)} classes: {shown}" + ", ..." * (len(names) > SHOWN_CLASSES)


def _held_out(data: Data) -> str:
    return f"{len(data.validation.images)} validation images, " if data.validation else ""


def _size(split: Split) -> str:
    count = len(split.images)
    return "endless" if count == ENDLESS else str(count)


def log_loudly(line: str) -> None:
    """Log a line between two rules of exclamation marks; log nothing if the line is empty."""
    if line:
        log(f"{'!' * 80}\n{printable(line)}\n{'!' * 80}")
