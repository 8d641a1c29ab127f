"""Samplers of the training times t: uniform, stratified, and importance sampling.

A `TimeSampler` returns a time and a weight for every example. The loss of the example is
multiplied by the weight, so that the mean loss of a batch is an unbiased estimate of the mean loss
over uniform t.
"""

import dataclasses
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.diffusion.grids import stratum_time


def uniform_times(
    keys: Key[Array, "batch"], index: Int[Array, "batch"], size: int
) -> Float[Array, "batch"]:
    """Return an independent time t ~ U(0, 1) for each key; `index` and `size` are not used."""
    del index, size
    return jax.vmap(jax.random.uniform)(keys)


def stratified_times(
    keys: Key[Array, "batch"], index: Int[Array, "batch"], size: int
) -> Float[Array, "batch"]:
    """Return t_i = (i + u_i) / size, one time in each of `size` equal parts of [0, 1).

    i is the `index` of an example, and u_i ~ U(0, 1). This replaces VDM's antithetic sampling,
    which has the same u for all examples (Kingma et al. 2021, app. I.1). Independent u_i allow a
    batch to be partitioned across devices.
    """
    return stratum_time(index, jax.vmap(jax.random.uniform)(keys), size)


class LossHistory(NamedTuple):
    """The last losses in each of `bins` equal parts of [0, 1), for `importance_times`.

    Attributes:
      losses: The last losses of each bin, in a circular buffer.
      counts: The number of losses that have been added to each bin since the start of training.
    """

    losses: Float[Array, "bins capacity"]
    counts: Int[Array, "bins"]


def empty_history(bins: int, capacity: int = 10) -> LossHistory:
    """Return an empty history, with space for the last `capacity` losses of each bin."""
    return LossHistory(jnp.zeros((bins, capacity)), jnp.zeros(bins, jnp.int32))


