"""What a run logs at its start: data, classes and devices."""

import pathlib

from ddpm_jax.data.types import ENDLESS, Data, Loaded, Split
from ddpm_jax.errors import printable
from ddpm_jax.parallel import hardware
from ddpm_jax.progress import log

SHOWN_CLASSES = 20  # names at the start of a run


def log_start(name: str, loaded: Loaded, workdir: pathlib.Path) -> None:
    """Log what a run trains on and where it writes.

    Args:
      name: the run's title.
      loaded: its data.
      workdir: its directory.
    """
    here, data = hardware.describe(), loaded.data
    height, width, channels = data.shape
    log(
        f"{name} on {data.title}: {_size(data.train)} images to train on, "
        f"{_held_out(data)}{len(data.test.images)} to test on, "
        f"{height}x{width}x{channels}, {data.levels} levels, {_classes(data.classes)}\n"
        f"{here['count']} x {here['kind']} ({here['platform']}); everything goes to {workdir}"
    )
    for note in data.notes:
        log(f"{data.title}: {note}")
    log_loudly(loaded.note)


def _classes(names: tuple[str, ...]) -> str:
    """Return how many classes there are, and the first of them."""
    if not names:
        return "no classes"
    shown = ", ".join(printable(name) for name in names[:SHOWN_CLASSES])
    return f"{len(names)} classes: {shown}" + ", ..." * (len(names) > SHOWN_CLASSES)


def _held_out(data: Data) -> str:
    return f"{len(data.validation.images)} to validate on, " if data.validation else ""


def _size(split: Split) -> str:
    count = len(split.images)
    return "endless" if count == ENDLESS else str(count)


def log_loudly(line: str) -> None:
    """Log a line between two rules, so that nobody misses it; nothing if it is empty."""
    if line:
        log(f"{'!' * 80}\n{printable(line)}\n{'!' * 80}")
