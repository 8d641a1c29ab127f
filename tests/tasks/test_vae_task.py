"""Tests of the task of a VAE: its samples and its importance-weighted bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.types import Batch, DataInfo
from ddpm_jax.nn.vae import VAENetwork
from ddpm_jax.task import SampleRequest, SamplingTask
from ddpm_jax.tasks.vae import VAE, importance_weighted
from ddpm_jax.variational import vae


def test_importance_weighted_metrics_are_means_over_disjoint_groups():
    weights = np.random.default_rng(0).normal(-90, 3, (20, 1000))
    metrics = importance_weighted(weights)
    assert metrics["neg_iwae_1"] == pytest.approx(-weights.mean())
    groups = weights[:, :960].reshape(20, 15, 64)
    bound = jax.vmap(jax.vmap(vae.iwae_bound))(jnp.asarray(groups)).mean()
    assert metrics["neg_iwae_64"] == pytest.approx(-float(bound), rel=1e-5)
    bound_of_all = jax.vmap(vae.iwae_bound)(jnp.asarray(weights)).mean()
    assert metrics["neg_iwae_1000"] == pytest.approx(-float(bound_of_all), rel=1e-5)
    gap = metrics["neg_iwae_1"] - metrics["neg_iwae_1000"]
    assert metrics["gap"] == pytest.approx(gap)
    assert metrics["gap"] > 0


def test_a_sample_of_the_prior_depends_on_its_key_alone():
    task = VAE(VAENetwork(latents=2, hidden=(4,)))
    task = task.bind(DataInfo("x", (4, 4, 1), 17), "float32", batch_size=8)
    assert isinstance(task, SamplingTask)
    images = np.random.default_rng(0).integers(0, 17, (8, 4, 4, 1)).astype(np.uint8)
    batch = Batch(jnp.asarray(images), jnp.zeros(8, int), jnp.arange(8))
    variables = task.init(jax.random.key(0), batch)
    keys = jax.random.split(jax.random.key(1), 3)
    samples, last = (
        task.sample(variables, keys[first:], SampleRequest(), None, jax.jit) for first in (0, 2)
    )
    assert samples.shape == (3, 4, 4, 1)
    assert np.abs(samples).max() <= 1
    np.testing.assert_allclose(samples[2:], last, atol=1e-6)
    assert np.abs(samples[0] - samples[1]).max() > 0
