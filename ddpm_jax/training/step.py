"""The state of a training and one step, a pure function of state and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax.data.types import Batch
from ddpm_jax.errors import UserError
from ddpm_jax.parallel import sharding as devices
from ddpm_jax.rng import INIT, TRAIN, example_keys, purpose_key
from ddpm_jax.task import Task
from ddpm_jax.training.ema import ema_decays
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.settings import Settings


class TrainState(NamedTuple):
    """All that a step reads and writes, and all that a checkpoint holds."""

    step: jax.Array
    params: Any
    fixed: Any
    opt_state: Any
    ema: tuple[Any, ...]  # the parameters' averages, in the order of `ema_decays`


def averaged(state: TrainState, config: Settings) -> Any:
    """Return the parameters that are evaluated and sampled from, as `config.ema` chooses."""
    return state.ema[config.ema.index]


def without_training(state: TrainState, config: Settings, nothing: Any) -> TrainState:
    """`state` with `nothing` for each array that only training reads: all but one average."""

    def blank(tree):
        return jax.tree.map(lambda _: nothing, tree)

    kept = config.ema.index
    ema = tuple(tree if number == kept else blank(tree) for number, tree in enumerate(state.ema))
    return state._replace(params=blank(state.params), opt_state=blank(state.opt_state), ema=ema)


def init_state(task: Task, config: Settings, batch: Batch, seed: int) -> TrainState:
    """The state before the first step; `batch` holds training examples for `Task.init`."""
    return jax.jit(initializer(task, config, seed))(batch)  # not a hundred small programs


def initializer(task: Task, config: Settings, seed: int) -> Callable[[Batch], TrainState]:
    """`init_state` of a batch, to be compiled."""

    def init(batch):
        params, fixed = task.init(purpose_key(seed, INIT), batch)
        opt_state = make_optimizer(config.optimizer, config.train.steps).init(params)
        # An average starts as a copy: a step donates both, and not one array twice.
        ema = [jax.tree.map(jnp.copy, params) for _ in config.ema.names]
        return TrainState(jnp.zeros((), jnp.int32), params, fixed, opt_state, tuple(ema))

    return init


def state_shapes(task: Task, config: Settings, shape: tuple[int, ...]) -> TrainState:
    """Return what `init_state` would make of images of `shape`, as shapes alone."""
    images = np.zeros((2, *shape), np.uint8)
    batch = Batch(images, np.zeros(2, np.int32), np.arange(2))
    return jax.eval_shape(initializer(task, config, 0), batch)


def train_step(
    task: Task,
    config: Settings,
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
    compare = gather if config.train.grad_accum_steps == 1 else _refuse_to_compare

    def mean_loss(params, fixed, batch, keys):
        losses, metrics, statistics = task.loss(
            params, fixed, batch, keys, train=True, gather=compare
        )
        means = {name: values.mean() for name, values in {"loss": losses, **metrics}.items()}
        return losses.mean(), (means, {"finite": jnp.isfinite(losses), "statistics": statistics})

    def compute(params, fixed, batch, keys, whole=devices.identity):
        def gradient_of(params, batch, keys):
            return jax.grad(whole(mean_loss), has_aux=True)(params, fixed, batch, keys)

        parts = config.train.grad_accum_steps
        gradient, means, each = _accumulated(gradient_of, params, batch, keys, parts)
        return *reduce((gradient, means)), gather(each)

    gradient, metrics, each = view(compute)(state.params, state.fixed, batch, keys)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decays = zip(
        state.ema, ema_decays(config.ema, state.step + 1, config.train.batch_size), strict=True
    )
    ema = tuple(
        params if decay is None else optax.incremental_update(params, old, 1 - decay)
        for old, decay in decays
    )
    metrics["gradient_norm"] = _norm(gradient)
    fixed = task.update(state.fixed, each["statistics"])
    new = TrainState(state.step + 1, params, fixed, opt_state, ema)
    if config.train.max_consecutive_nonfinite_steps:
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
        "--config.train.grad_accum_steps: this experiment's loss compares the examples of a batch "
        "with each other, so a batch cannot be taken in parts; use a smaller "
        "--config.train.batch_size"
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
