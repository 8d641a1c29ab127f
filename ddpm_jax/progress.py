"""Log lines and the progress bar of a run: loss, steps per second, remaining time."""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator

from ddpm_jax.parallel.processes import is_main
from ddpm_jax.system import terminal

SECONDS_BETWEEN_LINES = 10.0  # if stderr is not a terminal


def log(line: str) -> None:
    """Print a line to stderr, only in the first process; errors of writing are ignored."""
    if is_main():
        terminal.print_error(line)


log_once = functools.cache(log)  # prints each line once per process


def print_result(text: str) -> None:
    """Print a result to stdout, only in the first process."""
    if is_main():
        terminal.show(text)


class Clock:
    """The progress bar, and the seconds spent on steps, evaluations and checkpoints.

    Args:
      step: Step at which the run starts.
      total: Step at which the run ends.
      show: Show a progress bar, or log lines if stderr is not a terminal.
      unit: Noun for a step in the bar and the lines.
    """

    def __init__(self, step: int, total: int, show: bool = True, unit: str = "step") -> None:
        self._unit = unit
        self._first, self._total = step, total
        self._lap_step, self._lap_start = step, time.perf_counter()
        self._start: float | None = None  # of timing, after the first call, which compiles
        self._paused: dict[str, float] = {}
        self._waited = 0.0
        self._last_line = time.perf_counter()
        self._bar = None
        self._shown = show
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step, unit=unit, dynamic_ncols=True)

    def show(self, step: int, loss: float | None = None) -> None:
        """Show that `step` is complete, with its loss if given."""
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
        """Return the seconds since the last lap, by activity, and the steps per second."""
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
        """Count the time in this context as `activity`, not as training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._paused[activity] = self._paused.get(activity, 0.0) + spent

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this context as training that waits for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def close(self) -> None:
        """Close the progress bar, which stays on the terminal."""
        if self._bar is not None:
            self._bar.close()


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
