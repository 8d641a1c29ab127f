"""Start and end the processes of a run on several hosts."""

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

RESOLVE_SECONDS = 10.0  # in which the name of the coordinator's host must be known

HOST = re.compile(r"[^\s:/\[\]]+|\[[0-9A-Fa-f:.]+(?:%[^\s\]]+)?\]")  # a name, or [an IPv6 address]
LEAVE_SECONDS = 5.0

SILENT_SECONDS = 10.0  # of waiting for the coordinator, after which that is logged

HEARTBEAT = 30  # seconds after which a silent process is taken for dead

# Processes.


def check_cluster(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Check what the command line says of the processes, before anything starts.

    Raises:
      UserError: the coordinator's address is not HOST:PORT, or there is no such process.
    """
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        known = HOST.fullmatch(host) and re.fullmatch("[0-9]{1,5}", port)
        if not known or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator={coordinator}: must be HOST:PORT, with a port from 1 to 65535 and "
                "an IPv6 address in brackets"
            )
    if process is not None and processes is not None and process >= processes:
        raise UserError(
            f"--process_id={process}: must be less than --num_processes={processes}; the first "
            "process is 0"
        )


def check_host(coordinator: str) -> None:
    """Check that the name of the coordinator's host is known, within `RESOLVE_SECONDS`.

    Raises:
      UserError: it is not.
    """
    host, answers = coordinator.rpartition(":")[0].strip("[]"), threading.Event()

    def look_up() -> None:
        while not gone.is_set():
            with contextlib.suppress(OSError, UnicodeError):
                socket.getaddrinfo(host, None)
                answers.set()
                return
            gone.wait(1.0)

    gone = threading.Event()
    threading.Thread(target=look_up, daemon=True).start()
    known = answers.wait(RESOLVE_SECONDS)
    gone.set()
    if not known:
        raise UserError(
            f"--coordinator={coordinator}: no host of the name {host} was found within "
            f"{RESOLVE_SECONDS:g} s; give the address of process 0"
        )


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes; what is None is asked of the cluster (TPU, SLURM, Kubernetes).

    Raises:
      UserError: there is no cluster to ask, or no coordinator answers.
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
            f"--distributed: {str(error).splitlines()[0]}; outside of a cluster give "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from None
    finally:
        waiting.cancel()


# jax aborts a process when another one is gone, which no Python code of its own survives.
EXIT_WATCHDOG = """
import sys
if not sys.stdin.read():
    print("stopped: this process ended before its run did: it was killed, or another process of "
          "the run is gone; start all of them again, and the run goes on from its newest "
          "checkpoint", file=sys.stderr)
"""

_watchdogs: list[subprocess.Popen[bytes]] = []


def _start_exit_watchdog() -> None:
    """Start a small process that reports this one's end, unless `leave` was called before it."""
    _watchdogs.append(
        subprocess.Popen(
            [sys.executable, "-c", EXIT_WATCHDOG], stdin=subprocess.PIPE, start_new_session=True
        )
    )
    atexit.register(leave)
    interrupts.before_end.append(leave)


def leave() -> None:
    """End the exit watchdog, as this process ends by itself."""
    while _watchdogs:
        _watchdogs.pop().communicate(b"farewell")


def meet_before_leaving() -> None:
    """Let all processes of a run that failed end by themselves.

    jax aborts a process whose coordinator, the first process, is gone: so those that fail together
    wait for each other, for `LEAVE_SECONDS` at most, and the first one ends last.
    """
    client = coordination_client()
    if client is None:
        return
    try:
        client.wait_at_barrier("ddpm_jax/leaving", round(1000 * LEAVE_SECONDS))
    except jax.errors.JaxRuntimeError:  # the others go on, or are gone
        return
    if is_main():
        time.sleep(1.0)
