"""Check sums that detect a damaged checkpoint."""

import json
import zlib
from collections.abc import Mapping
from typing import TypedDict, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


class CheckSums(TypedDict):
    """The check sums of a checkpoint.

    Attributes:
      arrays: The check sum of every array of the state; None for an array that was not read.
      host: The CRC-32 of the host record, the part of the checkpoint that is stored as JSON.
    """

    arrays: list[int | None]
    host: int


def check_sums(state: PyTree, host: Mapping[str, object]) -> CheckSums:
    """Return the check sums of the arrays of a state and of the host record.

    The check sum of an array is sum_i (2 i + 1) word_i modulo 2^32, where word_i are the numbers of
    the array as unsigned words. The sum does not depend on how the array is sharded. The factors
    are odd, so a change of any single word changes the sum.

    Args:
      state: The arrays. If `...` stands in the place of an array, the check sum is None.
      host: The host record, the part of the checkpoint that is stored as JSON.
    """
    text = json.dumps(host, sort_keys=True).encode()
    # `_sum` waits for each result. Collectives of gloo (on CPUs) are not ordered, so processes that
    # sum several sharded arrays at once can deadlock.
    arrays = jax.tree.leaves(state)
    sums = [None if array is ... else _sum(array) for array in arrays]
    return {"arrays": sums, "host": zlib.crc32(text)}


def agree(written: CheckSums, computed: CheckSums) -> bool:
    """Return whether the check sums computed after reading equal the check sums in the file.

    Arrays that were not read, whose computed check sum is None, are not compared.
    """
    arrays, expected = computed["arrays"], written["arrays"]
    if len(arrays) != len(expected) or computed["host"] != written["host"]:
        return False
    return all(a is None or a == b for a, b in zip(arrays, expected, strict=True))


def check_record(host: Mapping[str, object], sums: object) -> CheckSums | None:
    """Check the types of the values in a host record and in the check sums; return the check sums.

    `sums` are the check sums as read from the file; None for a checkpoint without check sums.

    Raises:
      ValueError: If a value has a type that `Checkpoints.save` does not write.
    """
    window, skipped = host.get("window", {}), host.get("skipped", 0)
    good = isinstance(window, dict) and all(type(v) in (int, float) for v in window.values())
    if sums is not None:
        arrays = sums.get("arrays") if isinstance(sums, dict) else None
        good = good and isinstance(arrays, list) and isinstance(sums, dict) and "host" in sums
    if not good or type(skipped) is not int:
        raise ValueError("its JSON part has values of wrong types")
    return cast(CheckSums | None, sums)


def _sum(array: jax.Array) -> int:
    return int(sum_on_host(array) if _in_host_memory(array) else sum_on_devices(array))


def _in_host_memory(array: jax.Array) -> bool:
    """Return whether numpy can read the array without a copy."""
    return array.is_fully_addressable and all(d.platform == "cpu" for d in array.devices())


def sum_on_host(array: jax.Array) -> np.uint32:
    """Return sum_i (2 i + 1) word_i modulo 2^32, as `sum_on_devices` does, but by numpy."""
    words = np.asarray(array).reshape(-1)
    words = words.view(f"u{min(words.dtype.itemsize, 4)}").astype(np.uint32)
    return cast(np.uint32, words @ np.arange(1, 2 * words.size, 2, dtype=np.uint32))


@jax.jit  # compiled once per shape; a state has few different shapes
def sum_on_devices(array: jax.Array) -> jax.Array:
    """Return sum_i (2 i + 1) word_i modulo 2^32, where word_i are the numbers of an array as words.

    A number of 1, 2 or 4 bytes is one unsigned word; a number of 8 bytes is two words of 4 bytes.
    """
    words = array
    if array.dtype == bool:
        words = array.astype(jnp.uint8)
    else:
        sizes = {1: jnp.uint8, 2: jnp.uint16}
        words = jax.lax.bitcast_convert_type(array, sizes.get(array.dtype.itemsize, jnp.uint32))
    index = jnp.zeros((), jnp.uint32)
    for axis, length in enumerate(words.shape):
        index = index * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)
