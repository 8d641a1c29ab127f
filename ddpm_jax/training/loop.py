"""Training: the state, the step and the one loop for every task.

The loop's order is fixed, so that a run cut off at any moment and started again ends as
if it had never been:

    evaluate, if due -> checkpoint, if due -> next call of some steps -> log what the call
    before it found

What is told of a step is told once the next call is on its way, so the device never waits
for the host; before an evaluation or a checkpoint everything is told first.
"""

import contextlib
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from ddpm_jax.data.batches import batch_of, epoch_order, training_batches
from ddpm_jax.data.prefetch import prefetch
from ddpm_jax.data.types import Data
from ddpm_jax.errors import RunError
from ddpm_jax.parallel import hardware, processes
from ddpm_jax.parallel import sharding as devices
from ddpm_jax.progress import Clock, tell
from ddpm_jax.task import Evaluation, Task
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.evaluation import evaluate
from ddpm_jax.training.run_dir import RunDir
from ddpm_jax.training.settings import Settings
from ddpm_jax.training.signals import Interrupted, Signals
from ddpm_jax.training.step import TrainState, initializer, train_step, train_steps


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


def calls(first: int, config: Settings, cuts: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """(first, last) of each call: at most `steps_per_call` steps, none across a boundary or cut."""
    intervals = (config.train.log_every, config.train.eval_every, config.train.checkpoint_every)
    while first < config.train.steps:
        ends = [(first // every + 1) * every for every in intervals if every]
        ends += [cut for cut in cuts if cut > first]
        last = min(first + config.train.steps_per_call, config.train.steps, *ends)
        yield first, last
        first = last


class _Ledger:
    """What calls found, told once the next call is on its way: checked, added up and logged."""

    def __init__(
        self,
        config: Settings,
        run: RunDir,
        clock: Clock,
        checkpoints: Checkpoints,
        order: Callable[[int, int], np.ndarray],
        flops: float,
        host: dict[str, Any],
    ) -> None:
        self._config, self._run, self._clock = config, run, clock
        self._checkpoints, self._order, self._flops = checkpoints, order, flops
        self._window: dict[str, float] = host.get("window", {})  # sums since the last line
        self._skipped: int = host.get("skipped", 0)  # steps in a row
        self.pending: tuple[int, int, Any] | None = None  # (first, last, metrics), not told yet

    def host(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"window": self._window, "skipped": self._skipped}

    def settle(self) -> None:
        """Fetch what the last call found; check it, add it up, log it."""
        if self.pending is None:
            return
        first, last, found = self.pending
        self.pending = None
        values = {name: np.asarray(v) for name, v in devices.fetch(found).items()}
        if self._config.train.steps_per_call == 1:
            values = {name: v[None] for name, v in values.items()}
        finite = values.pop("finite")
        for i in range(last - first):
            one = {name: float(v[i]) for name, v in values.items()}
            self._add(first + i + 1, one, finite[i])
        if last % self._config.train.log_every == 0 or last == self._config.train.steps:
            self._log(last)
        self._clock.show(last, float(values["loss"][last - first - 1]))

    def _add(self, step: int, values: dict[str, float], finite: np.ndarray) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        self._skipped = self._skipped + 1 if bad else 0
        if self._skipped > self._config.train.max_consecutive_nonfinite_steps:
            name = "loss" if "loss" in bad else bad[0]
            size = self._config.train.batch_size
            examples = self._order((step - 1) * size, step * size)[~finite]
            raise RunError(
                _not_finite(name, values[name], step, examples)
                + f"; the newest checkpoint is of step {self._checkpoints.newest() or 0}: try a "
                "smaller --config.optimizer.learning_rate, --config.optimizer.grad_clip_norm=1 or "
                "--config.train.max_consecutive_nonfinite_steps=10, in another --workdir"
            )
        for name, value in {"skipped": 1.0}.items() if bad else {**values, "count": 1.0}.items():
            self._window[name] = self._window.get(name, 0.0) + value

    def _log(self, step: int) -> None:
        count, skipped = self._window.pop("count", 0), self._window.pop("skipped", 0)
        means = {f"train/{name}": total / count for name, total in self._window.items()}
        if self._config.train.max_consecutive_nonfinite_steps:
            means["train/skipped"] = skipped
        self._window = {}
        self._run.log(step, means)
        lap = self._clock.lap(step)
        self._run.time(step, **lap, **hardware.memory(), **hardware.utilisation(self._flops, lap))


def fit(
    task: Task,
    config: Settings,
    data: Data,
    run: RunDir,
    checkpoints: Checkpoints,
    seed: int,
    spread: devices.Parallel,
    watch: Watch = UNWATCHED,
) -> Fit:
    """Train to the last step, from the newest checkpoint where there is one, and evaluate.

    Raises:
      RunError: a loss is not finite; the last checkpoint is older and good.
    """
    with Signals(alone=processes.alone()) as signals, contextlib.ExitStack() as held:
        size = min(task.sees, len(data.train.images))
        examples = batch_of(data.train, np.arange(size), np.arange(size))
        init = jax.jit(initializer(task, config, seed))  # so traced once, here
        shapes = jax.eval_shape(init, examples)
        like = spread.like(shapes)
        stack = config.train.steps_per_call if config.train.steps_per_call > 1 else None
        mine = spread.rows(config.train.batch_size)
        one_step = functools.partial(train_step, task, config, seed)

        def batches(plan):
            return training_batches(data.train, seed, config.train.batch_size, plan, stack, mine)

        def place(batch):
            return spread.feed(batch, axis=1 if stack else 0)

        def lowered():
            arguments = (like, place(next(batches([(0, 1)]))), *((1,) if stack else ()))
            return spread.lower(train_steps(one_step) if stack else one_step, *arguments)

        # One program, compiled while the state is made: of the newest checkpoint, or new.
        with ThreadPoolExecutor(1) as background:
            finished = checkpoints.newest() == config.train.steps
            program = None if finished else lowered()
            compiled = program and background.submit(program)
            step, state, host = checkpoints.restore_newest(like)
            if state is None:
                state = jax.jit(init, out_shardings=spread.shardings(shapes))(examples)
                if task.load is not None:
                    state = state._replace(fixed=spread.place(task.load(state.fixed)))
            else:
                tell(f"resuming at step {step}")
        call: Any = compiled and compiled.result()
        processes.from_main(lambda: run.begin(step, step == config.train.steps, watch.wandb))
        traced = [step + 10, step + 15] if watch.profile else [-1, -1]
        plan = [calls(step, config, traced) for _ in range(2)]
        # Made ahead of the calls that use them.
        placed = held.enter_context(contextlib.closing(prefetch(batches(plan[0]), place)))
        clock = held.enter_context(
            contextlib.closing(Clock(step, config.train.steps, show=processes.is_main()))
        )
        order = epoch_order(seed, len(data.train.images))
        ledger = _Ledger(
            config, run, clock, checkpoints, order, program.flops if program else 0.0, host
        )

        evaluate_every = config.train.eval_every if data.validation is not None else 0
        if config.train.eval_every and not evaluate_every:
            tell("no validation split: nothing is evaluated before the end")

        tracing = False
        asked = devices.raised(spread, False)

        def stop() -> bool:
            return signals.stop if processes.alone() else devices.anyone(asked)

        def breathe() -> None:  # one process is interrupted at once
            nonlocal asked
            if not processes.alone():
                asked = devices.raised(spread, signals.stop)
                if stop():
                    raise Interrupted

        breathing = spread._replace(breathe=breathe)
        for first, last in itertools.chain(plan[1], [(config.train.steps, config.train.steps)]):
            finished = first == config.train.steps
            metrics = None
            if _due(first, evaluate_every) and not (finished or stop()):
                ledger.settle()
                if not processes.from_main(functools.partial(run.evaluated, first)):
                    with signals.interrupting(), clock.pause("evaluation"):
                        shown = evaluate(task, config, state, data, run, first, seed, breathing)
                        metrics = shown.metrics
            if metrics or _due(first, config.train.checkpoint_every) or finished or stop():
                ledger.settle()
                if processes.from_main(functools.partial(_may_save, first, checkpoints, run)):
                    with clock.pause("checkpoint"):
                        checkpoints.save(first, state, ledger.host(), metrics)
            if finished or stop():
                break
            if first in traced:
                ledger.settle()
                tracing = first == traced[0]
                if tracing:
                    jax.profiler.start_trace(str(run.path / "profile"))
                else:
                    _stop_trace(run.path / "profile")
            with clock.waiting():
                batch = next(placed)
            asked = devices.raised(spread, signals.stop)
            call = call or lowered()()
            state, found = call(state, batch, last - first) if stack else call(state, batch)
            ledger.settle()
            ledger.pending = first, last, found
        if tracing:
            _stop_trace(run.path / "profile")
        elif watch.profile and first <= traced[0]:
            tell("nothing profiled: a trace is of steps 10 to 15 after the first")
        final = None
        if finished and not stop():
            tell("evaluating")
            with signals.interrupting():
                final = evaluate(task, config, state, data, run, first, seed, breathing, full=True)
        return Fit(state, first, final)


def _may_save(step: int, checkpoints: Checkpoints, run: RunDir) -> bool:
    """Whether a checkpoint is wanted, and all that was said before it is on disk."""
    if step == 0 or checkpoints.newest() == step:
        return False
    if run.flush():
        return True
    tell(f"no checkpoint of step {step}: the figures before it could not be written")
    return False


def _stop_trace(folder: pathlib.Path) -> None:
    jax.profiler.stop_trace()
    tell(f"profiled: tensorboard --logdir={folder}, or ui.perfetto.dev")


def _not_finite(name: str, value: float, step: int, examples: np.ndarray) -> str:
    """What is wrong with a step, and with which training examples, by their place in the split."""
    some = ", ".join(map(str, examples[:5])) + ", ..." * (len(examples) > 5)
    which = f"of training examples {some}" if len(examples) else "though every example's loss is"
    return f"{name} is {value} at step {step}, {which}"


def _due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0