def importance_times(
    history: LossHistory, keys: Key[Array, "batch"]
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
    """Sample a time for each key, with a higher probability where losses are large.

    A time is in bin i with probability p_i ~ sqrt(mean squared loss of bin i) (Nichol & Dhariwal
    2021, eq. 18), mixed with 0.1 % of a uniform distribution. Until the history contains the
    maximum number of losses in every bin, p is uniform.

    Returns:
      The times, and the weights 1 / (p_i bins), with which the weighted loss is unbiased.
    """
    bins, capacity = history.losses.shape
    root = jnp.sqrt(jnp.mean(jnp.square(history.losses), -1))
    full = jnp.all(history.counts >= capacity)
    p = jnp.where(full, root / jnp.maximum(root.sum(), 1e-30), 1 / bins)
    p = 0.999 * p + 0.001 / bins

    def sample_time(key: Key[Array, ""]) -> tuple[Array, Array]:
        bin_key, offset_key = jax.random.split(key)
        index = jax.random.categorical(bin_key, jnp.log(p))
        return stratum_time(index, jax.random.uniform(offset_key), bins), 1 / (p[index] * bins)

    return jax.vmap(sample_time)(keys)


def add_losses(
    history: LossHistory, times: Float[Array, "batch"], losses: Float[Array, "batch"]
) -> LossHistory:
    """Return the history after the unweighted losses of a batch replace the oldest losses."""
    bins, capacity = history.losses.shape

    def add(history: LossHistory, pair: tuple[Array, Array]) -> tuple[LossHistory, None]:
        time, loss = pair
        row = jnp.clip((time * bins).astype(jnp.int32), 0, bins - 1)
        column = history.counts[row] % capacity
        return LossHistory(
            history.losses.at[row, column].set(loss), history.counts.at[row].add(1)
        ), None

    after: LossHistory = jax.lax.scan(add, history, (times, losses))[0]
    return after


@runtime_checkable
class TimeSampler(Protocol):
    """A sampler of training times, whose state is created by `init` and changed by `update`."""

    def init(self, steps: int | None) -> PyTree:
        """Return the state before the first training step.

        Args:
          steps: The number of steps T of a discrete noise schedule; None for a continuous one.
        """
        del steps
        return {}

    def sample(
        self, state: PyTree, keys: Key[Array, "batch"], index: Int[Array, "batch"], batch_size: int
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """Return the time t in [0, 1) of every example, and the weight of its loss.

        Args:
          state: The state of the time sampler.
          keys: One random key for each example, [B].
          index: The index of each example in the order of training, [B].
          batch_size: The number of examples of the batch on all devices together.
        """

    def statistics(self, t: Float[Array, "batch"], losses: Float[Array, "batch"]) -> PyTree:
        """Return arrays for `update`, computed from the times and unweighted losses of a batch."""
        del t, losses
        return {}

    def update(self, state: PyTree, statistics: PyTree) -> PyTree:
        """Return the state of the time sampler after a training step.

        Args:
          state: The state of the time sampler before the training step.
          statistics: The result of the method `statistics` for the global batch of all devices.
        """
        del statistics
        return state


@dataclasses.dataclass(frozen=True)
class UniformTimes(TimeSampler):
    """Independent times t ~ U(0, 1)."""

    def sample(
        self, state: PyTree, keys: Key[Array, "batch"], index: Int[Array, "batch"], batch_size: int
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """Return independent uniform times, [B], and the weights 1, [B].

        Args:
          state: Not used.
          keys: One random key for each example, [B].
          index: Not used.
          batch_size: Not used.
        """
        del state
        return uniform_times(keys, index, batch_size), jnp.ones(len(keys))


@dataclasses.dataclass(frozen=True)
class StratifiedTimes(TimeSampler):
    """Times in equal parts of [0, 1), with one part for each example of a batch."""

    def sample(
        self, state: PyTree, keys: Key[Array, "batch"], index: Int[Array, "batch"], batch_size: int
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """Return stratified times, [B], and the weights 1, [B]; see `stratified_times`.

        Args:
          state: Not used.
          keys: One random key for each example, [B].
          index: The index of each example in the order of training, [B].
          batch_size: The number of examples of the batch on all devices together.
        """
        del state
        return stratified_times(keys, index % batch_size, batch_size), jnp.ones(len(keys))


@dataclasses.dataclass(frozen=True)
class ImportanceTimes(TimeSampler):
    """Times with a higher probability at the steps of the noise schedule where losses are large."""

    def init(self, steps: int | None) -> PyTree:
        """Return an empty history with one bin for each of the `steps` steps.

        Raises:
          ValueError: If `steps` is None, because the noise schedule is continuous.
        """
        if steps is None:
            raise ValueError(
                "importance sampling of times requires a discrete noise schedule; use the schedule "
                "linear_betas or cosine_betas, or the times uniform or stratified"
            )
        return {"history": empty_history(steps)}

    def sample(
        self, state: PyTree, keys: Key[Array, "batch"], index: Int[Array, "batch"], batch_size: int
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """Return importance-sampled times and the weights of their losses; see `importance_times`.

        Args:
          state: The history of losses, from `init` or `update`.
          keys: One random key for each example, [B].
          index: Not used.
          batch_size: Not used.
        """
        del index, batch_size
        return importance_times(state["history"], keys)

    def statistics(self, t: Float[Array, "batch"], losses: Float[Array, "batch"]) -> PyTree:
        """Return the times and the unweighted losses of a batch as a dict."""
        return {"t": t, "losses": losses}

    def update(self, state: PyTree, statistics: PyTree) -> PyTree:
        """Return the history after the losses of a batch replace the oldest losses."""
        return {"history": add_losses(state["history"], statistics["t"], statistics["losses"])}


Times = Literal["uniform", "stratified", "importance"]

TIMES: dict[Times, TimeSampler] = {
    "uniform": UniformTimes(),
    "stratified": StratifiedTimes(),
    "importance": ImportanceTimes(),
}
