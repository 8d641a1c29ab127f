"""Checks of jax's environment variables, with error messages of one line."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator

from ddpm_jax.errors import UserError

MAX_CPU_DEVICES = 1024  # more devices take minutes to start
# Options for debugging jax. With these values, training steps cannot be compiled or run.
REFUSED: dict[str, tuple[bool | str, ...]] = {
    "jax_disable_jit": (True,),
    "jax_no_execution": (True,),
    "jax_debug_key_reuse": (True,),
    "jax_numpy_dtype_promotion": ("strict",),
    "jax_numpy_rank_promotion": ("raise",),
    "jax_transfer_guard": ("disallow", "disallow_explicit"),
}


def import_jax() -> None:
    """Import jax and jaxtyping, and check the environment variables that they read.

    Raises:
      UserError: If a variable has a value that is not allowed.
    """
    with _one_line(name for name in os.environ if name.startswith("JAX")):
        import jax
        import jaxtyping  # noqa: F401
    for option, values in REFUSED.items():
        variable = option.upper()
        if getattr(jax.config, option, None) in values and variable in os.environ:
            raise UserError(
                f"environment variable {variable}={os.environ[variable]} is for debugging jax, and "
                f"this program cannot run with it; unset {variable}"
            )
    _check_cpu_devices(jax.config.values["jax_num_cpu_devices"])


def check_device() -> None:
    """Check that jax can put an array on its default device.

    Raises:
      UserError: If the value of `JAX_DEFAULT_DEVICE` is not a device.
    """
    import jax

    with _one_line(("JAX_DEFAULT_DEVICE",)):
        jax.numpy.zeros(()).block_until_ready()


def _check_cpu_devices(count: int) -> None:
    """Check the number of CPU devices in `count`, unless it is -1, and in `XLA_FLAGS`."""
    name = "--xla_force_host_platform_device_count"
    numbers = [("JAX_NUM_CPU_DEVICES", count)] if count != -1 else []
    for text in re.findall(rf"{name}=(-?\d+)(?!\S)", os.environ.get("XLA_FLAGS", "")):
        numbers.append((f"XLA_FLAGS: {name}", int(text[:20])))
    for flag, number in numbers:
        if not 1 <= number <= MAX_CPU_DEVICES:
            raise UserError(
                f"environment variable {flag}={number}: must be from 1 to {MAX_CPU_DEVICES}"
            )


@contextlib.contextmanager
def _one_line(names: Iterable[str]) -> Iterator[None]:
    """Raise UserError instead of a ValueError about an environment variable in `names`."""
    try:
        yield
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        values = {name: os.environ.get(name) for name in names}
        for matching in (
            [name for name in values if re.search(rf"\b{name}\b", reason, re.IGNORECASE)],
            [name for name, value in values.items() if value and repr(value) in reason],
        ):
            if matching:
                name = matching[0]
                raise UserError(
                    f"environment variable {name}={values[name]} is not allowed ({reason}); "
                    f"correct the value, or unset {name}"
                ) from None
        raise
