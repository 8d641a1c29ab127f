"""Training: the state, the step and the one loop for every task.

The loop's order is fixed, so that a run cut off at any moment and started again ends as
if it had never been:

    evaluate, if due -> checkpoint, if due -> next call of some steps -> log the metrics of
    the call before it

A step is logged once the next call is on its way, so the device never waits for the host; before an
evaluation or a checkpoint everything is logged first.
"""

import contextlib
import functools
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, cast

import jax
import numpy as np

from ddpm_jax.data.batches import batch_of, epoch_order
from ddpm_jax.data.prefetch import prefetch
from ddpm_jax.data.types import Data
from ddpm_jax.parallel import processes
from ddpm_jax.parallel.partitioner import Partitioner, Program
from ddpm_jax.progress import Clock, log, log_once
from ddpm_jax.task import Evaluation, Resources, Task, Variables
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.evaluation import EvaluationContext, evaluate
from ddpm_jax.training.ledger import Call, Ledger
from ddpm_jax.training.preemption import Preemption
from ddpm_jax.training.program import StepProgram, calls
from ddpm_jax.training.run_dir import RunDir
from ddpm_jax.training.settings import Settings
from ddpm_jax.training.step import TrainState, averaged, initializer


class Watch(NamedTuple):
    """What is watched of a run: a profiler's trace of a few steps; Weights & Biases."""

    profile: bool = False
    wandb: bool = False


UNWATCHED = Watch()


class Fit(NamedTuple):
    """How `fit` ended: the state, its step, and the final evaluation, unless it was stopped."""

    state: TrainState
    step: int
    final: Evaluation | None


def fit(
    task: Task,
    config: Settings,
    data: Data,
    run: RunDir,
    checkpoints: Checkpoints,
    seed: int,
    partitioner: Partitioner,
    watch: Watch = UNWATCHED,
    resources: Resources = Resources(),
) -> Fit:
    """Train to the last step, from the newest checkpoint where there is one, and evaluate.

    Args:
      task: what is trained.
      config: of the run.
      data: the run's data set.
      run: the run's directory.
      checkpoints: of the run.
      seed: of the run.
      partitioner: the devices.
      watch: what is watched of the run.
      resources: what the task needs of other runs.

    Raises:
      RunError: a loss is not finite; the last checkpoint is older and good.
    """
    total = config.train.steps
    with Preemption(partitioner) as preemption, contextlib.ExitStack() as stack:
        steps = StepProgram(task, config, data.train, seed, partitioner)
        start = _restore_or_initialise(steps, checkpoints, resources)  # and compile
        state = start.state
        processes.from_main(lambda: run.begin(start.step, start.step == total, watch.wandb))
        profiler = _Profiler(run.path / "profile", start.step, watch.profile)
        plan = functools.partial(calls, start.step, config, profiler.cuts)
        batches = prefetch(steps.batches(plan()), steps.place)  # made ahead of the calls
        stack.enter_context(contextlib.closing(batches))
        clock = Clock(start.step, total, show=processes.is_main())
        stack.enter_context(contextlib.closing(clock))
        order = epoch_order(seed, len(data.train.images))
        ledger = Ledger(config.train, run, clock, checkpoints, order, start.flops, start.host)
        if config.train.eval_every and data.validation is None:
            log("no validation split: nothing is evaluated before the end")
        side = _Side(steps, data, run, checkpoints, preemption, clock, ledger, resources)
        for first, last in itertools.chain(plan(), [(total, total)]):
            evaluated = side.evaluate(first, state) if side.evaluation_due(first) else None
            if evaluated or side.checkpoint_due(first):
                side.checkpoint(first, state, evaluated)
            if first == total or preemption.requested():
                break
            profiler.reach(first, ledger)
            with clock.waiting():
                batch = next(batches)
            preemption.announce()
            assert start.program is not None
            state, metrics = steps.run(start.program, state, batch, last - first)
            ledger.add(Call(first, last, metrics))
        profiler.finish(first)
        final = side.evaluate_finally(state) if first == total else None
        return Fit(state, first, final)


class _Start(NamedTuple):
    """Where a training starts.

    Attributes:
      step: Steps taken.
      state: The newest checkpoint's, or a new one.
      host: The host's record in the checkpoint; empty: a new run.
      program: The compiled steps; None: there are no more.
      flops: Operations of one step on one device; 0: unknown.
    """

    step: int
    state: TrainState
    host: dict[str, object]
    program: Program | None
    flops: float


