"""Training: the state, the step and the one loop for every task.

The loop's order is fixed, so that a run cut off at any moment and started again ends as
if it had never been:

    evaluate, if due -> checkpoint, if due -> next call of some steps -> log what the call
    before it found

What is told of a step is told once the next call is on its way, so the device never waits
for the host; before an evaluation or a checkpoint everything is told first.
"""

import contextlib
import itertools
import math
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax import parallel as devices
from ddpm_jax.checkpoint import Checkpoints
from ddpm_jax.config import Training
from ddpm_jax.data.loader import Batch, Data, training_batches
from ddpm_jax.data.prefetch import prefetch
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.keys import INIT, TRAIN, example_keys, purpose_key
from ddpm_jax.progress import Clock
from ddpm_jax.rundir import RunDir
from ddpm_jax.tasks import Evaluation, Task

INIT_EXAMPLES = 1000  # training examples that `Task.init` sees
EMA_WARMUP = 0.05  # the half-life is at most this share of the images seen (Karras et al. 2024)


class TrainState(NamedTuple):
    """All that a step reads and writes, and all that a checkpoint holds."""

    step: jax.Array
    params: Any
    fixed: Any
    opt_state: Any
    ema: tuple[Any, ...]  # the parameters' averages, in the order of `ema_decays`


class Fit(NamedTuple):
    """How `fit` ended: the state, its step, and the final evaluation, unless it was stopped."""

    state: TrainState
    step: int
    final: Evaluation | None


def optimizer(config: Training) -> optax.GradientTransformation:
    """Adam or AdamW with warm-up, decay and clipping, as the config says."""
    rate: Any = config.learning_rate
    if config.decay == "cosine":
        rate = optax.cosine_decay_schedule(rate, config.steps)
    peak = rate if callable(rate) else lambda count: config.learning_rate

    def schedule(count):
        return peak(count) * jnp.minimum(1.0, (count + 1) / max(config.warmup, 1))

    adam = optax.adamw(schedule, b2=config.beta2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adam) if config.clip else adam


def ema_decay(step: Any, batch_size: int, half_life: float) -> Any:
    """The share of the old average that a step keeps: 2^(-batch / half-life).

    The half-life, in images, is cut to 5 % of the images seen, so that the average is
    never mostly the first values (Karras et al. 2024, `training_loop.py`).
    """
    seen = jnp.asarray(step, jnp.float32) * batch_size
    images = jnp.maximum(jnp.minimum(half_life, EMA_WARMUP * seen), 1e-8)
    return 0.5 ** (batch_size / images)


def power_decay(step: Any, width: float) -> Any:
    """The share that a power-function average keeps: (1 - 1 / step)^(g + 1).

    Its weights grow as time^g; their standard deviation is `width` of the time that has passed,
    width^2 = (g + 1) / ((g + 2)^2 (g + 3)) (Karras et al. 2024, eq. 121 and 123).
    """
    t = width**-2
    power = float(np.roots([1, 7, 16 - t, 12 - t]).real.max())
    return (1 - 1 / jnp.maximum(jnp.asarray(step, jnp.float32), 1)) ** (power + 1)


def ema_decays(config: Training, step: Any) -> list[Any]:
    """What step `step` keeps of every average: `ema_half_life`'s, `ema_others`', `ema_power`'s."""
    lives = (config.ema_half_life, *config.ema_others)
    return [
        *(ema_decay(step, config.batch_size, life) if life else 0.0 for life in lives),
        *(power_decay(step, width) for width in config.ema_power),
    ]


def averaged(state: TrainState, config: Training) -> Any:
    """The parameters that are evaluated and drawn from: the average that `config.ema` chooses."""
    return state.ema[config.ema]


def check_ema(config: Training) -> None:
    """Raises UserError unless there is the average that `config.ema` chooses."""
    count = 1 + len(config.ema_others) + len(config.ema_power)
    if config.ema >= count:
        raise UserError(f"--config.ema={config.ema}: there are {count} averages, from 0 on")
    for width in config.ema_power:
        if width > 0.28:  # beyond 1 / sqrt(12) the weights would fall with time
            raise UserError(f"--config.ema_power={width:g}: must be at most 0.28")


def init_state(task: Task, config: Training, batch: Batch, seed: int) -> TrainState:
    """The state before the first step; `batch` holds training examples for `Task.init`."""
    return initializer(task, config, seed)(batch)


