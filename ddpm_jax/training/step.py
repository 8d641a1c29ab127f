"""The state of a training and one step, a pure function of state and batch."""

import functools
from collections.abc import Callable
from types import EllipsisType
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from ddpm_jax.data.types import Batch
from ddpm_jax.errors import UserError
from ddpm_jax.parallel.collectives import Collectives, GlobalCollectives, ValueAndGrad
from ddpm_jax.parallel.partitioner import Step
from ddpm_jax.rng import INIT, TRAIN, example_keys, purpose_key
from ddpm_jax.task import Task, Variables
from ddpm_jax.training.ema import update_averages
from ddpm_jax.training.optimizer import make_optimizer
from ddpm_jax.training.settings import Settings

ONE_VIEW = GlobalCollectives()

GradientOfPart = Callable[
    [PyTree, Batch, Array], tuple[PyTree, dict[str, Array], dict[str, PyTree]]
]  # of (params, batch, keys)


class TrainState(NamedTuple):
    """All that a step reads and writes, and all that a checkpoint holds.

    Attributes:
      step: Steps taken.
      params: The parameters.
      extra: What is carried along but not trained by gradients.
      opt_state: The optimizer's state.
      ema: The parameters' averages, in the order of `EMA.names`; None in the place of one that is
        no average but the parameters themselves.
    """

    step: Array
    params: PyTree
    extra: PyTree
    opt_state: PyTree
    ema: tuple[PyTree | None, ...]


def averaged(state: TrainState, config: Settings) -> PyTree:
    """Return the parameters that are evaluated and sampled from, as `config.ema` chooses."""
    index = config.ema.index
    return state.ema[index] if config.ema.is_average[index] else state.params


def without_training(
    state: TrainState, config: Settings, nothing: EllipsisType | None
) -> TrainState:
    """Return `state` with `nothing` in place of what only training reads: all but one average."""

    def blank(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda _: nothing, tree)

    kept = config.ema.index
    params = blank(state.params) if config.ema.is_average[kept] else state.params
    ema = tuple(tree if number == kept else blank(tree) for number, tree in enumerate(state.ema))
    return state._replace(params=params, opt_state=blank(state.opt_state), ema=ema)


def init_state(task: Task, config: Settings, batch: Batch, seed: int) -> TrainState:
    """Return the state before the first step.

    Args:
      task: the task.
      config: the optimizer's, the averages' and the training's settings.
      batch: training examples for `Task.init`.
      seed: of the run.
    """
    init = jax.jit(initializer(task, config, seed))  # not a hundred small programs
    return cast(TrainState, init(batch))


def initializer(task: Task, config: Settings, seed: int) -> Callable[[Batch], TrainState]:
    """Return `init_state` of a batch, to be compiled."""

    def init(batch: Batch) -> TrainState:
        params, extra = task.init(purpose_key(seed, INIT), batch)
        opt_state = make_optimizer(config.optimizer, config.train.steps).init(params)
        # An average starts as a copy: a step donates both, and not one array twice.
        ema = tuple(
            jax.tree.map(jnp.copy, params) if is_average else None
            for is_average in config.ema.is_average
        )
        return TrainState(jnp.zeros((), jnp.int32), params, extra, opt_state, ema)

    return init


def state_shapes(task: Task, config: Settings, shape: tuple[int, ...]) -> TrainState:
    """Return what `init_state` would make of images of `shape`, as shapes alone."""
    images = np.zeros((2, *shape), np.uint8)
    batch = Batch(images, np.zeros(2, np.int32), np.arange(2))
    return cast(TrainState, jax.eval_shape(initializer(task, config, 0), batch))


def train_step(
    task: Task,
    config: Settings,
    seed: int,
    state: TrainState,
    batch: Batch,
    *,
    collectives: Collectives = ONE_VIEW,
) -> tuple[TrainState, dict[str, Array]]:
    """Take one step: loss -> gradient -> mean -> optimizer -> averages.

    Args:
      task: what is trained.
      config: of the run.
      seed: of the run.
      state: of all devices.
      batch: this device's part of the batch; `batch.index` places it in the whole.
      collectives: communicate with the other devices.

    Returns:
      The next state, and by name the step's means and `finite`, whether each example's loss is.
    """
    keys = example_keys(purpose_key(seed, TRAIN), state.step, batch.index)
    compute = functools.partial(_gradient, task, config.train.grad_accum_steps)
    gradient, metrics, examples = collectives.per_device(
        compute, state.params, state.extra, batch, keys
    )
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = update_averages(config.ema, state.ema, params, state.step + 1, config.train.batch_size)
    metrics["gradient_norm"] = _norm(gradient)
    extra = task.update_extra(state.extra, examples["statistics"])
    new = TrainState(state.step + 1, params, extra, opt_state, ema)
    if config.train.max_consecutive_nonfinite_steps:
        new = _unless_nonfinite(new, state, metrics)
    return new, {**metrics, "finite": examples["finite"]}


