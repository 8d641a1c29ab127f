"""Check before a run starts that it fits into memory."""

import math
import os

import jax

from ddpm_jax.config import fields_of
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.types import Config
from ddpm_jax.fields import EVAL_BATCH, HOST_IMAGES
from ddpm_jax.progress import log
from ddpm_jax.task import Task
from ddpm_jax.training import step

TIMES_MEMORY = 4  # a run that needs more than this multiple of the memory is refused
IMAGES_PER_STEP = 2 * 10  # images that a trajectory stores per sampling step: x_t and x0 of ten


def check_sizes(task: Task, config: Config, parallel: str = "jit") -> None:
    """Check that the parameters, the optimizer state, the averages and one batch fit into memory.

    A run that needs more than four times the memory is refused. A warning is logged if the run
    needs more than half of the memory. The check does not allocate these arrays.

    Args:
      task: Task of the config.
      config: Config whose task is bound to its data set.
      parallel: How the state is partitioned across devices, a value of the flag `--parallel`.

    Raises:
      UserError: If the run needs too much memory.
    """
    info, train = config.task.info, config.train
    pixels = math.prod(info.shape)
    batch = (pixels + 4 + info.caption_length) * train.batch_size * train.steps_per_call
    flag = f"--config.train.batch_size={train.batch_size}"
    if train.steps_per_call > 1:
        flag += f" x --config.train.steps_per_call={train.steps_per_call}"
    per_device = max(1, jax.device_count() if _has_memory() else 1)
    _check_bytes(batch // per_device, f"one batch ({flag})", f"{flag}: is too large")
    for field in fields_of(config):
        flag = f"--config.{field.path}={field.value}"
        if EVAL_BATCH in field.marks:
            need = 4 * pixels * field.value // per_device
            _check_bytes(need, f"one evaluation batch ({flag})", f"{flag}: is too large")
        if HOST_IMAGES in field.marks:
            check_images(field.value, info.shape, f"--config.{field.path}")
        if field.path.endswith("sampling.steps"):
            count = IMAGES_PER_STEP * field.value
            check_images(count, info.shape, f"--config.{field.path}", field.value)
    try:
        shapes = step.state_shapes(task, config, info.shape)
        state = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(shapes))
    except (OverflowError, MemoryError):
        state = 2**63
    state_per_device = state // per_device if parallel == "fsdp" else state
    what = f"parameters, optimizer and averages of {_size(state)} and a batch of {_size(batch)}"
    _check_bytes(state_per_device + batch // per_device, what, "the network is too large")


def check_images(count: int, shape: tuple[int, ...], flag: str, value: int | None = None) -> None:
    """Check that a number of float32 images fits into the host's memory.

    Args:
      count: Number of images.
      shape: Shape of one image.
      flag: Flag that determines the number of images.
      value: Value of the flag for the error message; if None, the value is `count`.

    Raises:
      UserError: If the images need more than four times the memory.
    """
    value = count if value is None else value
    need = 4 * count * math.prod(shape)
    if need > TIMES_MEMORY * _host_memory():
        raise UserError(
            f"{flag}={value}: the images would need {_size(need)}, and this machine has "
            f"{_size(_host_memory())} of memory; give a smaller number"
        )


def _check_bytes(need: int, what: str, message: str) -> None:
    """Raise UserError if arrays are far larger than the memory; log a warning if they may be.

    Args:
      need: Size of the arrays in bytes.
      what: Description of the arrays.
      message: Start of the error message.
    """
    memory = _memory()
    if need > TIMES_MEMORY * memory:
        raise UserError(
            f"{message}: {what} would need {_size(need)}, and the memory has {_size(memory)}; "
            "give a smaller number"
        )
    if need > memory / 2:
        log(f"{what} need {_size(need)} of {_size(memory)} of memory; the run may not fit")


def _has_memory() -> bool:
    """Return True if a device has memory separate from the host's."""
    return "bytes_limit" in (jax.local_devices()[0].memory_stats() or {})


def _memory() -> int:
    """Return a device's memory in bytes, or the host's memory if the devices use it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit") or _host_memory())


def _host_memory() -> int:
    """Return the host's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(count: int) -> str:
    """Return a number of bytes as text with a unit, such as "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:,.0f} PiB"