def initializer(task: Task, config: Training, seed: int) -> Callable[[Batch], TrainState]:
    """`init_state` of a batch, compiled."""

    @jax.jit  # one program instead of a hundred small ones
    def init(batch):
        params, fixed = task.init(purpose_key(seed, INIT), batch)
        opt_state = optimizer(config).init(params)
        # An average starts as a copy: a step donates both, and not one array twice.
        ema = [jax.tree.map(jnp.copy, params) for _ in ema_decays(config, 0)]
        return TrainState(jnp.zeros((), jnp.int32), params, fixed, opt_state, tuple(ema))

    return init


def state_shapes(task: Task, config: Training) -> TrainState:
    """What `init_state` would make, as shapes alone: for restoring into."""
    images = np.zeros((2, *config.shape), np.uint8)
    batch = Batch(images, np.zeros(2, np.int32), np.arange(2))
    return jax.eval_shape(initializer(task, config, 0), batch)


def train_step(
    task: Task,
    config: Training,
    seed: int,
    state: TrainState,
    batch: Batch,
    reduce: Callable[[Any], Any] = lambda tree: tree,
    gather: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step: loss -> mean -> gradient -> reduce -> optimizer -> EMA.

    Args:
      batch: this device's part of the batch; `batch.index` places it in the whole.
      reduce: the mean over devices.
      gather: puts the devices' parts together, for losses that compare examples.

    Returns:
      The next state, and the step's means by name.
    """
    keys = example_keys(purpose_key(seed, TRAIN), state.step, batch.index)

    def mean_loss(params):
        losses, metrics, statistics = task.loss(
            params, state.fixed, batch, keys, train=True, gather=gather
        )
        means = {name: values.mean() for name, values in {"loss": losses, **metrics}.items()}
        return losses.mean(), (means, statistics)

    gradient, (metrics, statistics) = jax.grad(mean_loss, has_aux=True)(state.params)
    gradient, metrics, statistics = reduce((gradient, metrics, statistics))
    updates, opt_state = optimizer(config).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decays = zip(state.ema, ema_decays(config, state.step + 1), strict=True)
    ema = tuple(optax.incremental_update(params, old, 1 - decay) for old, decay in decays)
    metrics["gradient_norm"] = _norm(gradient)
    fixed = task.update(state.fixed, statistics)
    return TrainState(state.step + 1, params, fixed, opt_state, ema), metrics


def _norm(tree: Any) -> jax.Array:
    """The global norm, by products, which a CPU sums on all its cores."""
    squares = [jnp.vdot(leaf, leaf, precision="highest") for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares))


def train_steps(
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Several steps in one dispatch: call(state, batches [K, B, ...], count) of `step`.

    It runs the first `count` <= K of the batches and returns metrics [K] of which as many
    mean something.  One program serves every count, so where the calls are cut changes no
    bit of the result.
    """

    def call(state, batches, count):
        def body(i, carry):
            state, metrics = carry
            state, found = step(state, jax.tree.map(lambda array: array[i], batches))
            return state, {name: metrics[name].at[i].set(found[name]) for name in metrics}

        size = jax.tree.leaves(batches)[0].shape[0]
        shapes = jax.eval_shape(step, state, jax.tree.map(lambda array: array[0], batches))[1]
        metrics = {name: jnp.zeros(size, found.dtype) for name, found in shapes.items()}
        return jax.lax.fori_loop(0, count, body, (state, metrics))

    return call


def calls(first: int, config: Training) -> Iterator[tuple[int, int]]:
    """(first, last) of each call: at most `steps_per_call` steps, none across a boundary."""
    intervals = (config.log_every, config.eval_every, config.checkpoint_every)
    while first < config.steps:
        ends = [(first // every + 1) * every for every in intervals if every]
        last = min(first + config.steps_per_call, config.steps, *ends)
        yield first, last
        first = last


def fit(
    task: Task,
    config: Training,
    data: Data,
    run: RunDir,
    checkpoints: Checkpoints,
    seed: int,
    mode: str = "jit",
) -> Fit:
    """Train to the last step, from the newest checkpoint where there is one, and evaluate.

    Raises:
      RunError: a loss is not finite; the last checkpoint is older and good.
    """
    spread = devices.make(mode)
    window: dict[str, float] = {}  # sums since the last line, and of how many steps
    step = checkpoints.newest() or 0
    size = min(INIT_EXAMPLES, len(data.train.images))
    examples = Batch(data.train.images[:size], data.train.labels[:size], np.arange(size))
    init = initializer(task, config, seed)
    like = spread.like(jax.eval_shape(init, examples))
    stack = config.steps_per_call if config.steps_per_call > 1 else None

    def one_step(state, batch):
        return train_step(task, config, seed, state, batch)

    def batches(plan):
        return training_batches(data.train, seed, config.batch_size, plan, stack)

    def place(batch):
        return spread.shard(batch, axis=1 if stack else 0)

    # One program, compiled while the state is made: of the newest checkpoint, or new.
    arguments = (like, place(next(batches([(step, step + 1)]))), *((1,) if stack else ()))
    lowered = spread.compile(train_steps(one_step) if stack else one_step).lower(*arguments)
    with ThreadPoolExecutor(1) as background:
        compiled = background.submit(lowered.compile)
        if step:
            state, host = checkpoints.restore(step, like)
            window = host["window"]
            print(f"resuming at step {step}", file=sys.stderr)
        else:
            state = spread.place(init(examples))
    call = compiled.result()
    placed = prefetch(batches(calls(step, config)), place)  # ahead of the calls that use them

    pending: tuple[int, int, Any] | None = None  # (first, last, metrics), not told yet
    clock = Clock(step, config.steps)

    def tell() -> None:
        """Fetch what the last call found; check it, add it up, log it."""
        nonlocal pending, window
        if pending is None:
            return
        first, last, found = pending
        pending = None
        values = {name: np.atleast_1d(np.asarray(v, np.float64)) for name, v in found.items()}
        for i in range(last - first):
            for name in values:
                if not math.isfinite(values[name][i]):
                    raise RunError(
                        f"{name} is {values[name][i]} at step {first + i + 1}; the newest "
                        f"checkpoint is of step {checkpoints.newest() or 0}: try a smaller "
                        "--config.learning_rate, or --config.clip=1, in another --workdir"
                    )
                window[name] = window.get(name, 0.0) + float(values[name][i])
            window["count"] = window.get("count", 0) + 1
        if last % config.log_every == 0 or last == config.steps:
            count = window.pop("count")
            means = {f"train/{name}": total / count for name, total in window.items()}
            window = {}
            run.log(last, means)
            run.time(last, **clock.lap(last))
        clock.show(last, float(values["loss"][last - first - 1]))

    with _Signals() as signals, contextlib.closing(placed), contextlib.closing(clock):
        for first, last in itertools.chain(calls(step, config), [(config.steps, config.steps)]):
            finished = first == config.steps
            metrics = None
            if _due(first, config.eval_every) and not (finished or signals.stop):
                tell()
                if not run.evaluated(first):
                    with signals.interrupting(), clock.pause("evaluation"):
                        shown = evaluate(task, config, state, data, run, first, seed, spread.shard)
                        metrics = shown.metrics
            if metrics or _due(first, config.checkpoint_every) or finished or signals.stop:
                tell()
                run.flush()
                if first > 0 and checkpoints.newest() != first:
                    with clock.pause("checkpoint"):
                        checkpoints.save(first, state, {"window": window}, metrics)
            if finished or signals.stop:
                break
            batch = next(placed)
            state, found = call(state, batch, last - first) if stack else call(state, batch)
            tell()
            pending = (first, last, found)
        checkpoints.wait()
        final = None
        if finished and not signals.stop:
            print("evaluating", file=sys.stderr)
            with signals.interrupting():
                final = evaluate(
                    task, config, state, data, run, first, seed, spread.shard, full=True
                )
    return Fit(state, first, final)


def _due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0


def evaluate(
    task: Task,
    config: Training,
    state: TrainState,
    data: Data,
    run: RunDir,
    step: int,
    seed: int,
    shard: Callable[[Any], Any],
    full: bool = False,
) -> Evaluation:
    """Evaluate the chosen average of the parameters, write the line and the pictures."""
    params = averaged(state, config)
    found = task.evaluate(params, state.fixed, data, seed=seed, full=full, shard=shard)
    check_figures(found.metrics)
    for name, picture in found.pictures.items():
        run.picture(name, picture, None if full else step)
    run.log(step, found.metrics)
    return found


def check_figures(metrics: dict[str, float]) -> None:
    """Raises RunError, naming it, if a figure is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RunError(f"{name} is {value}: the parameters are no good")


class _Signals:
    """SIGTERM and Ctrl-C ask the loop to stop; a second Ctrl-C stops it at once."""

    def __init__(self) -> None:
        self.stop = False
        self._interrupt = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        with contextlib.suppress(ValueError):  # not in the main thread: nobody signals it
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        again = self.stop and number == signal.SIGINT
        self.stop = True
        if again:
            raise KeyboardInterrupt
        if self._interrupt:
            raise _Interrupted

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """What can be done again later is broken off at once."""
        self._interrupt = True
        try:
            yield
        except _Interrupted:
            pass
        finally:
            self._interrupt = False


class _Interrupted(Exception):
    pass
