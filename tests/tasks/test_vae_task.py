"""What the VAE's task makes of importance weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.tasks.vae import importance_weighted
from ddpm_jax.variational import vae


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
