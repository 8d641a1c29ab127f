"""Flags of XLA; each is set only for the versions of jaxlib that it was tested with."""

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
      versions: Versions of jaxlib that it was tested with; others may abort the process.
      effect: Effect on a run without the flag; "": no effect that a user would notice.
    """

    name: str
    value: str | bool
    versions: tuple[str, ...]
    effect: str = ""

    @property
    def is_supported(self) -> bool:
        """True if the installed jaxlib is one of `versions`."""
        return importlib.metadata.version("jaxlib") in self.versions


# Flags of the environment.  FAST_CONVOLUTIONS makes the gradients of convolutions 2 to 3 times
# faster.  The first of FAST_COMPILATION makes compilation 1/3 faster and programs slower; the
# second splits compilation into parts for half of the cores, because often two programs compile at
# the same time, instead of into 32 parts.
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
# Flags of the compiler, for a partitioned state.  Without them XLA gathers parameters as early as
# possible, and merges the gathers of the forward and the backward pass, so that a device holds all
# parameters at once.
LATE_GATHERS = (
    Flag(
        "xla_cpu_scheduler_type",
        "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
        ("0.10.2",),
        "fsdp on CPUs may hold all parameters at once",
    ),
    Flag("xla_disable_hlo_passes", "cse_barrier_expander", ("0.10.2",)),
)


def compiler_options(flags: tuple[Flag, ...]) -> dict[str, str | bool] | None:
    """Return flags as options of the compiler; None if this jaxlib does not support all of them."""
    supported = all(flag.is_supported for flag in flags)
    return {flag.name: flag.value for flag in flags} if supported else None


def missing_flags_warning(*flags: Flag) -> str:
    """Return a warning of the effects of flags that this jaxlib does not support; "": no effect."""
    effects = [flag.effect for flag in flags if flag.effect and not flag.is_supported]
    version = importlib.metadata.version("jaxlib")
    text = f"ddpm_jax was not tested with jaxlib {version}: {'; '.join(effects)}"
    return text if effects else ""


def tune_cpu(debug: bool = False) -> None:
    """Set the supported ones of `FAST_CONVOLUTIONS` and, for debug runs, of `FAST_COMPILATION`.

    It has an effect only before the first computation.
    """
    for flag in (FAST_CONVOLUTIONS, *(FAST_COMPILATION if debug else ())):
        flags = os.environ.get("XLA_FLAGS", "")
        if flag.is_supported and f"--{flag.name}" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --{flag.name}={flag.value}".strip()


def tune_gpu() -> None:
    """Make programs on GPUs reproducible to the bit, without atomic additions and autotuning.

    Scatters and the gradients of convolutions become slower.  Programs on CPUs and TPUs are
    reproducible by default.  It has an effect only before the first computation.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    added = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{flags} {added}".strip()


@functools.cache
def check_flags(flags: str) -> None:
    """Check the value of `XLA_FLAGS` in another process, because XLA ends a process on errors.

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
            f"XLA_FLAGS={flags}: {reason.rpartition('] ')[2] or 'XLA does not accept it'}; correct "
            "it, or unset XLA_FLAGS"
        )
