"""Flags of XLA and of jaxlib, each set for the versions that it was tried with."""

import functools
import importlib.metadata
import os
import subprocess
import sys
from typing import NamedTuple

from ddpm_jax.errors import UserError


class Flag(NamedTuple):
    """A flag of XLA for CPUs, and the versions of jaxlib that it was tried with.

    Attributes:
      name: The flag, without dashes.
      value: Its value.
      versions: Of jaxlib; one that does not know a flag aborts the process.
      lost: What a run lacks without it; "": nothing that a person would notice.
    """

    name: str
    value: str | bool
    versions: tuple[str, ...]
    lost: str = ""

    @property
    def is_known(self) -> bool:
        """Whether the installed jaxlib is one of `versions`."""
        return importlib.metadata.version("jaxlib") in self.versions


# Of the environment.  The first makes a convolution's gradients 2 to 3 times faster; the second
# makes compiling a third faster and the program slower; the third cuts a program for the half of
# the cores that another, compiled beside it, leaves it, and not into 32 parts.
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
# Of the compiler, for a sharded state.  Without them XLA gathers as early as it can, and takes what
# is gathered again for what it has already: a device would hold the whole after all.
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
    """Return flags as options of the compiler; None where jaxlib does not know all of them."""
    return {flag.name: flag.value for flag in flags} if all(f.is_known for f in flags) else None


def lost(*flags: Flag) -> str:
    """Return what a run lacks without the flags that jaxlib is not known for; "": nothing."""
    texts = [flag.lost for flag in flags if flag.lost and not flag.is_known]
    version = importlib.metadata.version("jaxlib")
    return f"jaxlib {version} is not known: {'; '.join(texts)}" if texts else ""


def tune_cpu(debug: bool = False) -> None:
    """Set `FAST_CONVOLUTIONS`, and `FAST_COMPILATION` for runs of a few steps, where known.

    Before the first computation, or it does nothing.
    """
    for flag in (FAST_CONVOLUTIONS, *(FAST_COMPILATION if debug else ())):
        flags = os.environ.get("XLA_FLAGS", "")
        if flag.is_known and f"--{flag.name}" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --{flag.name}={flag.value}".strip()


def tune_gpu() -> None:
    """Give the same bits at each run of a program: no atomic additions, no autotuning.

    It costs speed, of scatters and of convolutions' gradients above all; a CPU and a TPU need
    nothing.  Before the first computation, or it does nothing.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{flags} {wanted}".strip()


@functools.cache
def check_flags(flags: str) -> None:
    """Check the user's `XLA_FLAGS` in another process, which XLA ends where it lacks one of them.

    Raises:
      UserError: XLA lacks one of them.
    """
    if not flags:
        return
    code = "from jaxlib import xla_client; xla_client.CompileOptions()"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if tried.returncode:
        reason = next((line for line in tried.stderr.splitlines() if "XLA_FLAGS" in line), "")
        raise UserError(
            f"XLA_FLAGS={flags}: {reason.rpartition('] ')[2] or 'XLA refuses it'}; correct it, or "
            "unset XLA_FLAGS"
        )
