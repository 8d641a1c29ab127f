"""The training loop, which is the same for every task.

The order of events is fixed, so that a run that is interrupted at any moment and then resumed has
the same result, bit for bit, as a run without interruption:

    evaluate, if due -> write a checkpoint, if due -> dispatch the next call -> log the metrics
    of the previous call

A call is one dispatch of the compiled training steps (`StepProgram`), of which a call runs up to
`steps_per_call`. The metrics of a call are fetched after the next call has been dispatched, so that
the devices do not wait for the host. Before an evaluation or a checkpoint all metrics are logged.
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
from ddpm_jax.training.metric_accumulator import Call, MetricAccumulator
from ddpm_jax.training.preemption import Preemption
from ddpm_jax.training.program import StepProgram, calls
from ddpm_jax.training.run_dir import RunDir
from ddpm_jax.training.settings import Settings
from ddpm_jax.training.step import TrainState, evaluated_params, initializer


class Monitoring(NamedTuple):
    """Options to write a profiler trace of five training steps and to use Weights & Biases."""

    profile: bool = False
    wandb: bool = False


NO_MONITORING = Monitoring()


class Fit(NamedTuple):
    """The result of `fit`.

    Attributes:
      state: The training state after the last step.
      step: Number of training steps taken.
      final: The evaluation on the test split; None if the training was stopped before the end.
    """

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
    monitoring: Monitoring = NO_MONITORING,
    resources: Resources = Resources(),
) -> Fit:
    """Train a task to the last training step and evaluate it on the test split.

    If the run has checkpoints, training continues from the newest one.

    Args:
      task: The task that is trained.
      config: The sections of the config that training reads.
      data: The training, validation and test splits.
      run: The run directory, to which metrics and images are written.
      checkpoints: The checkpoints of the run.
      seed: The seed of all random numbers.
      partitioner: The partitioner, which partitions arrays across the devices.
      monitoring: Options of monitoring.
      resources: Functions that load networks of other runs, such as the guidance model.

    Raises:
      RunError: If a loss or another metric is not finite. Checkpoints of earlier steps remain.
    """
    total = config.train.steps
    with Preemption(partitioner) as preemption, contextlib.ExitStack() as stack:
        steps = StepProgram(task, config, data.train, seed, partitioner)
        start = _restore_or_initialise(steps, checkpoints, resources)
        state = start.state
        processes.from_main(lambda: run.begin(start.step, start.step == total, monitoring.wandb))
        profiler = _Profiler(run.path / "profile", start.step, monitoring.profile)
        plan = functools.partial(calls, start.step, config, profiler.cuts)
        batches = prefetch(steps.batches(plan()), steps.place)
        stack.enter_context(contextlib.closing(batches))
        clock = Clock(start.step, total, show=processes.is_main())
        stack.enter_context(contextlib.closing(clock))
        order = epoch_order(seed, len(data.train.images))
        accumulator = MetricAccumulator(
            config.train, run, clock, checkpoints, order, start.flops, start.host
        )
        if config.train.eval_every and data.validation is None:
            log(
                f"--config.train.eval_every={config.train.eval_every} has no effect, because the "
                "data set has no validation split; the test split is evaluated after the last step"
            )
        hooks = _Hooks(steps, data, run, checkpoints, preemption, clock, accumulator, resources)
        for first, last in itertools.chain(plan(), [(total, total)]):
            metrics = hooks.evaluate(first, state) if hooks.evaluation_due(first) else None
            if metrics or hooks.checkpoint_due(first):
                hooks.checkpoint(first, state, metrics)
            if first == total or preemption.requested():
                break
            profiler.reach(first, accumulator)
            with clock.waiting():
                batch = next(batches)
            preemption.announce()
            assert start.program is not None
            state, step_metrics = steps.run(start.program, state, batch, last - first)
            accumulator.add(Call(first, last, step_metrics))
        profiler.finish(first)
        final = hooks.evaluate_finally(state) if first == total else None
        return Fit(state, first, final)


class _Start(NamedTuple):
    """The state and the compiled program with which a training starts.

    Attributes:
      step: Number of training steps taken before the start; 0 for a new run.
      state: The state of the newest checkpoint, or a new state.
      host: The part of the checkpoint that is stored as JSON; empty for a new run.
      program: The compiled training steps; None if all training steps have been taken.
      flops: Floating-point operations of one training step on one device; 0 if unknown.
    """

    step: int
    state: TrainState
    host: dict[str, object]
    program: Program | None
    flops: float


def _restore_or_initialise(
    steps: StepProgram, checkpoints: Checkpoints, resources: Resources
) -> _Start:
    """Restore the newest checkpoint or initialise a new state; compile the training steps."""
    partitioner, total = steps.partitioner, steps.config.train.steps
    if partitioner.warning():
        log_once(partitioner.warning())
    size = min(steps.task.init_examples, len(steps.split.images))
    examples = batch_of(steps.split, np.arange(size), np.arange(size))
    init = jax.jit(initializer(steps.task, steps.config, steps.seed))  # traced only once
    shapes = jax.eval_shape(init, examples)
    like = partitioner.abstract_state(shapes)
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
    if step < total and lowered is None:  # the checkpoint of the last step could not be read
        lowered = steps.lower(like)
    program = compiled.result() if compiled else lowered and lowered()
    return _Start(step, cast(TrainState, state), host, program, lowered.flops if lowered else 0.0)


class _Hooks(NamedTuple):
    """The evaluations and checkpoints of `fit` between the calls of the compiled training steps."""

    steps: StepProgram
    data: Data
    run: RunDir
    checkpoints: Checkpoints
    preemption: Preemption
    clock: Clock
    accumulator: MetricAccumulator
    resources: Resources

    def ends(self, step: int) -> bool:
        """Return whether `step` is the last training step or a stop signal was received."""
        return step == self.steps.config.train.steps or self.preemption.requested()

    def evaluation_due(self, step: int) -> bool:
        """Return whether to evaluate on the validation split after `step` training steps."""
        every = self.steps.config.train.eval_every if self.data.validation is not None else 0
        return _due(step, every) and not self.ends(step)

    def evaluate(self, step: int, state: TrainState) -> Mapping[str, float] | None:
        """Evaluate on the validation split and return the metrics by name.

        Return None if metrics.jsonl already has the evaluation at this step, or if a stop signal
        interrupts the evaluation.
        """
        self.accumulator.flush()
        if processes.from_main(functools.partial(self.run.evaluated, step)):
            return None
        with self.preemption.interrupting(), self.clock.pause("evaluation"):
            return self._evaluated(step, state, full=False).metrics
        return None

    def evaluate_finally(self, state: TrainState) -> Evaluation | None:
        """Evaluate on the test split; return None if a stop signal is received before the end."""
        if self.preemption.requested():
            return None
        log("evaluating on the test split")
        with self.preemption.interrupting():
            return self._evaluated(self.steps.config.train.steps, state, full=True)
        return None

    def _evaluated(self, step: int, state: TrainState, full: bool) -> Evaluation:
        """Evaluate on the test split if `full` is True, else on validation; write the results."""
        steps = self.steps
        context = EvaluationContext(
            steps.task,
            Variables(evaluated_params(state, steps.config), state.extra),
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
        """Return whether to write a checkpoint after `step` training steps."""
        return _due(step, self.steps.config.train.checkpoint_every) or self.ends(step)

    def checkpoint(self, step: int, state: TrainState, metrics: Mapping[str, float] | None) -> None:
        """Write a checkpoint, unless the run already has a checkpoint of this step."""
        self.accumulator.flush()
        if processes.from_main(functools.partial(self._may_save, step)):
            with self.clock.pause("checkpoint"):
                self.checkpoints.save(step, state, self.accumulator.host(), metrics)

    def _may_save(self, step: int) -> bool:
        """Return whether the checkpoint of `step` may be saved.

        It may not if it exists already, or if the disk is full and metrics of earlier steps cannot
        be written: a run that resumes from the checkpoint would lack them.
        """
        if step == 0 or self.checkpoints.newest() == step:
            return False
        if self.run.flush():
            return True
        log(
            f"the checkpoint of step {step} was not written, because metrics of earlier steps "
            f"cannot be written; the run continues; free disk space on the disk of {self.run.path}"
        )
        return False


class _Profiler:
    """A profiler trace of five training steps, after the first ten training steps of the process.

    Args:
      directory: The directory to which the trace is written.
      first: Number of training steps taken before the process started.
      enabled: Whether to write a trace.
    """

    def __init__(self, directory: pathlib.Path, first: int, enabled: bool) -> None:
        self._directory, self._tracing = directory, False
        self.cuts: Sequence[int] = (first + 10, first + 15) if enabled else ()

    def reach(self, step: int, accumulator: MetricAccumulator) -> None:
        """Start or stop the trace if it begins or ends after `step` training steps."""
        if step in self.cuts:
            accumulator.flush()
            if step == self.cuts[0]:
                self._tracing = True
                jax.profiler.start_trace(str(self._directory))
            else:
                self._stop()

    def finish(self, step: int) -> None:
        """Stop a trace that was started; log a message if training ended before the trace."""
        if self._tracing:
            self._stop()
        elif self.cuts and step <= self.cuts[0]:
            log(
                f"--profile: no trace was written, because training ended at step {step}, before "
                f"the trace begins at step {self.cuts[0] + 1}; train for more steps"
            )

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        log(
            "wrote a profiler trace; to view it, run "
            f"tensorboard --logdir={self._directory} or open it at ui.perfetto.dev"
        )


def _due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0
