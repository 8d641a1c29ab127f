"""What a person sees of a run while it goes on: loss, steps/s, time left."""

import contextlib
import functools
import sys
import time
from collections.abc import Iterator

from ddpm_jax.parallel.processes import is_main
from ddpm_jax.system import terminal

SECONDS_BETWEEN_LINES = 10.0  # where stderr is not a terminal


def log(line: str) -> None:
    """Print a line to stderr, from the first process alone; a full disk behind it ends nothing."""
    if is_main():
        terminal.print_error(line)


log_once = functools.cache(log)  # for what may come up several times in one process


def print_result(text: str) -> None:
    """Print a result to stdout, from the first process alone."""
    if is_main():
        terminal.show(text)


class Clock:
    """The progress bar, and the seconds that went into steps, evaluations and checkpoints.

    Args:
      step, total: where it starts and ends.
      show: to a person.
      unit: what is counted.
    """

    def __init__(self, step: int, total: int, show: bool = True, unit: str = "step") -> None:
        self._unit = unit
        self._first, self._total = step, total
        self._lap_step, self._lap_start = step, time.perf_counter()
        self._start: float | None = None  # of the steps after the first call, which compiles
        self._paused: dict[str, float] = {}
        self._waited = 0.0
        self._last_line = time.perf_counter()
        self._bar = None
        self._shown = show
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step, unit=unit, dynamic_ncols=True)

    def show(self, step: int, loss: float | None = None) -> None:
        """Report that `step` is done."""
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
            left = (self._total - step) / max(rate, 1e-9)
            self._print(f"{line}  {rate:.1f} {self._unit}s/s  {_minutes(left)} left")
            self._last_line = now

    def _print(self, line: str) -> None:
        if self._shown:
            log(line)

    def lap(self, step: int) -> dict[str, float]:
        """Return the seconds since the last lap, by what they went into, and the steps/s."""
        now = time.perf_counter()
        paused, self._paused = self._paused, {}
        if self._start is not None:
            self._excluded -= sum(paused.values())
        seconds = now - self._lap_start - sum(paused.values())
        rate = (step - self._lap_step) / max(seconds, 1e-9)
        self._lap_step, self._lap_start = step, now
        pauses = {f"{what}_seconds": spent for what, spent in paused.items()}
        waited, self._waited = self._waited, 0.0
        timing = {"seconds": seconds, "steps_per_second": rate, "data_seconds": waited}
        return {**timing, **pauses}

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Count the seconds in here as `what`, not as training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._paused[what] = self._paused.get(what, 0.0) + spent

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the seconds in here as training that waits for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    def close(self) -> None:
        """Leave the bar where it is."""
        if self._bar is not None:
            self._bar.close()


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
