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
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax.config import Training
from ddpm_jax.data.loader import Batch, Data, batch_of, epoch_order, training_batches
from ddpm_jax.data.prefetch import prefetch
from ddpm_jax.errors import RunError, UserError
from ddpm_jax.parallel import sharding as devices
from ddpm_jax.progress import Clock, tell
from ddpm_jax.rng import INIT, TRAIN, example_keys, purpose_key
from ddpm_jax.system import interrupts
from ddpm_jax.task import Evaluation, Task
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.muon import muon
from ddpm_jax.training.run_dir import RunDir

EMA_WARMUP = 0.05  # the half-life is at most this share of the images seen (Karras et al. 2024)


class TrainState(NamedTuple):
    """All that a step reads and writes, and all that a checkpoint holds."""

    step: jax.Array
    params: Any
    fixed: Any
    opt_state: Any
    ema: tuple[Any, ...]  # the parameters' averages, in the order of `ema_decays`


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


def optimizer(config: Training) -> optax.GradientTransformation:
    """Adam, AdamW or Muon with warm-up, decay and clipping, as the config says."""
    rate: Any = config.learning_rate
    if config.decay == "cosine":
        rate = optax.cosine_decay_schedule(rate, config.steps)
    peak = rate if callable(rate) else lambda count: config.learning_rate

    def schedule(count):
        return peak(count) * jnp.minimum(1.0, (count + 1) / max(config.warmup, 1))

    if config.optimizer == "muon":
        made = muon(schedule, config.beta2, config.weight_decay)
    else:
        made = optax.adamw(schedule, b2=config.beta2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), made) if config.clip else made


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
    """What step `step` keeps of every average: `ema_half_life`'s, `ema_others`', `ema_power`'s.

    None of one that is no average but the parameters themselves.
    """
    lives = (config.ema_half_life, *config.ema_others)
    return [
        *(ema_decay(step, config.batch_size, life) if life else None for life in lives),
        *(power_decay(step, width) for width in config.ema_power),
    ]


def averaged(state: TrainState, config: Training) -> Any:
    """The parameters that are evaluated and drawn from: the average that `config.ema` chooses."""
    return state.ema[config.ema]


def parameters_used(config: Training) -> str:
    """Which parameters `averaged` chooses, for the record: as trained, or which average."""
    lives = (config.ema_half_life, *config.ema_others)
    if config.ema >= len(lives):
        return f"power EMA, width {config.ema_power[config.ema - len(lives)]:g}"
    life = lives[config.ema]
    return f"EMA, half-life {life:g} images" if life else "as trained"


def without_training(state: TrainState, config: Training, nothing: Any) -> TrainState:
    """`state` with `nothing` for each array that only training reads: all but one average."""

    def blank(tree):
        return jax.tree.map(lambda _: nothing, tree)

    ema = tuple(
        tree if number == config.ema else blank(tree) for number, tree in enumerate(state.ema)
    )
    return state._replace(params=blank(state.params), opt_state=blank(state.opt_state), ema=ema)


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
    return jax.jit(initializer(task, config, seed))(batch)  # not a hundred small programs


