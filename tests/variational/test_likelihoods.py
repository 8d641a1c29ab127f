"""Likelihoods of grey values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.variational import likelihoods


@pytest.mark.parametrize("levels", [17, 256])
def test_a_binarised_pixel_is_1_with_the_probability_of_its_grey_value(levels):
    image = jnp.arange(levels, dtype=jnp.uint8)[:, None, None]  # 17: an odd number of pixels
    keys = jax.random.split(jax.random.key(0), 20_000)
    bits = jax.vmap(likelihoods.bernoulli(levels).observe, (0, None))(keys, image)
    share = np.arange(levels) / (levels - 1)
    error = np.sqrt(share * (1 - share) / len(keys)) + 1e-9
    assert set(np.unique(bits)) == {0.0, 1.0}
    assert (np.abs(np.asarray(bits.mean(0)).ravel() - share) < 5 * error).all()


def test_a_gaussians_bits_per_dim_bound_the_entropy_of_the_grey_values():
    """The entropy of uniform grey values is log2(levels) bits, which no density goes below."""
    grey = jnp.asarray(np.random.default_rng(0).integers(0, 17, (4000, 1, 1, 1)), jnp.uint8)
    p_x = likelihoods.gaussian(17, None)
    x = jax.vmap(p_x.observe)(jax.random.split(jax.random.key(0), 4000), grey)
    assert float(jnp.abs(x).max()) <= 1
    out = jnp.zeros((1, 1, 1)), jnp.log(jnp.mean(x**2))
    nats = jax.vmap(lambda x: p_x.nll(out, x))(x).mean()
    assert p_x.bits_per_dim(nats, 1) > np.log2(17)
    assert p_x.bits_per_dim(nats, 1) < np.log2(17) + 0.3
