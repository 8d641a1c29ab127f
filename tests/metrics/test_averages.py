"""Values of every example of a split, and their averages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.types import Split
from ddpm_jax.metrics.averages import average
from ddpm_jax.metrics.per_example import per_example
from ddpm_jax.parallel.sharding import make


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_every_example_is_counted_once_with_the_same_draws_in_any_batch(batch_size):
    split = Split(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.zeros(10, np.int32))

    def fn(batch, keys):
        noise = jax.vmap(jax.random.uniform)(keys)
        return {"value": batch.images[:, 0, 0, 0].astype(jnp.float32), "noise": noise}

    found = per_example(fn, split, batch_size, 0, make())
    assert list(found["value"]) == list(range(10))
    np.testing.assert_array_equal(found["noise"], per_example(fn, split, 7, 0, make())["noise"])
    assert len(np.unique(found["noise"])) == 10


def test_an_average_tells_its_standard_error():
    values = np.random.default_rng(0).normal(3.0, 2.0, 10_000)
    found = average(values)
    assert abs(found.mean - 3) < 4 * found.error
    assert found.error == pytest.approx(2 / 100, rel=0.05)
