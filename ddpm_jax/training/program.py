"""The compiled training steps of a run, and their batches."""

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
    """Yield (first, last), the numbers of steps taken before and after each call of the program.

    A call runs at most `steps_per_call` steps. It ends where metrics are logged, the model is
    evaluated or a checkpoint is written, and at the numbers of steps in `cuts`.
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
    """The training steps of a run as one compiled program, which runs up to `steps_per_call` steps.

    Attributes:
      task: The task that is trained.
      config: The config of the run.
      split: The training examples.
      seed: The seed of the run.
      partitioner: The partitioner of the devices.
    """

    task: Task
    config: Settings
    split: Split
    seed: int
    partitioner: Partitioner

    @property
    def stack(self) -> int | None:
        """Number of batches that a call stacks along a new first axis; None without that axis."""
        count = self.config.train.steps_per_call
        return count if count > 1 else None

    def batches(self, plan: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """Yield the rows of this process of the batches of each call (first, last) in `plan`."""
        size = self.config.train.batch_size
        mine = self.partitioner.rows(size)
        return training_batches(self.split, self.seed, size, plan, self.stack, mine)

    def place(self, batch: Batch) -> PyTree:
        """Put the batches of a call on the devices, partitioned along the examples."""
        return self.partitioner.feed(batch, axis=1 if self.stack else 0)

    def lower(self, like: TrainState) -> Lowered:
        """Lower the program for a state with the shapes and shardings of `abstract_state`."""
        step = functools.partial(train_step, self.task, self.config, self.seed)
        batch = self.place(next(self.batches([(0, 1)])))
        if self.stack:
            return self.partitioner.lower(train_steps(step), like, batch, 1)
        return self.partitioner.lower(step, like, batch)

    def run(
        self, program: Program, state: TrainState, batch: PyTree, count: int
    ) -> tuple[TrainState, PyTree]:
        """Run `count` steps; return the next state and the metrics.

        Args:
          program: The compiled result of `lower`.
          state: The state before the first step.
          batch: The result of `place`.
          count: Number of steps, at most `steps_per_call`.
        """
        return program(state, batch, count) if self.stack else program(state, batch)
