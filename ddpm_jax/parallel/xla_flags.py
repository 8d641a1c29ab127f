"""Flags of XLA; a flag is set only if it was tested with the installed version of jaxlib."""

import functools
import importlib.metadata
import os
import subprocess
import sys
from typing import NamedTuple

from ddpm_jax.errors import UserError


class Flag(NamedTuple):
    """A flag of XLA for CPUs.

    Attributes:
      name: Name of the flag, without dashes.
      value: Value of the flag.
      versions: Versions of jaxlib with which the flag was tested. Other versions may abort the
        process if the flag is set.
      effect: Text of a warning if the flag cannot be set; empty if no warning is necessary.
    """

    name: str
    value: str | bool
    versions: tuple[str, ...]
    effect: str = ""

    @property
    def is_supported(self) -> bool:
        """True if the flag was tested with the installed version of jaxlib."""
        return importlib.metadata.version("jaxlib") in self.versions


# Flags of XLA_FLAGS.  FAST_CONVOLUTIONS makes the gradients of convolutions 2 to 3 times faster.
# The first flag of FAST_COMPILATION makes compilation 1/3 faster and programs slower.  The second
# flag sets the number of parallel parts of a compilation to half of the cores instead of 32,
# because often two programs are compiled at the same time.
FAST_CONVOLUTIONS = Flag(
    "xla_cpu_experimental_ynn_fusion_type",
    "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    ("0.10.2", "0.12.0.1"),
    "convolutions' gradients on CPUs may be 2 to 3 times slower",
)
FAST_COMPILATION = (
    Flag("xla_cpu_use_fusion_emitters", "false", ("0.10.2",), "--debug runs compile more slowly"),
    Flag(
        "xla_cpu_parallel_codegen_split_count",
        str(max(1, (os.cpu_count() or 1) // 2)),
        ("0.10.2", "0.12.0.1"),
    ),
)
# Options of the compiler for `fsdp`.  Without them, XLA gathers parameters as early as possible,
# and merges the gathers of the forward and the backward pass, so that a device stores all
# parameters at the same time.
LATE_GATHERS = (
    Flag(
        "xla_cpu_scheduler_type",
        "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        ("0.10.2",),
        "with fsdp, a CPU device may store all parameters at the same time",
    ),
    Flag("xla_disable_hlo_passes", "cse_barrier_expander", ("0.10.2",)),
)


def compiler_options(flags: tuple[Flag, ...]) -> dict[str, str | bool] | None:
    """Return {name: value} for the compiler, or None if jaxlib does not support all `flags`."""
    supported = all(flag.is_supported for flag in flags)
    return {flag.name: flag.value for flag in flags} if supported else None


def missing_flags_warning(*flags: Flag) -> str:
    """Return a warning about flags that this jaxlib does not support, or an empty string."""
    effects = [flag.effect for flag in flags if flag.effect and not flag.is_supported]
    version = importlib.metadata.version("jaxlib")
    text = f"ddpm_jax was not tested with jaxlib {version}: {'; '.join(effects)}"
    return text if effects else ""


def tune_cpu(debug: bool = False) -> None:
    """Add `FAST_CONVOLUTIONS` and, if `debug`, `FAST_COMPILATION` to `XLA_FLAGS`.

    Flags that the installed jaxlib does not support are not added.  Call this function before the
    first computation; later it has no effect.
    """
    for flag in (FAST_CONVOLUTIONS, *(FAST_COMPILATION if debug else ())):
        flags = os.environ.get("XLA_FLAGS", "")
        if flag.is_supported and f"--{flag.name}" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --{flag.name}={flag.value}".strip()


def tune_gpu() -> None:
    """Add flags to `XLA_FLAGS` that make results on GPUs reproducible to the bit.

    They turn off atomic additions and autotuning, so scatters and the gradients of convolutions
    become slower.  Results on CPUs and TPUs are reproducible without flags.  Call this function
    before the first computation; later it has no effect.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    added = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{flags} {added}".strip()


@functools.cache
def check_flags(flags: str) -> None:
    """Check the value of `XLA_FLAGS` in a second process, because XLA ends a process on errors.

    Raises:
      UserError: If XLA does not accept the flags.
    """
    if not flags:
        return
    code = "from jaxlib import xla_client; xla_client.CompileOptions()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode:
        reason = next((line for line in result.stderr.splitlines() if "XLA_FLAGS" in line), "")
        raise UserError(
            f"environment variable XLA_FLAGS={flags}: "
            f"{reason.rpartition('] ')[2] or 'XLA does not accept it'}; correct the value, or "
            "unset XLA_FLAGS"
        )
