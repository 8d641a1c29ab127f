"""The training state and the training step, a pure function of state and batch."""

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

GLOBAL_VIEW = GlobalCollectives()  # XLA inserts the communication between devices

GradientOfPart = Callable[
    [PyTree, Batch, Array], tuple[PyTree, dict[str, Array], dict[str, PyTree]]
]  # (params, batch, keys) -> (gradient, mean metrics, values of each example)


class TrainState(NamedTuple):
    """The state that a training step updates and that a checkpoint stores.

    Attributes:
      step: Number of training steps taken.
      params: The parameters with respect to which the loss is differentiated.
      extra: Extra variables: arrays that are not trained by gradients (frozen networks, moving
        averages of statistics).
      opt_state: The state of the optimizer.
      ema: The averages of the parameters, in the order of `EMA.names`; None for a half-life of 0,
        which is not averaged.
    """

    step: Array
    params: PyTree
    extra: PyTree
    opt_state: PyTree
    ema: tuple[PyTree | None, ...]


def evaluated_params(state: TrainState, config: Settings) -> PyTree:
    """Return the averaged parameters that `config.ema` selects for evaluation and sampling."""
    index = config.ema.index
    return state.ema[index] if config.ema.is_average[index] else state.params


def inference_state(
    state: TrainState, config: Settings, placeholder: EllipsisType | None
) -> TrainState:
    """Replace the arrays of a state that only training reads by a placeholder.

    Args:
      state: The training state.
      config: The config, whose section `ema` selects the average of the parameters that evaluation
        and sampling read.
      placeholder: The value in place of every array that is not read: `...` or None.
    """

    def replaced(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda _: placeholder, tree)

    selected = config.ema.index
    params = replaced(state.params) if config.ema.is_average[selected] else state.params
    ema = tuple(tree if i == selected else replaced(tree) for i, tree in enumerate(state.ema))
    return state._replace(params=params, opt_state=replaced(state.opt_state), ema=ema)


def init_state(task: Task, config: Settings, batch: Batch, seed: int) -> TrainState:
    """Return the training state before the first training step.

    Args:
      task: The task that is trained.
      config: The sections of the config that training reads.
      batch: Training examples for `Task.init`.
      seed: The seed of all random numbers.
    """
    init = jax.jit(initializer(task, config, seed))  # faster than separate operations
    return cast(TrainState, init(batch))


def initializer(task: Task, config: Settings, seed: int) -> Callable[[Batch], TrainState]:
    """Return a function from training examples to the state before the first training step.

    The caller compiles the function. `init_state` describes the arguments.
    """

    def init(batch: Batch) -> TrainState:
        params, extra = task.init(purpose_key(seed, INIT), batch)
        opt_state = make_optimizer(config.optimizer, config.train.steps).init(params)
        # The averages are copies, because a training step donates each array of the state once.
        ema = tuple(
            jax.tree.map(jnp.copy, params) if is_average else None
            for is_average in config.ema.is_average
        )
        return TrainState(jnp.zeros((), jnp.int32), params, extra, opt_state, ema)

    return init


def state_shapes(task: Task, config: Settings, shape: tuple[int, ...]) -> TrainState:
    """Return a training state with `jax.ShapeDtypeStruct` in place of arrays.

    `shape` is the shape (H, W, C) of an image of the data set.
    """
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
    collectives: Collectives = GLOBAL_VIEW,
) -> tuple[TrainState, dict[str, Array]]:
    """Take one training step: loss -> gradient -> mean over devices -> optimizer -> averages.

    Args:
      task: The task that is trained.
      config: The sections of the config that training reads.
      seed: The seed of all random numbers.
      state: The state before the training step.
      batch: The batch, or the part of the batch on this device if the step runs once per device.
        `batch.index` contains the index of each example in the full batch.
      collectives: The collective operations by which the devices exchange arrays.

    Returns:
      The next state and a dictionary of metrics: means [] over the full batch, and "finite", bool
      [B], which is True for each example whose loss is finite.
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
    """Return (gradient, mean metrics, values of each example) of a batch; runs on each device.

    `batch` is the part of the batch on this device, and `parts` is the number of parts of gradient
    accumulation. The values of each example are "finite" (whether the loss is finite, bool [B]) and
    "statistics" (for `Task.update_extra`). The results are the same on all devices.
    """
    all_gather = collectives.all_gather if parts == 1 else _all_gather_in_parts
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
    """Return (mean loss, (mean of each metric, values of each example)) of a batch."""
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
    """Return (gradient, means of loss and metrics, values of each example) of a part of a batch."""
    (loss, (means, examples)), gradient = value_and_grad(params, extra, batch, keys)
    return gradient, {"loss": loss, **means}, examples


def _accumulated(
    gradient_of: GradientOfPart,
    params: PyTree,
    batch: Batch,
    keys: Key[Array, "batch"],
    parts: int,
) -> tuple[PyTree, dict[str, Array], dict[str, PyTree]]:
    """Return (gradient, mean metrics, values of each example), computed in parts of the batch.

    Example i of the batch belongs to part i modulo `parts`, so that every part is partitioned
    across all devices in the same way as the batch. `gradient_of` computes one part.
    """
    if parts == 1:
        return gradient_of(params, batch, keys)

    def divided(a: Array) -> Array:
        return jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1)

    def add(total: PyTree, part: tuple[Batch, Array]) -> tuple[PyTree, PyTree]:
        gradient, means, examples = gradient_of(params, *part)
        return jax.tree.map(jnp.add, total, (gradient, means)), examples

    split = jax.tree.map(divided, (batch, keys))
    shapes = jax.eval_shape(gradient_of, params, *jax.tree.map(lambda a: a[0], split))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes[:2])
    total, examples = jax.lax.scan(add, zeros, split)
    gradient, means = jax.tree.map(lambda a: a / parts, total)
    examples = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:]), examples)
    return gradient, means, examples


def _unless_nonfinite(new: TrainState, old: TrainState, metrics: dict[str, Array]) -> TrainState:
    """Return the new state; if a metric is not finite, the old state with the next step number."""
    is_finite = jnp.all(jnp.array([jnp.isfinite(value) for value in metrics.values()]))
    result: TrainState = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)
    return result._replace(step=old.step + 1)


def _all_gather_in_parts(tree: PyTree) -> PyTree:
    """Raise UserError: a loss that compares examples needs the full batch, not parts of it."""
    raise UserError(
        "--config.train.grad_accum_steps must be 1, because the loss of this experiment compares "
        "the examples of a batch with each other; to save memory, use a smaller "
        "--config.train.batch_size"
    )


def _norm(tree: PyTree) -> Float[Array, ""]:
    """Return the L2 norm of all numbers in a tree of arrays.

    The sum of squares is a dot product, which uses all cores of a CPU. The arrays are not reshaped,
    because reshaping would replicate a sharded array on every device.
    """

    def square(leaf: Array) -> Array:
        axes = tuple(range(leaf.ndim))
        return jax.lax.dot_general(leaf, leaf, ((axes, axes), ((), ())), precision="highest")

    return jnp.sqrt(sum(square(leaf) for leaf in jax.tree.leaves(tree)))


def train_steps(step: Step) -> Step:
    """Return the function call(state, batches, count, collectives=) that takes several steps.

    The batches are arrays [K, B, ...]. The function calls `step` for each of the first `count` <= K
    batches, and returns the next state and metrics [K, ...], of which the first `count` rows are
    valid. Every `count` uses the same compiled program, so the number of steps per call does not
    change any bit of the result.
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
