"""The times t at which training takes the loss: uniform, stratified, or by importance.

A `TimeSampler` returns a time of every example and its weight, by which losses are multiplied so
that their mean over a batch is unbiased however t is sampled.
"""

import dataclasses
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.diffusion.grids import within


def uniform_times(
    keys: Key[Array, "batch"], index: Int[Array, "batch"], size: int
) -> Float[Array, "batch"]:
    """t ~ U(0, 1), each its own."""
    del index, size
    return jax.vmap(jax.random.uniform)(keys)


def stratified_times(
    keys: Key[Array, "batch"], index: Int[Array, "batch"], size: int
) -> Float[Array, "batch"]:
    """t_i = (i + u_i) / B < 1: each uniform, together evenly spread over the batch.

    It serves as VDM's antithetic sampling does (Kingma et al. 2021, app. I.1, one u for all)
    with a draw of each example's own, so that the batch can lie on many devices.
    """
    return within(index, jax.vmap(jax.random.uniform)(keys), size)


class LossHistory(NamedTuple):
    """The last losses at each of `bins` times, for `importance_times`."""

    losses: Float[Array, "bins kept"]
    counts: Int[Array, "bins"]


def empty_history(bins: int, kept: int = 10) -> LossHistory:
    """Return a history of nothing."""
    return LossHistory(jnp.zeros((bins, kept)), jnp.zeros(bins, jnp.int32))


def importance_times(
    history: LossHistory, keys: Key[Array, "batch"]
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
    """Return (t, weight) with t drawn where losses are large (Nichol & Dhariwal 2021, eq. 18).

    p_i ~ sqrt(mean of the last squared losses), once every bin has as many as it keeps, else
    uniform; 0.1 % is uniform always.  weight = 1 / (p_i bins) keeps the loss unbiased.
    """
    bins, kept = history.losses.shape
    root = jnp.sqrt(jnp.mean(jnp.square(history.losses), -1))
    warm = jnp.all(history.counts >= kept)
    share = jnp.where(warm, root / jnp.maximum(root.sum(), 1e-30), 1 / bins)
    share = 0.999 * share + 0.001 / bins

    def draw(key: Key[Array, ""]) -> tuple[Array, Array]:
        which, where = jax.random.split(key)
        row = jax.random.categorical(which, jnp.log(share))
        return within(row, jax.random.uniform(where), bins), 1 / (share[row] * bins)

    return jax.vmap(draw)(keys)


def record(
    history: LossHistory, times: Float[Array, "batch"], losses: Float[Array, "batch"]
) -> LossHistory:
    """Return the history with a batch's (unweighted) losses in it, the oldest gone."""
    bins, kept = history.losses.shape

    def add(history: LossHistory, pair: tuple[Array, Array]) -> tuple[LossHistory, None]:
        time, loss = pair
        row = jnp.clip((time * bins).astype(jnp.int32), 0, bins - 1)
        place = history.counts[row] % kept
        return LossHistory(
            history.losses.at[row, place].set(loss), history.counts.at[row].add(1)
        ), None

    after: LossHistory = jax.lax.scan(add, history, (times, losses))[0]
    return after


@runtime_checkable
class TimeSampler(Protocol):
    """How training samples t; what it remembers of earlier steps is an argument of its methods."""

    def init(self, steps: int | None) -> PyTree:
        """Return what is remembered before the first step.

        Args:
          steps: of the schedule's table; None: it is continuous.
        """
        del steps
        return {}

    def sample(
        self, memory: PyTree, keys: Key[Array, "batch"], index: Int[Array, "batch"], batch_size: int
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """Return the time of every example, and the weight of its loss.

        Args:
          memory: what is remembered.
          keys: one for every example.
          index: number of every example in the order of training.
          batch_size: examples of a whole batch.
        """

    def statistics(self, t: Float[Array, "batch"], losses: Float[Array, "batch"]) -> PyTree:
        """Return what `update` needs of a batch: its times and its losses without weights."""
        del t, losses
        return {}

    def update(self, memory: PyTree, statistics: PyTree) -> PyTree:
        """Return what is remembered after a step, of the whole batch's statistics."""
        del statistics
        return memory


@dataclasses.dataclass(frozen=True)
class UniformTimes(TimeSampler):
    """t ~ U(0, 1), each independently."""

    def sample(
        self, memory: PyTree, keys: Key[Array, "batch"], index: Int[Array, "batch"], batch_size: int
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """Return uniform times, of weight 1.

        Args:
          memory, keys, index, batch_size: see `TimeSampler.sample`.
        """
        del memory
        return uniform_times(keys, index, batch_size), jnp.ones(len(keys))


@dataclasses.dataclass(frozen=True)
class StratifiedTimes(TimeSampler):
    """t in equal parts of [0, 1), one part for each example of a batch; see `stratified_times`."""

    def sample(
        self, memory: PyTree, keys: Key[Array, "batch"], index: Int[Array, "batch"], batch_size: int
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """Return stratified times, of weight 1.

        Args:
          memory, keys, index, batch_size: see `TimeSampler.sample`.
        """
        del memory
        return stratified_times(keys, index % batch_size, batch_size), jnp.ones(len(keys))


@dataclasses.dataclass(frozen=True)
class ImportanceTimes(TimeSampler):
    """t where losses are large, with a history of losses for every step; see `importance_times`."""

    def init(self, steps: int | None) -> PyTree:
        """Return an empty history.

        Raises:
          ValueError: the schedule is continuous.
        """
        if steps is None:
            raise ValueError("times by importance need a schedule with a table of betas")
        return {"history": empty_history(steps)}

    def sample(
        self, memory: PyTree, keys: Key[Array, "batch"], index: Int[Array, "batch"], batch_size: int
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
        """Return times by importance, and the weights that keep the loss unbiased.

        Args:
          memory, keys, index, batch_size: see `TimeSampler.sample`.
        """
        del index, batch_size
        return importance_times(memory["history"], keys)

    def statistics(self, t: Float[Array, "batch"], losses: Float[Array, "batch"]) -> PyTree:
        """Return the times and the losses."""
        return {"t": t, "losses": losses}

    def update(self, memory: PyTree, statistics: PyTree) -> PyTree:
        """Return the history with a batch's losses in it."""
        return {"history": record(memory["history"], statistics["t"], statistics["losses"])}


Times = Literal["uniform", "stratified", "importance"]

TIMES: dict[Times, TimeSampler] = {
    "uniform": UniformTimes(),
    "stratified": StratifiedTimes(),
    "importance": ImportanceTimes(),
}