def _restore_or_initialise(
    steps: StepProgram, checkpoints: Checkpoints, resources: Resources
) -> _Start:
    """Restore the newest checkpoint, or make a new state, while the program is compiled."""
    partitioner, total = steps.partitioner, steps.config.train.steps
    if partitioner.warning():
        log_once(partitioner.warning())
    size = min(steps.task.init_examples, len(steps.split.images))
    examples = batch_of(steps.split, np.arange(size), np.arange(size))
    init = jax.jit(initializer(steps.task, steps.config, steps.seed))  # so traced once, here
    shapes = jax.eval_shape(init, examples)
    like = partitioner.like(shapes)
    with ThreadPoolExecutor(1) as background:
        lowered = None if checkpoints.newest() == total else steps.lower(like)
        compiled = background.submit(lowered.compile) if lowered else None
        step, state, host = checkpoints.restore_newest(like)
        if state is None:
            state = jax.jit(init, out_shardings=partitioner.shardings(shapes))(examples)
            extra = steps.task.load_extra(state.extra, resources.parts)
            state = state._replace(extra=partitioner.place(extra))
        else:
            log(f"resuming at step {step}")
    if step < total and lowered is None:  # the newest checkpoint is damaged
        lowered = steps.lower(like)
    program = compiled.result() if compiled else lowered and lowered()
    return _Start(step, cast(TrainState, state), host, program, lowered.flops if lowered else 0.0)


class _Side(NamedTuple):
    """What a loop does between the calls of its program: evaluate, and write checkpoints."""

    steps: StepProgram
    data: Data
    run: RunDir
    checkpoints: Checkpoints
    preemption: Preemption
    clock: Clock
    ledger: Ledger
    resources: Resources

    def ends(self, step: int) -> bool:
        """Return whether no step follows, for now."""
        return step == self.steps.config.train.steps or self.preemption.requested()

    def evaluation_due(self, step: int) -> bool:
        """Return whether the validation split is evaluated before the next call."""
        every = self.steps.config.train.eval_every if self.data.validation is not None else 0
        return _due(step, every) and not self.ends(step)

    def evaluate(self, step: int, state: TrainState) -> Mapping[str, float] | None:
        """Evaluate the validation split; None if it was done before, or is interrupted."""
        self.ledger.settle()
        if processes.from_main(functools.partial(self.run.evaluated, step)):
            return None
        with self.preemption.interrupting(), self.clock.pause("evaluation"):
            return self._evaluated(step, state, full=False).metrics
        return None

    def evaluate_finally(self, state: TrainState) -> Evaluation | None:
        """Evaluate the test split; None if the training is asked to stop."""
        if self.preemption.requested():
            return None
        log("evaluating")
        with self.preemption.interrupting():
            return self._evaluated(self.steps.config.train.steps, state, full=True)
        return None

    def _evaluated(self, step: int, state: TrainState, full: bool) -> Evaluation:
        """Evaluate the chosen average of the parameters; write its metrics and images."""
        steps = self.steps
        context = EvaluationContext(
            steps.task,
            Variables(averaged(state, steps.config), state.extra),
            self.data,
            split="test" if full else "validation",
            seed=steps.seed,
            full=full,
            partitioner=steps.partitioner,
            resources=self.resources,
            check_preemption=self.preemption.check,
        )
        evaluation = evaluate(context)
        for name, image in evaluation.images.items():
            self.run.write_image(name, image, step, last=full)
        self.run.log(step, evaluation.metrics)
        return evaluation

    def checkpoint_due(self, step: int) -> bool:
        """Return whether a checkpoint is written before the next call."""
        return _due(step, self.steps.config.train.checkpoint_every) or self.ends(step)

    def checkpoint(self, step: int, state: TrainState, metrics: Mapping[str, float] | None) -> None:
        """Write a checkpoint, unless there is one of this step."""
        self.ledger.settle()
        if processes.from_main(functools.partial(self._may_save, step)):
            with self.clock.pause("checkpoint"):
                self.checkpoints.save(step, state, self.ledger.host(), metrics)

    def _may_save(self, step: int) -> bool:
        """Return whether a checkpoint is wanted, and all lines of the log before it are on disk."""
        if step == 0 or self.checkpoints.newest() == step:
            return False
        if self.run.flush():
            return True
        log(f"no checkpoint of step {step}: the figures before it could not be written")
        return False


class _Profiler:
    """A trace of steps 10 to 15 after the first.

    Args:
      folder: where the trace is written.
      first: the step that the run starts at.
      wanted: whether there is to be one.
    """

    def __init__(self, folder: pathlib.Path, first: int, wanted: bool) -> None:
        self._folder, self._tracing = folder, False
        self.cuts: Sequence[int] = (first + 10, first + 15) if wanted else ()

    def reach(self, step: int, ledger: Ledger) -> None:
        """Start or stop the trace, if it is time to; all steps before are settled then."""
        if step in self.cuts:
            ledger.settle()
            if step == self.cuts[0]:
                self._tracing = True
                jax.profiler.start_trace(str(self._folder))
            else:
                self._stop()

    def finish(self, step: int) -> None:
        """Stop the trace where the steps end."""
        if self._tracing:
            self._stop()
        elif self.cuts and step <= self.cuts[0]:
            log("nothing profiled: a trace is of steps 10 to 15 after the first")

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        log(f"profiled: tensorboard --logdir={self._folder}, or ui.perfetto.dev")


def _due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0
