"""Properties of the devices: name, peak memory and utilisation."""

import math
import os

import jax

from ddpm_jax.errors import UserError, one_line
from ddpm_jax.system.environment import check_device
from ddpm_jax.system.record import Record


def memory() -> dict[str, float]:
    """Return the peak memory in bytes of this process's devices, or {} if it is not reported."""
    all_stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in all_stats if "peak_bytes_in_use" in stats]
    return {"peak_memory_bytes": float(max(peaks))} if peaks else {}


# Peak operations per second of dense matrix products in bfloat16, as published by the vendors.
PEAKS = {
    "TPU v2": 22.5e12, "TPU v3": 61.5e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
    "TPU v5": 459e12, "TPU v6 lite": 918e12, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12, "NVIDIA L4": 121e12, "Tesla T4": 65e12, "Tesla V100": 125e12,
}  # fmt: skip


def utilisation(per_step: float, lap: dict[str, float]) -> dict[str, float]:
    """Return a device's operations per second, and the ratio to the peak rate in `PEAKS`.

    The ratio is omitted if `PEAKS` does not contain the device.  Return an empty dict if `per_step`
    is 0 or not finite.

    Args:
      per_step: Floating-point operations of one training step on one device; 0 if unknown.
      lap: Timings since the last log line; the entry `steps_per_second` is used.
    """
    if not per_step or not math.isfinite(per_step):
        return {}
    rate = per_step * lap["steps_per_second"]
    kind = jax.devices()[0].device_kind
    peak = max((name for name in PEAKS if kind.startswith(name)), key=len, default=None)
    utilised = {"model_flops_utilisation": rate / PEAKS[peak]} if peak else {}
    return {"flops_per_second_per_device": rate, **utilised}


def describe() -> Record:
    """Return the platform, type and number of all devices, to be written to `config.json`."""
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
    }


def check_platform() -> None:
    """Check that jax finds devices of the platform that the variable `JAX_PLATFORMS` names.

    Raises:
      UserError: If there are no devices of that platform.
    """
    names = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
    name = next((name for name in names if os.environ.get(name)), names[0])
    platform = os.environ.get(name, "")
    try:
        jax.devices()
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = one_line(error, 150) or "there are no such devices"
        raise UserError(
            f"environment variable {name}={platform}: jax finds no devices of this platform "
            f"({reason}); unset {name}, or set it to cpu"
        ) from None
    check_device()
