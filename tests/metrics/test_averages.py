"""Functions of every example of a split, and averages of their results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.types import Split
from ddpm_jax.metrics.averages import average
from ddpm_jax.metrics.per_example import per_example
from ddpm_jax.parallel.sharding import make


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_every_example_counts_once_with_the_same_noise_in_any_batch(batch_size):
    split = Split(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.zeros(10, np.int32))

    def compute(batch, keys):
        noise = jax.vmap(jax.random.uniform)(keys)
        return {"value": batch.images[:, 0, 0, 0].astype(jnp.float32), "noise": noise}

    values = per_example(compute, split, batch_size, 0, make())
    assert list(values["value"]) == list(range(10))
    again = per_example(compute, split, 7, 0, make())
    np.testing.assert_array_equal(values["noise"], again["noise"])
    assert len(np.unique(values["noise"])) == 10


def test_a_static_argument_an_array_and_a_check_reach_every_batch():
    split = Split(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.zeros(10, np.int32))
    traced, checked = [], []

    def compute(power, shift, batch, keys):
        traced.append(power)
        return {"value": batch.images[:, 0, 0, 0].astype(jnp.float32) ** power + shift}

    def compute_all(power, shift):
        check = lambda: checked.append(power)  # noqa: E731
        return per_example(
            compute, split, 4, 0, make(), power, shift, check=check, static_argnums=0
        )["value"]

    np.testing.assert_array_equal(compute_all(2, 0.5), np.arange(10.0) ** 2 + 0.5)
    np.testing.assert_array_equal(compute_all(2, 1.5), np.arange(10.0) ** 2 + 1.5)
    assert traced == [2]  # compiled once
    assert checked == [2, 2, 2, 2]  # two calls of two batches, since 8 devices round 4 up to 8
    compute_all(3, 0.5)
    assert traced == [2, 3]


def test_an_average_reports_its_standard_error():
    values = np.random.default_rng(0).normal(3.0, 2.0, 10_000)
    mean, error = average(values)
    assert abs(mean - 3) < 4 * error
    assert error == pytest.approx(2 / 100, rel=0.05)
