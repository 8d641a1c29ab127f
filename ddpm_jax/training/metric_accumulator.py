"""Metrics of training steps: checked, averaged and logged after the next call is dispatched."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import PyTree

from ddpm_jax.errors import RunError
from ddpm_jax.parallel import hardware
from ddpm_jax.parallel.partitioner import fetch
from ddpm_jax.progress import Clock
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.run_dir import RunDir
from ddpm_jax.training.settings import Train


class Call(NamedTuple):
    """One dispatched call of the step program.

    Attributes:
      first: Number of steps taken before the call.
      last: Number of steps taken after the call.
      metrics: Metrics of its steps, on the devices.
    """

    first: int
    last: int
    metrics: PyTree


class MetricAccumulator:
    """Sums of the metrics since the last logged line, and the number of skipped steps.

    Args:
      train: The section `train` of the config.
      run: The run directory, to which lines are written.
      clock: The progress display.
      checkpoints: The checkpoints of the run; an error names the newest one.
      order: A function (start, stop) -> indices of the training examples at these positions of the
        sequence of all training examples that the run trains on.
      flops: Floating-point operations of one step on one device.
      host: The result of the method `host` from a checkpoint; empty for a new run.
    """

    def __init__(
        self,
        train: Train,
        run: RunDir,
        clock: Clock,
        checkpoints: Checkpoints,
        order: Callable[[int, int], np.ndarray],
        flops: float,
        host: Mapping[str, object],
    ) -> None:
        self._train, self._run, self._clock = train, run, clock
        self._checkpoints, self._order, self._flops = checkpoints, order, flops
        self._sums = cast(dict[str, float], host.get("window", {}))  # since the last logged line
        self._skipped = cast(int, host.get("skipped", 0))  # consecutive skipped steps
        self._pending: Call | None = None

    def host(self) -> dict[str, object]:
        """Return the state of this object, for the host record of a checkpoint."""
        return {"window": self._sums, "skipped": self._skipped}

    def add(self, call: Call) -> None:
        """Process the metrics of the previous call, and store this call for later."""
        self.flush()
        self._pending = call

    def flush(self) -> None:
        """Fetch the metrics of the stored call; check, sum and log them.

        Raises:
          RunError: If metrics of more consecutive steps than the config allows are not finite.
        """
        if self._pending is None:
            return
        first, last, metrics = self._pending
        self._pending = None
        values = {name: np.asarray(value) for name, value in fetch(metrics).items()}
        if self._train.steps_per_call == 1:
            values = {name: value[None] for name, value in values.items()}
        finite = values.pop("finite")
        for i in range(last - first):
            step_values = {name: float(value[i]) for name, value in values.items()}
            self._add_step(first + i + 1, step_values, finite[i])
        if last % self._train.log_every == 0 or last == self._train.steps:
            self._log(last)
        self._clock.show(last, float(values["loss"][last - first - 1]))

    def _add_step(self, step: int, values: dict[str, float], finite: np.ndarray) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        self._skipped = self._skipped + 1 if bad else 0
        if self._skipped > self._train.max_consecutive_nonfinite_steps:
            name = "loss" if "loss" in bad else bad[0]
            size = self._train.batch_size
            examples = self._order((step - 1) * size, step * size)[~finite]
            newest = self._checkpoints.newest()
            state = "there is no" if newest is None else f"step {newest} has the newest"
            raise RunError(
                f"{_not_finite(name, values[name], step, examples)}; {state} checkpoint; train "
                "again in another --workdir with a smaller --config.optimizer.learning_rate or "
                "with --config.optimizer.grad_clip_norm=1, or continue this run with a larger "
                "--config.train.max_consecutive_nonfinite_steps, such as 10, to skip such steps"
            )
        for name, value in {"skipped": 1.0}.items() if bad else {**values, "count": 1.0}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def _log(self, step: int) -> None:
        count, skipped = self._sums.pop("count", 0), self._sums.pop("skipped", 0)
        means = {f"train/{name}": total / count for name, total in self._sums.items()}
        if self._train.max_consecutive_nonfinite_steps:
            means["train/skipped"] = skipped
        self._sums = {}
        self._run.log(step, means)
        lap = self._clock.lap(step)
        self._run.time(step, **lap, **hardware.memory(), **hardware.utilisation(self._flops, lap))


def _not_finite(name: str, value: float, step: int, examples: np.ndarray) -> str:
    """Return a message that names the step and the indices of the training examples."""
    listed = ", ".join(map(str, examples[:5])) + ", ..." * (len(examples) > 5)
    if len(examples):
        return f"{name} is {value} at step {step}, for training examples {listed}"
    return f"{name} is {value} at step {step}, although the loss of every example is finite"
