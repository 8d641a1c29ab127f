"""Check, average and log the metrics of training steps.

The metrics of a call are fetched from the devices after the next call has been dispatched.
"""

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
    """One dispatched call of the compiled training steps.

    Attributes:
      first: Number of training steps taken before the call.
      last: Number of training steps taken when the call has ended.
      metrics: Arrays on the devices with the metrics of the training steps, by name.
    """

    first: int
    last: int
    metrics: PyTree


class MetricAccumulator:
    """Sums of the metrics since the last logged line, and the number of skipped training steps.

    Args:
      train: The section `train` of the config.
      run: The run directory, to which the means of the metrics are written.
      clock: The progress display.
      checkpoints: The checkpoints of the run. An error message states the newest checkpoint.
      order: A function (start, stop) -> indices of the training examples start ... stop - 1 in
        the order in which the run reads them.
      flops: Floating-point operations of one training step on one device; 0 if unknown.
      host: The result of the method `host` as read from a checkpoint; empty for a new run.
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
        """Return the sums and the number of skipped steps as JSON values, for a checkpoint."""
        return {"window": self._sums, "skipped": self._skipped}

    def add(self, call: Call) -> None:
        """Process the metrics of the previous call, and store `call` for the next `flush`."""
        self.flush()
        self._pending = call

    def flush(self) -> None:
        """Fetch the metrics of the stored call from the devices; check, sum and log the metrics.

        Raises:
          RunError: If a metric is not finite, in more consecutive training steps than the field
            `max_consecutive_nonfinite_steps` allows.
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
            state = "the run has no" if newest is None else f"step {newest} has the newest"
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
    """Return an error message that lists up to five examples whose loss is not finite."""
    listed = ", ".join(map(str, examples[:5])) + ", ..." * (len(examples) > 5)
    if len(examples):
        return f"{name} is {value} at step {step}, for training examples {listed}"
    return f"{name} is {value} at step {step}, although the loss of every example is finite"
