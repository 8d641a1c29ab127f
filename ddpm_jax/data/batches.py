"""Batches of examples for training and evaluation.

The examples of a training batch depend only on the seed and the training step, so that a resumed
run needs no state of an iterator.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ddpm_jax.data.types import ENDLESS, Batch, Leaf, Split

ALL_ROWS = slice(None)


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order of the examples in one epoch, a permutation of 0 ... size - 1, int64."""
    bits = np.random.Philox(key=[seed % 2**64, epoch])
    return np.random.Generator(bits).permutation(size)


def epoch_order(seed: int, size: int) -> Callable[[int, int], np.ndarray]:
    """Return a function `rows(start, stop)` that looks up the order of the training examples.

    `rows` returns the indices of the examples at positions start ... stop - 1 of the training
    order, int64 [stop - start]. The order of a finite data set is a sequence of epochs, and each
    epoch is a new permutation of all examples. A batch may contain examples of two epochs.

    An endless data set (`size` is `ENDLESS`) is read in the order of its indices, modulo 2^31 - 1,
    and the first index depends on the seed. No example occurs twice in a run. Two runs with
    different seeds that read 200,000 examples each have an example in common with a probability of
    2e-4.
    """
    if size == ENDLESS:
        rng = np.random.Generator(np.random.Philox(key=[seed % 2**64, ENDLESS]))
        first = int(rng.integers(ENDLESS))
        return lambda start, stop: (first + np.arange(start, stop)) % ENDLESS
    orders: dict[int, np.ndarray] = {}

    def rows(start: int, stop: int) -> np.ndarray:
        parts = []
        for epoch in range(start // size, (stop - 1) // size + 1):
            if epoch not in orders:
                while len(orders) > 1:  # at most two epochs are in use at a time
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
    batch_rows: slice = ALL_ROWS,
) -> Iterator[Batch]:
    """Yield the batches of training steps first ... last - 1 for each (first, last) in `plan`.

    Args:
      split: The split to read.
      seed: The seed of the order of the examples.
      batch_size: The number of examples in a batch.
      plan: A pair (first, last) for each call of the compiled program.
      stack: The number of training steps for which the compiled program is compiled. Each yielded
        array then contains the batches of steps first ... first + stack - 1 and has the shape
        [stack, rows, ...]; the program ignores the batches of steps from `last` on. If None, each
        call is one training step, and arrays have the shape [rows, ...].
      batch_rows: The rows of each batch that this process reads.
    """
    rows = epoch_order(seed, len(split.images))
    index = np.arange(batch_size, dtype=np.int32)[batch_rows]
    for first, _ in plan:
        steps = stack or 1
        order = rows(first * batch_size, (first + steps) * batch_size)
        order = order.reshape(steps, batch_size)[:, batch_rows].reshape(-1)
        batch = batch_of(split, order, np.tile(index, steps))
        if stack:
            batch = _stacked(batch, stack)
        yield batch


def _stacked(tree: Leaf, stack: int) -> Leaf:
    """Reshape every array in nested tuples from [stack * rows, ...] to [stack, rows, ...]."""
    if isinstance(tree, tuple):
        return type(tree)(*(_stacked(array, stack) for array in tree))
    return tree if tree is None else tree.reshape(stack, -1, *tree.shape[1:])


def evaluation_batches(
    split: Split, batch_size: int, batch_rows: slice = ALL_ROWS
) -> Iterator[tuple[Batch, int]]:
    """Yield pairs (batch, count); the batches contain every example of a split once, in order.

    All batches have the same size, because the last batch is padded with copies of its first
    example. `count` is the number of examples before the padding. `Batch.index` is the position of
    each example in the split.

    Args:
      split: The split to read.
      batch_size: The number of examples in a batch.
      batch_rows: The rows of each batch that this process reads. `count` refers to the full batch.
    """
    size = len(split.images)
    for start in range(0, size, batch_size):
        count = min(batch_size, size - start)
        order = np.full(batch_size, start)
        order[:count] = np.arange(start, start + count)
        order = order[batch_rows]
        yield batch_of(split, order, order.astype(np.int32)), count


def batch_of(split: Split, rows: np.ndarray, index: np.ndarray) -> Batch:
    """Return the batch of the examples at positions `rows`, with `index` as `Batch.index`."""
    images, labels, captions = split.rows(rows)
    return Batch(images, labels, index, captions)
