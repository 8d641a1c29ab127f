"""The batch of any step, a function of (seed, step)."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ddpm_jax.data.types import ENDLESS, Batch, Leaf, Split

ALL = slice(None)

# Order: a function of (seed, step) alone, so that resuming needs no iterator state.


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order of epoch `epoch`: int64 [size]."""
    bits = np.random.Philox(key=[seed % 2**64, epoch])
    return np.random.Generator(bits).permutation(size)


def epoch_order(seed: int, size: int) -> Callable[[int, int], np.ndarray]:
    """Return rows(start, stop): which examples stand at places start ... stop - 1.

    Epoch after epoch is laid end to end, each a permutation of its own, so every epoch
    shows every example once and a batch may straddle two epochs.

    Of an endless set the examples stand in their own order, from a first one that the seed draws
    among all 2^31 - 1: no example is shown twice, and two runs of 200,000 examples whose seeds
    differ share any with a probability of 2e-4.
    """
    if size == ENDLESS:
        draws = np.random.Generator(np.random.Philox(key=[seed % 2**64, ENDLESS]))
        first = int(draws.integers(ENDLESS))
        return lambda start, stop: (first + np.arange(start, stop)) % ENDLESS
    orders: dict[int, np.ndarray] = {}

    def rows(start: int, stop: int) -> np.ndarray:
        parts = []
        for epoch in range(start // size, (stop - 1) // size + 1):
            if epoch not in orders:
                while len(orders) > 1:  # two epochs at most are ever in use
                    orders.pop(min(orders))
                orders[epoch] = permutation(seed, epoch, size)
            low, high = start - epoch * size, stop - epoch * size
            parts.append(orders[epoch][max(low, 0) : min(high, size)])
        return np.concatenate(parts)

    return rows


def training_batches(
    split: Split,
    seed: int,
    batch_size: int,
    plan: Iterable[tuple[int, int]],
    stack: int | None,
    mine: slice = ALL,
) -> Iterator[Batch]:
    """Yield the batches of steps [first, last) for every (first, last) of `plan`.

    Args:
      split: The examples.
      seed: The seed of the order.
      batch_size: Examples of a batch.
      plan: The steps of each call.
      stack: Batches along a leading axis, [stack, batch_size, ...]; those from `last` on are only
        there to fill it. None: every call is one step.
      mine: The rows that are read of each batch.
    """
    rows = epoch_order(seed, len(split.images))
    index = np.arange(batch_size, dtype=np.int32)[mine]
    for first, _ in plan:
        steps = stack or 1
        order = rows(first * batch_size, (first + steps) * batch_size)
        order = order.reshape(steps, batch_size)[:, mine].reshape(-1)
        batch = batch_of(split, order, np.tile(index, steps))
        if stack:
            batch = _stacked(batch, stack)
        yield batch


def _stacked(tree: Leaf, stack: int) -> Leaf:
    """Stack `stack` batches along a new axis of every array, within whatever tuples."""
    if isinstance(tree, tuple):
        return type(tree)(*(_stacked(array, stack) for array in tree))
    return tree if tree is None else tree.reshape(stack, -1, *tree.shape[1:])


def evaluation_batches(
    split: Split, batch_size: int, mine: slice = ALL
) -> Iterator[tuple[Batch, int]]:
    """Yield every example once, in order: (batch, how many of the whole of it count).

    The last batch is filled up with its first example, so that one shape serves all; the
    index is the example's place in the split.  Of each batch the rows `mine` are read.
    """
    size = len(split.images)
    for start in range(0, size, batch_size):
        count = min(batch_size, size - start)
        order = np.full(batch_size, start)
        order[:count] = np.arange(start, start + count)
        order = order[mine]
        yield batch_of(split, order, order.astype(np.int32)), count


def batch_of(split: Split, rows: np.ndarray, index: np.ndarray) -> Batch:
    """Return the examples at `rows` of a split."""
    images, labels, captions = split.rows(rows)
    return Batch(images, labels, index, captions)
