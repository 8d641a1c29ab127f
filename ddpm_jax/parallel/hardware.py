"""What the devices are, how much memory they use and how busy they are."""

import math
import os

import jax

from ddpm_jax.errors import UserError, one_line
from ddpm_jax.system.environment import check_device
from ddpm_jax.system.record import Record


def memory() -> dict[str, float]:
    """Return the peak memory of this process's devices, where they report it."""
    stats_of_all = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in stats_of_all if "peak_bytes_in_use" in stats]
    return {"peak_memory_bytes": float(max(peaks))} if peaks else {}


# Operations per second of matrix products in bfloat16, as the makers state them (dense).
PEAKS = {
    "TPU v2": 22.5e12, "TPU v3": 61.5e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
    "TPU v5": 459e12, "TPU v6 lite": 918e12, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12, "NVIDIA L4": 121e12, "Tesla T4": 65e12, "Tesla V100": 125e12,
}  # fmt: skip


def utilisation(per_step: float, lap: dict[str, float]) -> dict[str, float]:
    """Return a device's operations per second, and their share of its peak where it is known."""
    if not per_step or not math.isfinite(per_step):
        return {}
    rate = per_step * lap["steps_per_second"]
    kind = jax.devices()[0].device_kind
    peak = max((name for name in PEAKS if kind.startswith(name)), key=len, default=None)
    share = {"model_flops_utilisation": rate / PEAKS[peak]} if peak else {}
    return {"flops_per_second_per_device": rate, **share}


def describe() -> Record:
    """Return the devices, for `config.json`."""
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
    }


def check_platform() -> None:
    """Check that jax has devices, as `JAX_PLATFORMS` asks for.

    Raises:
      UserError: there are none of that platform.
    """
    names = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
    name = next((name for name in names if os.environ.get(name)), names[0])
    asked = os.environ.get(name, "")
    try:
        jax.devices()
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = one_line(error, 150) or "there are no such devices"
        raise UserError(
            f"{name}={asked}: jax has no devices of it here: {reason}; unset {name}, or set it to "
            "cpu"
        ) from None
    check_device()