def initializer(task: Task, config: Training, seed: int) -> Callable[[Batch], TrainState]:
    """`init_state` of a batch, to be compiled."""

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
    *,
    reduce: Callable[[Any], Any] = devices.identity,
    gather: Callable[[Any], Any] = devices.identity,
    view: Callable[[Callable], Callable] = devices.identity,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step: loss -> mean -> gradient -> reduce -> optimizer -> EMA.

    Args:
      batch: this device's part of the batch; `batch.index` places it in the whole.
      reduce: the mean over devices.
      gather: puts the devices' parts together, for losses that compare examples.
      view: makes of compute(params, fixed, batch, keys, whole=) the same of a sharded state; it
        gives it `whole`, which lets a function of (params, fixed, ...) be called with their parts.

    Returns:
      The next state, and by name the step's means and `finite`, whether each example's loss is.
    """
    keys = example_keys(purpose_key(seed, TRAIN), state.step, batch.index)
    compare = gather if config.accumulate == 1 else _refuse_to_compare

    def mean_loss(params, fixed, batch, keys):
        losses, metrics, statistics = task.loss(
            params, fixed, batch, keys, train=True, gather=compare
        )
        means = {name: values.mean() for name, values in {"loss": losses, **metrics}.items()}
        return losses.mean(), (means, {"finite": jnp.isfinite(losses), "statistics": statistics})

    def compute(params, fixed, batch, keys, whole=devices.identity):
        def gradient_of(params, batch, keys):
            return jax.grad(whole(mean_loss), has_aux=True)(params, fixed, batch, keys)

        gradient, means, each = _accumulated(gradient_of, params, batch, keys, config.accumulate)
        return *reduce((gradient, means)), gather(each)

    gradient, metrics, each = view(compute)(state.params, state.fixed, batch, keys)
    updates, opt_state = optimizer(config).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decays = zip(state.ema, ema_decays(config, state.step + 1), strict=True)
    ema = tuple(
        params if decay is None else optax.incremental_update(params, old, 1 - decay)
        for old, decay in decays
    )
    metrics["gradient_norm"] = _norm(gradient)
    fixed = task.update(state.fixed, each["statistics"])
    new = TrainState(state.step + 1, params, fixed, opt_state, ema)
    if config.skip_nonfinite:
        good = jnp.all(jnp.array([jnp.isfinite(value) for value in metrics.values()]))
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        new = new._replace(step=state.step + 1)
    return new, {**metrics, "finite": each["finite"]}


def _accumulated(gradient_of: Callable, params: Any, batch: Batch, keys: Any, parts: int) -> Any:
    """(mean gradient, means, what is told of each example) of a batch, in `parts` one by one.

    Example i goes to part i mod `parts`, so that every part lies on all devices as the batch does.
    """
    if parts == 1:
        gradient, (means, each) = gradient_of(params, batch, keys)
        return gradient, means, each

    def apart(a):
        return jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1)

    def add(total, part):
        gradient, (means, each) = gradient_of(params, *part)
        return jax.tree.map(jnp.add, total, (gradient, means)), each

    split = jax.tree.map(apart, (batch, keys))
    shapes = jax.eval_shape(gradient_of, params, *jax.tree.map(lambda a: a[0], split))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (shapes[0], shapes[1][0]))
    total, each = jax.lax.scan(add, zeros, split)
    gradient, means = jax.tree.map(lambda a: a / parts, total)
    each = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:]), each)
    return gradient, means, each


def _refuse_to_compare(tree: Any) -> Any:
    raise UserError(
        "--config.accumulate: this experiment's loss compares the examples of a batch with each "
        "other, so a batch cannot be taken in parts; use a smaller --config.batch_size"
    )


def _norm(tree: Any) -> jax.Array:
    """The global norm, by products, which a CPU sums on all its cores.

    Nothing is reshaped, for which a sharded array would be put together.
    """

    def square(leaf):
        axes = tuple(range(leaf.ndim))
        return jax.lax.dot_general(leaf, leaf, ((axes, axes), ((), ())), precision="highest")

    return jnp.sqrt(sum(square(leaf) for leaf in jax.tree.leaves(tree)))


def train_steps(step: Callable) -> Callable:
    """Several steps in one dispatch: call(state, batches [K, B, ...], count, **hooks) of `step`.

    It runs the first `count` <= K of the batches and returns metrics [K, ...] of which as many
    mean something.  One program serves every count, so where the calls are cut changes no
    bit of the result.
    """

    def call(state, batches, count, **hooks):
        def one(state, batch):
            return step(state, batch, **hooks)

        def body(i, carry):
            state, metrics = carry
            state, found = one(state, jax.tree.map(lambda array: array[i], batches))
            return state, {name: metrics[name].at[i].set(found[name]) for name in metrics}

        size = jax.tree.leaves(batches)[0].shape[0]
        shapes = jax.eval_shape(one, state, jax.tree.map(lambda array: array[0], batches))[1]
        metrics = {name: jnp.zeros((size, *f.shape), f.dtype) for name, f in shapes.items()}
        return jax.lax.fori_loop(0, count, body, (state, metrics))

    return call


def calls(first: int, config: Training, cuts: Sequence[int] = ()) -> Iterator[tuple[int, int]]:
    """(first, last) of each call: at most `steps_per_call` steps, none across a boundary or cut."""
    intervals = (config.log_every, config.eval_every, config.checkpoint_every)
    while first < config.steps:
        ends = [(first // every + 1) * every for every in intervals if every]
        ends += [cut for cut in cuts if cut > first]
        last = min(first + config.steps_per_call, config.steps, *ends)
        yield first, last
        first = last


class _Ledger:
    """What calls found, told once the next call is on its way: checked, added up and logged."""

    def __init__(
        self,
        config: Training,
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
        if self._config.steps_per_call == 1:
            values = {name: v[None] for name, v in values.items()}
        finite = values.pop("finite")
        for i in range(last - first):
            one = {name: float(v[i]) for name, v in values.items()}
            self._add(first + i + 1, one, finite[i])
        if last % self._config.log_every == 0 or last == self._config.steps:
            self._log(last)
        self._clock.show(last, float(values["loss"][last - first - 1]))

    def _add(self, step: int, values: dict[str, float], finite: np.ndarray) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        self._skipped = self._skipped + 1 if bad else 0
        if self._skipped > self._config.skip_nonfinite:
            name = "loss" if "loss" in bad else bad[0]
            size = self._config.batch_size
            examples = self._order((step - 1) * size, step * size)[~finite]
            raise RunError(
                _not_finite(name, values[name], step, examples)
                + f"; the newest checkpoint is of step {self._checkpoints.newest() or 0}: try a "
                "smaller --config.learning_rate, --config.clip=1 or --config.skip_nonfinite=10, "
                "in another --workdir"
            )
        for name, value in {"skipped": 1.0}.items() if bad else {**values, "count": 1.0}.items():
            self._window[name] = self._window.get(name, 0.0) + value

    def _log(self, step: int) -> None:
        count, skipped = self._window.pop("count", 0), self._window.pop("skipped", 0)
        means = {f"train/{name}": total / count for name, total in self._window.items()}
        if self._config.skip_nonfinite:
            means["train/skipped"] = skipped
        self._window = {}
        self._run.log(step, means)
        lap = self._clock.lap(step)
        self._run.time(step, **lap, **devices.memory(), **devices.utilisation(self._flops, lap))


def fit(
    task: Task,
    config: Training,
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
    with _Signals(alone=devices.alone()) as signals, contextlib.ExitStack() as held:
        size = min(task.sees, len(data.train.images))
        examples = batch_of(data.train, np.arange(size), np.arange(size))
        init = jax.jit(initializer(task, config, seed))  # so traced once, here
        shapes = jax.eval_shape(init, examples)
        like = spread.like(shapes)
        stack = config.steps_per_call if config.steps_per_call > 1 else None
        mine = spread.rows(config.batch_size)
        one_step = functools.partial(train_step, task, config, seed)

        def batches(plan):
            return training_batches(data.train, seed, config.batch_size, plan, stack, mine)

        def place(batch):
            return spread.feed(batch, axis=1 if stack else 0)

        def lowered():
            arguments = (like, place(next(batches([(0, 1)]))), *((1,) if stack else ()))
            return spread.lower(train_steps(one_step) if stack else one_step, *arguments)

        # One program, compiled while the state is made: of the newest checkpoint, or new.
        with ThreadPoolExecutor(1) as background:
            finished = checkpoints.newest() == config.steps
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
        devices.from_main(lambda: run.begin(step, step == config.steps, watch.wandb))
        traced = [step + 10, step + 15] if watch.profile else [-1, -1]
        plan = [calls(step, config, traced) for _ in range(2)]
        # Made ahead of the calls that use them.
        placed = held.enter_context(contextlib.closing(prefetch(batches(plan[0]), place)))
        clock = held.enter_context(
            contextlib.closing(Clock(step, config.steps, show=devices.is_main()))
        )
        order = epoch_order(seed, len(data.train.images))
        ledger = _Ledger(
            config, run, clock, checkpoints, order, program.flops if program else 0.0, host
        )

        evaluate_every = config.eval_every if data.validation is not None else 0
        if config.eval_every and not evaluate_every:
            tell("no validation split: nothing is evaluated before the end")

        tracing = False
        asked = devices.raised(spread, False)

        def stop() -> bool:
            return signals.stop if devices.alone() else devices.anyone(asked)

        def breathe() -> None:  # one process is interrupted at once
            nonlocal asked
            if not devices.alone():
                asked = devices.raised(spread, signals.stop)
                if stop():
                    raise _Interrupted

        breathing = spread._replace(breathe=breathe)
        for first, last in itertools.chain(plan[1], [(config.steps, config.steps)]):
            finished = first == config.steps
            metrics = None
            if _due(first, evaluate_every) and not (finished or stop()):
                ledger.settle()
                if not devices.from_main(functools.partial(run.evaluated, first)):
                    with signals.interrupting(), clock.pause("evaluation"):
                        shown = evaluate(task, config, state, data, run, first, seed, breathing)
                        metrics = shown.metrics
            if metrics or _due(first, config.checkpoint_every) or finished or stop():
                ledger.settle()
                if devices.from_main(functools.partial(_may_save, first, checkpoints, run)):
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


def evaluate(
    task: Task,
    config: Training,
    state: TrainState,
    data: Data,
    run: RunDir,
    step: int,
    seed: int,
    spread: devices.Parallel,
    full: bool = False,
) -> Evaluation:
    """Evaluate the chosen average of the parameters, write the line and the pictures.

    Before the end on the validation split; `full`, at the end, on the test split.
    """
    split = "test" if full else "validation"
    found = evaluated(task, averaged(state, config), state.fixed, data, split, seed, full, spread)
    for name, picture in found.pictures.items():
        run.picture(name, picture, step, last=full)
    run.log(step, found.metrics)
    return found


def evaluated(
    task: Task,
    params: Any,
    fixed: Any,
    data: Data,
    split: str,
    seed: int,
    full: bool,
    spread: devices.Parallel,
) -> Evaluation:
    """What `task.evaluate` finds of a split, whose name stands before every metric's.

    Raises:
      RunError: a metric is not finite.
    """
    found = task.evaluate(params, fixed, data, split=split, seed=seed, full=full, spread=spread)
    check_figures(found.metrics)
    metrics = {f"{split}/{name}": value for name, value in found.metrics.items()}
    return found._replace(metrics=metrics)


def check_figures(metrics: dict[str, float]) -> None:
    """Raises RunError, naming it, if a figure is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RunError(f"{name} is {value}: the parameters are no good")


WAITING = (
    "waiting for the current step and its checkpoint; press Ctrl-C again to end at once (the "
    "newest checkpoint stays)"
)


class _Signals:
    """SIGTERM and Ctrl-C ask the loop to stop; a second Ctrl-C ends the process at once."""

    def __init__(self, alone: bool) -> None:
        self.stop = False
        self._alone = alone  # or other processes wait for this one's share of the work
        self._interrupt = False
        self._before: dict[int, Any] = {}
        # In a thread of its own, and at once: the main thread may be compiling.
        notice = interrupts.warning(lambda: tell(WAITING), signal.SIGTERM, signal.SIGINT)
        self._watch = interrupts.watched(notice)

    def __enter__(self) -> "_Signals":
        with contextlib.suppress(ValueError):  # not in the main thread: nobody signals it
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        self._watch.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self._watch.__exit__(None, None, None)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.stop = True
        if self._interrupt:
            raise _Interrupted

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """What can be done again later is broken off at once."""
        self._interrupt = self._alone
        try:
            yield
        except _Interrupted:
            pass
        finally:
            self._interrupt = False


class _Interrupted(Exception):
    pass
