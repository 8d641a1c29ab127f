"""Flags of XLA and of jaxlib, each set for the versions that it was tried with."""

import functools
import importlib.metadata
import os
import subprocess
import sys

import jax

from ddpm_jax.errors import UserError, one_line
from ddpm_jax.system.environment import check_device

# A flag that jaxlib does not know aborts the process, so each is set for the versions it was
# tried with alone.  The first makes a convolution's gradients 2 to 3 times faster on a CPU; the
# second makes compiling a third faster and the program slower; the third cuts a program for the
# half of the cores that another, compiled beside it, leaves it, and not into 32 parts.
CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"

EMITTERS_FLAG = "--xla_cpu_use_fusion_emitters=false"

SPLIT_FLAG = f"--xla_cpu_parallel_codegen_split_count={max(1, (os.cpu_count() or 1) // 2)}"

VERSIONS = {
    CPU_FLAG: ("0.10.2", "0.12.0.1"),
    EMITTERS_FLAG: ("0.10.2",),
    SPLIT_FLAG: ("0.10.2", "0.12.0.1"),
}


def tune_cpu(debug: bool = False) -> None:
    """Set `CPU_FLAG`, and the others for runs of a few steps, where jaxlib knows them.

    Before the first computation, or it does nothing.
    """
    version = importlib.metadata.version("jaxlib")
    for flag in VERSIONS if debug else (CPU_FLAG,):
        flags = os.environ.get("XLA_FLAGS", "")
        if version in VERSIONS[flag] and flag.partition("=")[0] not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def tune_gpu() -> None:
    """The same program gives the same bits at each run: no atomic additions, no autotuning.

    It costs speed, of scatters and of convolutions' gradients above all; a CPU and a TPU need
    nothing.  Before the first computation, or it does nothing.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{flags} {wanted}".strip()


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
