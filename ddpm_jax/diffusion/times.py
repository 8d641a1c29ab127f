"""Samplers of the training times t: uniform, stratified, and importance sampling.

A `TimeSampler` returns a time for every example, and a weight by which its loss is multiplied.
The weights make the mean loss of a batch an unbiased estimate of the mean over uniform t.
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
    """Return independent times t ~ U(0, 1); `index` and `size` are not used."""
    del index, size
    return jax.vmap(jax.random.uniform)(keys)


def stratified_times(
    keys: Key[Array, "batch"], index: Int[Array, "batch"], size: int
) -> Float[Array, "batch"]:
    """Return t_i = (i + u_i) / size < 1 with u_i ~ U(0, 1): one time in each part of [0, 1).

    This replaces VDM's antithetic sampling, which has the same u for all examples (Kingma et al.
    2021, app. I.1). Independent u_i allow a batch to be partitioned across devices.
    """
    return stratum_time(index, jax.vmap(jax.random.uniform)(keys), size)


class LossHistory(NamedTuple):
    """The last losses at each of `bins` times, for `importance_times`.

    Attributes:
      losses: The last losses of each bin, in a circular buffer.
      counts: The number of losses that each bin has received.
    """

    losses: Float[Array, "bins capacity"]
    counts: Int[Array, "bins"]


def empty_history(bins: int, capacity: int = 10) -> LossHistory:
    """Return a history without losses, which stores the last `capacity` losses of each bin."""
    return LossHistory(jnp.zeros((bins, capacity)), jnp.zeros(bins, jnp.int32))


def importance_times(
    history: LossHistory, keys: Key[Array, "batch"]
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
    """Return times that are more frequent where losses are large, and their weights.

    A time is in bin i with probability p_i ~ sqrt(mean of the bin's squared losses) (Nichol &
    Dhariwal 2021, eq. 18), mixed with 0.1 % of a uniform distribution. Until every bin has a full
    history, p is uniform. The weight 1 / (p_i bins) makes the weighted loss unbiased.
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
    """Add the unweighted losses of a batch to a history; they replace the oldest ones."""
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
    """A sampler of training times; its state is an argument and a result of its methods."""

    def init(self, steps: int | None) -> PyTree:
        """Return the state before the first step.

        Args:
          steps: The number of steps of the schedule's table; None if the schedule is continuous.
        """
        del steps
        return {}

    def sample(
        self, state: PyTree, keys: Key[Array, "batch"], index: Int[Array, "batch"], batch_size: int
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """Return the time t in [0, 1) of every example, and the weight of its loss.

        Args:
          state: The state of the time sampler.
          keys: A key for every example.
          index: The position of every example in the order of training.
          batch_size: The number of examples of the batch over all devices.
        """

    def statistics(self, t: Float[Array, "batch"], losses: Float[Array, "batch"]) -> PyTree:
        """Return the statistics that `update` needs of a batch with unweighted losses."""
        del t, losses
        return {}

    def update(self, state: PyTree, statistics: PyTree) -> PyTree:
        """Return the state after a step, given the statistics of the batch over all devices."""
        del statistics
        return state


@dataclasses.dataclass(frozen=True)
class UniformTimes(TimeSampler):
    """Independent times t ~ U(0, 1)."""

    def sample(
        self, state: PyTree, keys: Key[Array, "batch"], index: Int[Array, "batch"], batch_size: int
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """Return uniform times with weight 1.

        Args:
          state: The state of the sampler of times.
          keys: One key for each example, [B].
          index: The index of each example in the global batch, [B].
          batch_size: The number of examples of the global batch.
        """
        del state
        return uniform_times(keys, index, batch_size), jnp.ones(len(keys))


@dataclasses.dataclass(frozen=True)
class StratifiedTimes(TimeSampler):
    """Times in equal parts of [0, 1), one part per example of a batch; see `stratified_times`."""

    def sample(
        self, state: PyTree, keys: Key[Array, "batch"], index: Int[Array, "batch"], batch_size: int
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """Return stratified times with weight 1.

        Args:
          state: The state of the sampler of times.
          keys: One key for each example, [B].
          index: The index of each example in the global batch, [B].
          batch_size: The number of examples of the global batch.
        """
        del state
        return stratified_times(keys, index % batch_size, batch_size), jnp.ones(len(keys))


@dataclasses.dataclass(frozen=True)
class ImportanceTimes(TimeSampler):
    """Importance-sampled times, with a history of the losses of every step of the table.

    See `importance_times`.
    """

    def init(self, steps: int | None) -> PyTree:
        """Return an empty history.

        Raises:
          ValueError: If the schedule is continuous.
        """
        if steps is None:
            raise ValueError(
                "importance sampling of times requires a table of betas; use the schedule "
                "linear_betas or cosine_betas, or the times uniform or stratified"
            )
        return {"history": empty_history(steps)}

    def sample(
        self, state: PyTree, keys: Key[Array, "batch"], index: Int[Array, "batch"], batch_size: int
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """Return importance-sampled times and their weights.

        Args:
          state: The state of the sampler of times.
          keys: One key for each example, [B].
          index: The index of each example in the global batch, [B].
          batch_size: The number of examples of the global batch.
        """
        del index, batch_size
        return importance_times(state["history"], keys)

    def statistics(self, t: Float[Array, "batch"], losses: Float[Array, "batch"]) -> PyTree:
        """Return the times and the losses of a batch."""
        return {"t": t, "losses": losses}

    def update(self, state: PyTree, statistics: PyTree) -> PyTree:
        """Return the history with the losses of a batch."""
        return {"history": add_losses(state["history"], statistics["t"], statistics["losses"])}


Times = Literal["uniform", "stratified", "importance"]

TIMES: dict[Times, TimeSampler] = {
    "uniform": UniformTimes(),
    "stratified": StratifiedTimes(),
    "importance": ImportanceTimes(),
}
