"""Functions that start and end the processes of a training on several hosts."""

import atexit
import contextlib
import re
import socket
import subprocess
import sys
import threading
import time

import jax

from ddpm_jax.errors import UserError
from ddpm_jax.parallel.processes import coordination_client, is_main
from ddpm_jax.system import interrupts

RESOLVE_SECONDS = 10.0  # time limit for resolving the name of the coordinator's host
HOST = re.compile(r"[^\s:/\[\]]+|\[[0-9A-Fa-f:.]+(?:%[^\s\]]+)?\]")  # a name, or [an IPv6 address]
LEAVE_SECONDS = 5.0  # time limit for processes that fail and wait for each other
SILENT_SECONDS = 10.0  # after this time, "waiting for the coordinator" is printed
HEARTBEAT = 30  # jax aborts if a process sends no heartbeat for this many seconds


def check_cluster(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Check the values of --coordinator, --num_processes and --process_id.

    The value of a flag that was not given is None.

    Raises:
      UserError: If the coordinator's address is not HOST:PORT, or the index of the process is not
        less than the number of processes.
    """
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        matches = HOST.fullmatch(host) and re.fullmatch("[0-9]{1,5}", port)
        if not matches or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator={coordinator}: must be HOST:PORT, with a port from 1 to 65535 and "
                "an IPv6 address in brackets"
            )
    if process is not None and processes is not None and process >= processes:
        raise UserError(
            f"--process_id={process}: must be less than --num_processes={processes}; "
            "processes are numbered from 0"
        )


def check_host(coordinator: str) -> None:
    """Check that the host name of the address HOST:PORT has an IP address.

    Raises:
      UserError: If no IP address is found within `RESOLVE_SECONDS`.
    """
    host, resolved = coordinator.rpartition(":")[0].strip("[]"), threading.Event()

    def look_up() -> None:
        while not cancelled.is_set():
            with contextlib.suppress(OSError, UnicodeError):
                socket.getaddrinfo(host, None)
                resolved.set()
                return
            cancelled.wait(1.0)

    cancelled = threading.Event()
    threading.Thread(target=look_up, daemon=True).start()
    success = resolved.wait(RESOLVE_SECONDS)
    cancelled.set()
    if not success:
        raise UserError(
            f"--coordinator={coordinator}: no host of the name {host} was found within "
            f"{RESOLVE_SECONDS:g} s; give HOST:PORT of the host of process 0"
        )


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connect this process to the other processes (`jax.distributed.initialize`).

    jax reads arguments that are None from the cluster manager (TPU, SLURM, Kubernetes).

    Args:
      coordinator: Address HOST:PORT at which process 0 runs jax's coordination service.
      processes: Number of processes.
      process: Index of this process, starting at 0.

    Raises:
      UserError: If an argument is None and there is no cluster manager, or if no connection to
        the coordinator is possible.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator is not None:
        check_host(coordinator)
    waiting = threading.Timer(
        SILENT_SECONDS,
        lambda: print(f"waiting for the coordinator at {coordinator}", file=sys.stderr),
    )
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT
        )
        _start_exit_watchdog()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed: {str(error).splitlines()[0]}; without a cluster manager, give "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from None
    finally:
        waiting.cancel()


# jax aborts a process if another process ends unexpectedly; no Python code can run after this.
EXIT_WATCHDOG = """
import sys
if not sys.stdin.read():
    print("stopped: this process ended before training was complete, because this or another "
          "process was killed; start all processes again to resume from the newest checkpoint",
          file=sys.stderr)
"""

_watchdogs: list[subprocess.Popen[bytes]] = []


def _start_exit_watchdog() -> None:
    """Start a second process, which prints a message if this process ends without `leave()`."""
    _watchdogs.append(
        subprocess.Popen(
            [sys.executable, "-c", EXIT_WATCHDOG], stdin=subprocess.PIPE, start_new_session=True
        )
    )
    atexit.register(leave)
    interrupts.before_end.append(leave)


def leave() -> None:
    """Stop the exit watchdog without a message; call this before this process ends normally."""
    while _watchdogs:
        _watchdogs.pop().communicate(b"farewell")


def meet_before_leaving() -> None:
    """Wait at most `LEAVE_SECONDS` until all processes have called this function after an error.

    jax aborts the other processes when process 0, the coordinator, ends.  So processes that fail
    together wait for each other, and process 0 ends last.
    """
    client = coordination_client()
    if client is None:
        return
    try:
        client.wait_at_barrier("ddpm_jax/leaving", round(1000 * LEAVE_SECONDS))
    except jax.errors.JaxRuntimeError:  # not all processes have failed, or one was killed
        return
    if is_main():
        time.sleep(1.0)
