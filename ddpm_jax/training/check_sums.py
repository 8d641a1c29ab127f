"""Check that a checkpoint is what was written: its record and its check sums."""

import json
import zlib
from collections.abc import Mapping
from typing import TypedDict, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


class CheckSums(TypedDict):
    """A number for every array, or None of one that was not read; and one for the record."""

    arrays: list[int | None]
    host: int


def check_sums(state: PyTree, host: Mapping[str, object]) -> CheckSums:
    """Return a number for every array, the same however it lies on devices, and one for the record.

    sum of (2 i + 1) word_i modulo 2^32: any one word changed changes it.  None of what is `...`.
    """
    text = json.dumps(host, sort_keys=True).encode()
    # One is waited for before the next begins: processes that sum their shards of several arrays at
    # once wait for each other forever where collectives are not ordered (gloo's, on CPUs).
    arrays = jax.tree.leaves(state)
    sums = [None if array is ... else _sum(array) for array in arrays]
    return {"arrays": sums, "host": zlib.crc32(text)}


def agree(known: CheckSums, computed: CheckSums) -> bool:
    """Return whether the check sums of what was read are those that were written."""
    ours, theirs = computed["arrays"], known["arrays"]
    if len(ours) != len(theirs) or computed["host"] != known["host"]:
        return False
    return all(a is None or a == b for a, b in zip(ours, theirs, strict=True))


def check_record(host: Mapping[str, object], sums: object) -> CheckSums | None:
    """Return the check sums, or None where there are none, once their form is checked.

    Raises:
      ValueError: they, or the host's record, are not of the form that is written.
    """
    window, skipped = host.get("window", {}), host.get("skipped", 0)
    good = isinstance(window, dict) and all(type(v) in (int, float) for v in window.values())
    if sums is not None:
        arrays = sums.get("arrays") if isinstance(sums, dict) else None
        good = good and isinstance(arrays, list) and isinstance(sums, dict) and "host" in sums
    if not good or type(skipped) is not int:
        raise ValueError("its record is of another form")
    return cast(CheckSums | None, sums)


def _sum(array: jax.Array) -> int:
    return int(sum_on_host(array) if _is_here(array) else sum_on_devices(array))


def _is_here(array: jax.Array) -> bool:
    """Return whether numpy can read it where it lies."""
    return array.is_fully_addressable and all(d.platform == "cpu" for d in array.devices())


def sum_on_host(array: jax.Array) -> np.uint32:
    """Return `sum_on_devices` by numpy, for which nothing is compiled."""
    words = np.asarray(array).reshape(-1)
    words = words.view(f"u{min(words.dtype.itemsize, 4)}").astype(np.uint32)
    return cast(np.uint32, words @ np.arange(1, 2 * words.size, 2, dtype=np.uint32))


@jax.jit  # so compiled once for each shape, of which a state has few
def sum_on_devices(array: jax.Array) -> jax.Array:
    """Return the sum of (2 i + 1) word_i modulo 2^32."""
    words = array
    if array.dtype == bool:
        words = array.astype(jnp.uint8)
    else:  # numbers of 8 bytes become two words of 4
        sizes = {1: jnp.uint8, 2: jnp.uint16}
        words = jax.lax.bitcast_convert_type(array, sizes.get(array.dtype.itemsize, jnp.uint32))
    place = jnp.zeros((), jnp.uint32)
    for axis, length in enumerate(words.shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)
