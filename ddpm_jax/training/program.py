"""The compiled training steps of a run, and the batches that they read."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

from jaxtyping import PyTree

from ddpm_jax.data.batches import training_batches
from ddpm_jax.data.types import Batch, Split
from ddpm_jax.parallel.partitioner import Lowered, Partitioner, Program
from ddpm_jax.task import Task
from ddpm_jax.training.settings import Settings
from ddpm_jax.training.step import TrainState, train_step, train_steps


def calls(first: int, config: Settings, cuts: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """Yield (first, last) for each call: the numbers of training steps before and after the call.

    A call is one dispatch of the compiled program and runs at most `steps_per_call` training steps.
    A call ends where metrics are logged, the model is evaluated or a checkpoint is written, and
    after each number of training steps in `cuts`.
    """
    train = config.train
    intervals = (train.log_every, train.eval_every, train.checkpoint_every)
    while first < train.steps:
        ends = [(first // every + 1) * every for every in intervals if every]
        ends += [cut for cut in cuts if cut > first]
        last = min(first + train.steps_per_call, train.steps, *ends)
        yield first, last
        first = last


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A program that runs up to `steps_per_call` training steps, and the data that it reads.

    Attributes:
      task: The task that is trained.
      config: The sections of the config that training reads.
      split: The training examples.
      seed: The seed of all random numbers.
      partitioner: The partitioner, which partitions arrays across the devices.
    """

    task: Task
    config: Settings
    split: Split
    seed: int
    partitioner: Partitioner

    @property
    def stack(self) -> int | None:
        """Number of batches that are stacked along a new first axis; None for one step per call."""
        count = self.config.train.steps_per_call
        return count if count > 1 else None

    def batches(self, plan: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """Yield this process's part of the batches of each call; `plan` is from `calls`."""
        size = self.config.train.batch_size
        mine = self.partitioner.rows(size)
        return training_batches(self.split, self.seed, size, plan, self.stack, mine)

    def place(self, batch: Batch) -> PyTree:
        """Put the batches of a call on the devices, partitioned along the axis of the examples."""
        return self.partitioner.feed(batch, axis=1 if self.stack else 0)

    def lower(self, like: TrainState) -> Lowered:
        """Lower the program for a state with `jax.ShapeDtypeStruct` in place of arrays."""
        step = functools.partial(train_step, self.task, self.config, self.seed)
        batch = self.place(next(self.batches([(0, 1)])))
        if self.stack:
            return self.partitioner.lower(train_steps(step), like, batch, 1)
        return self.partitioner.lower(step, like, batch)

    def run(
        self, program: Program, state: TrainState, batch: PyTree, count: int
    ) -> tuple[TrainState, PyTree]:
        """Run `count` training steps; return the next state and the metrics by name.

        Args:
          program: The compiled result of `lower`.
          state: The state before these training steps, whose memory is reused.
          batch: The result of `place`.
          count: Number of training steps, from 1 to `steps_per_call`.

        Returns:
          The state after the steps, and the metrics: arrays [] if `steps_per_call` is 1, otherwise
          [steps_per_call], of which the first `count` are valid. "finite" has one more axis [B].
        """
        return program(state, batch, count) if self.stack else program(state, batch)
