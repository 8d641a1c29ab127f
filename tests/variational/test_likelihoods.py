"""Likelihoods of grey values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.variational import likelihoods as likelihood


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