def _gradient(
    task: Task,
    parts: int,
    collectives: Collectives,
    params: PyTree,
    extra: PyTree,
    batch: Batch,
    keys: Key[Array, "batch"],
) -> tuple[PyTree, dict[str, Array], dict[str, PyTree]]:
    """Return (gradient, means, what is known of each example), in the view of one device."""
    all_gather = collectives.all_gather if parts == 1 else _refuse_to_compare
    loss = functools.partial(_mean_loss, task, all_gather)
    gradient_of = functools.partial(_gradient_of_part, collectives.value_and_grad(loss), extra)
    gradient, means, examples = _accumulated(gradient_of, params, batch, keys, parts)
    return (
        collectives.mean_gradient(gradient),
        collectives.mean(means),
        collectives.all_gather(examples),
    )


def _mean_loss(
    task: Task,
    all_gather: Callable[[PyTree], PyTree],
    params: PyTree,
    extra: PyTree,
    batch: Batch,
    keys: Key[Array, "batch"],
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict[str, PyTree]]]:
    """Return the mean loss, and (means of the metrics, what is known of each example)."""
    losses, metrics, statistics = task.loss(
        Variables(params, extra), batch, keys, train=True, all_gather=all_gather
    )
    means = {name: values.mean() for name, values in metrics.items()}
    return losses.mean(), (means, {"finite": jnp.isfinite(losses), "statistics": statistics})


def _gradient_of_part(
    value_and_grad: ValueAndGrad,
    extra: PyTree,
    params: PyTree,
    batch: Batch,
    keys: Key[Array, "batch"],
) -> tuple[PyTree, dict[str, Array], dict[str, PyTree]]:
    """Return (gradient, means with the loss, what is known of each example) of a part."""
    (loss, (means, examples)), gradient = value_and_grad(params, extra, batch, keys)
    return gradient, {"loss": loss, **means}, examples


def _accumulated(
    gradient_of: GradientOfPart,
    params: PyTree,
    batch: Batch,
    keys: Key[Array, "batch"],
    parts: int,
) -> tuple[PyTree, dict[str, Array], dict[str, PyTree]]:
    """Return (gradient, means, examples) of a batch that is taken in `parts`, one by one.

    Example i goes to part i mod `parts`, so that every part lies on all devices as the batch does.
    """
    if parts == 1:
        return gradient_of(params, batch, keys)

    def apart(a: Array) -> Array:
        return jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1)

    def add(total: PyTree, part: tuple[Batch, Array]) -> tuple[PyTree, PyTree]:
        gradient, means, examples = gradient_of(params, *part)
        return jax.tree.map(jnp.add, total, (gradient, means)), examples

    split = jax.tree.map(apart, (batch, keys))
    shapes = jax.eval_shape(gradient_of, params, *jax.tree.map(lambda a: a[0], split))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes[:2])
    total, examples = jax.lax.scan(add, zeros, split)
    gradient, means = jax.tree.map(lambda a: a / parts, total)
    together = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:]), examples)
    return gradient, means, together


def _unless_nonfinite(new: TrainState, old: TrainState, metrics: dict[str, Array]) -> TrainState:
    """Return the new state; the old one, at the next step, if a metric is not finite."""
    good = jnp.all(jnp.array([jnp.isfinite(value) for value in metrics.values()]))
    kept: TrainState = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    return kept._replace(step=old.step + 1)


def _refuse_to_compare(tree: PyTree) -> PyTree:
    raise UserError(
        "--config.train.grad_accum_steps: this experiment's loss compares the examples of a batch "
        "with each other, so a batch cannot be taken in parts; use a smaller "
        "--config.train.batch_size"
    )


def _norm(tree: PyTree) -> Float[Array, ""]:
    """Return the global norm, by products, which a CPU sums on all its cores.

    Nothing is reshaped, for which a sharded array would be put together.
    """

    def square(leaf: Array) -> Array:
        axes = tuple(range(leaf.ndim))
        return jax.lax.dot_general(leaf, leaf, ((axes, axes), ((), ())), precision="highest")

    return jnp.sqrt(sum(square(leaf) for leaf in jax.tree.leaves(tree)))


def train_steps(step: Step) -> Step:
    """Return call(state, batches [K, B, ...], count, collectives=): several steps in one dispatch.

    It runs the first `count` <= K of the batches and returns metrics [K, ...] of which as many
    mean something.  One program serves every count, so where the calls are cut changes no
    bit of the result.
    """

    def call(
        state: TrainState, batches: Batch, count: Array, *, collectives: Collectives
    ) -> tuple[TrainState, dict[str, Array]]:
        one_step = functools.partial(step, collectives=collectives)

        def body(i: Array, carry: tuple[TrainState, dict[str, Array]]) -> PyTree:
            state, metrics = carry
            state, new = one_step(state, jax.tree.map(lambda array: array[i], batches))
            return state, {name: metrics[name].at[i].set(new[name]) for name in metrics}

        size = jax.tree.leaves(batches)[0].shape[0]
        shapes = jax.eval_shape(one_step, state, jax.tree.map(lambda array: array[0], batches))[1]
        metrics = {name: jnp.zeros((size, *a.shape), a.dtype) for name, a in shapes.items()}
        result: tuple[TrainState, dict[str, Array]] = jax.lax.fori_loop(
            0, count, body, (state, metrics)
        )
        return result

    return cast(Step, call)
