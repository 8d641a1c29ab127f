"""Log lines and a progress bar with the loss, the steps per second and the remaining time."""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator

from ddpm_jax.parallel.processes import is_main
from ddpm_jax.system import terminal

SECONDS_BETWEEN_LINES = 10.0  # if stderr is not a terminal


def log(line: str) -> None:
    """Print a line to stderr, only in process 0. If writing fails, the error is ignored."""
    if is_main():
        terminal.print_error(line)


log_once = functools.cache(log)  # does not print a line that it has already printed


def print_result(text: str) -> None:
    """Print a result to stdout, only in process 0."""
    if is_main():
        terminal.show(text)


class Clock:
    """A progress bar, and a clock of the time for steps, evaluations and checkpoints.

    Args:
      step: Number of the step at the start, 0 for a new run.
      total: Number of the step at the end.
      show: Whether to show a progress bar, or log lines if stderr is not a terminal.
      unit: Word for a step in the progress bar and in log lines, such as "step" or "image".
    """

    def __init__(self, step: int, total: int, show: bool = True, unit: str = "step") -> None:
        self._unit = unit
        self._first, self._total = step, total
        self._lap_step, self._lap_start = step, time.perf_counter()
        self._start: float | None = None  # time after the first step, which includes compilation
        self._paused: dict[str, float] = {}
        self._waited = 0.0
        self._last_line = time.perf_counter()
        self._bar = None
        self._shown = show
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step, unit=unit, dynamic_ncols=True)

    def show(self, step: int, loss: float | None = None) -> None:
        """Show in the bar or a log line that `step` is complete, with `loss` if it is not None."""
        if self._bar is not None:
            if loss is not None:
                self._bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.perf_counter()
        line = f"{self._unit} {step}/{self._total}"
        if loss is not None:
            line += f"  loss {loss:.4g}"
        if self._start is None:
            self._start, self._first, self._excluded = now, step, sum(self._paused.values())
            self._print(f"{line}  (compiled)")
        elif now - self._last_line > SECONDS_BETWEEN_LINES or step == self._total:
            busy = now - self._start - (sum(self._paused.values()) - self._excluded)
            rate = (step - self._first) / max(busy, 1e-9)
            remaining = (self._total - step) / max(rate, 1e-9)
            self._print(f"{line}  {rate:.1f} {self._unit}s/s  {_minutes(remaining)} left")
            self._last_line = now

    def _print(self, line: str) -> None:
        if self._shown:
            log(line)

    def lap(self, step: int) -> dict[str, float]:
        """Return the timing since the last call of `lap`, or since the start.

        Returns:
          "seconds" (without pauses), "steps_per_second", "data_seconds" (in `waiting`), and
          "ACTIVITY_seconds" for each activity of `pause`.
        """
        now = time.perf_counter()
        paused, self._paused = self._paused, {}
        if self._start is not None:
            self._excluded -= sum(paused.values())
        seconds = now - self._lap_start - sum(paused.values())
        rate = (step - self._lap_step) / max(seconds, 1e-9)
        self._lap_step, self._lap_start = step, now
        pauses = {f"{activity}_seconds": spent for activity, spent in paused.items()}
        waited, self._waited = self._waited, 0.0
        timing = {"seconds": seconds, "steps_per_second": rate, "data_seconds": waited}
        return {**timing, **pauses}

    @contextlib.contextmanager
    def pause(self, activity: str) -> Iterator[None]:
        """Return a context manager that counts its duration as `activity`, not as training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._paused[activity] = self._paused.get(activity, 0.0) + spent

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Return a context manager that counts its duration as training that waits for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def close(self) -> None:
        """Close the progress bar, which remains visible on the terminal."""
        if self._bar is not None:
            self._bar.close()


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
