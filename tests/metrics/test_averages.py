"""Averages over splits, importance weights, pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import plots
from ddpm_jax.data.types import Split
from ddpm_jax.metrics.averages import average
from ddpm_jax.metrics.per_example import per_example
from ddpm_jax.parallel.sharding import make
from ddpm_jax.tasks.vae import importance_weighted
from ddpm_jax.variational import likelihoods as likelihood
from ddpm_jax.variational import vae


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


def test_importance_weighted_figures_are_the_bounds_of_disjoint_groups():
    weights = np.random.default_rng(0).normal(-90, 3, (20, 1000))
    found = importance_weighted(weights)
    assert found["neg_iwae_1"] == pytest.approx(-weights.mean())
    groups = weights[:, :960].reshape(20, 15, 64)
    bound = jax.vmap(jax.vmap(vae.iwae_bound))(jnp.asarray(groups)).mean()
    assert found["neg_iwae_64"] == pytest.approx(-float(bound), rel=1e-5)
    whole = jax.vmap(vae.iwae_bound)(jnp.asarray(weights)).mean()
    assert found["neg_iwae_1000"] == pytest.approx(-float(whole), rel=1e-5)
    gap = found["neg_iwae_1"] - found["neg_iwae_1000"]
    assert found["gap"] == pytest.approx(gap)
    assert found["gap"] > 0


def test_a_grid_shows_every_image_in_its_place():
    images = np.linspace(-1, 1, 6).reshape(6, 1, 1, 1) * np.ones((1, 4, 4, 1))
    sheet = plots.grid(images, columns=3, side=4)
    assert sheet.shape == (2 * 6 + 2, 3 * 6 + 2, 1)
    found = [sheet[4 + 6 * (i // 3), 4 + 6 * (i % 3), 0] for i in range(6)]
    assert found == list(np.round(np.linspace(0, 255, 6)).astype(np.uint8))


@pytest.mark.parametrize("levels", [17, 256])
def test_binarised_pixels_are_one_as_often_as_they_are_bright(levels):
    image = jnp.arange(levels, dtype=jnp.uint8)[:, None, None]  # an odd number of pixels, too
    keys = jax.random.split(jax.random.key(0), 20_000)
    bits = jax.vmap(likelihood.bernoulli(levels).observe, (0, None))(keys, image)
    share = np.arange(levels) / (levels - 1)
    error = np.sqrt(share * (1 - share) / len(keys)) + 1e-9
    assert set(np.unique(bits)) == {0.0, 1.0}
    assert (np.abs(np.asarray(bits.mean(0)).ravel() - share) < 5 * error).all()


def test_a_gaussians_bits_per_dim_bound_the_entropy_of_the_grey_values():
    """Of uniform grey values a code takes log2(levels) bits: no density does better."""
    grey = jnp.asarray(np.random.default_rng(0).integers(0, 17, (4000, 1, 1, 1)), jnp.uint8)
    p_x = likelihood.gaussian(17, None)
    x = jax.vmap(p_x.observe)(jax.random.split(jax.random.key(0), 4000), grey)
    assert float(jnp.abs(x).max()) <= 1
    out = jnp.zeros((1, 1, 1)), jnp.log(jnp.mean(x**2))
    nats = jax.vmap(lambda x: p_x.nll(out, x))(x).mean()
    assert p_x.bits_per_dim(nats, 1) > np.log2(17)
    assert p_x.bits_per_dim(nats, 1) < np.log2(17) + 0.3
