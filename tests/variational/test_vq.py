"""Vector quantisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.variational import vq


def test_the_nearest_code_is_the_nearest(x64):
    z = jax.random.normal(jax.random.key(0), (5, 3, 4))
    codes = jax.random.normal(jax.random.key(1), (7, 4))
    distances = np.linalg.norm(np.asarray(z)[..., None, :] - np.asarray(codes), axis=-1)
    np.testing.assert_array_equal(vq.nearest(z, codes), distances.argmin(-1))


def test_the_gradient_goes_straight_through():
    z, codes = jnp.array([0.2, 0.9]), jnp.array([[0.0, 0.0], [1.0, 1.0]])

    def loss(z, codes):
        quantised = codes[vq.nearest(z, codes)]
        return jnp.sum(jnp.array([2.0, 3.0]) * vq.straight_through(z, quantised))

    value, (of_z, of_codes) = jax.value_and_grad(loss, (0, 1))(z, codes)
    assert value == pytest.approx(5.0)  # of the quantised one
    np.testing.assert_array_equal(of_z, [2.0, 3.0])
    np.testing.assert_array_equal(of_codes, jnp.zeros((2, 2)))


def test_commitment_pulls_the_latent_and_not_the_code():
    grad = jax.grad(lambda z, e: vq.commitment(z, e), (0, 1))
    of_z, of_e = grad(jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0]))
    np.testing.assert_allclose(of_z, [1.0, 2.0])
    np.testing.assert_array_equal(of_e, [0.0, 0.0])


def test_codes_become_the_means_of_what_falls_to_them():
    centres = jnp.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    book = vq.codebook(centres + 2 * jax.random.normal(jax.random.key(0), (4, 2)))

    @jax.jit
    def update(book, key):
        noise = jax.random.normal(key, (64, 2))
        return vq.update(book, centres[jnp.arange(64) % 4] + 0.1 * noise, keep=0.95)

    for step in range(600):
        book = update(book, jax.random.key(step))
    found = np.asarray(sorted(map(tuple, np.asarray(book.codes).round().tolist())))
    np.testing.assert_array_equal(found, [(0, 0), (0, 10), (10, 0), (10, 10)])
    assert float(vq.perplexity(book.sizes)) == pytest.approx(4, abs=0.1)


def test_codes_that_are_not_used_start_anew_all_over_the_images():
    rows, columns = np.mgrid[:8, :8].reshape(2, -1)
    places = np.tile(np.stack([rows, columns], 1), (16, 1)).astype(np.float32)  # of 16 images
    for count in (16, 64, 256):
        far = jnp.full((count, 2), 1e6)
        found = np.asarray(jax.jit(vq.update)(vq.codebook(far), places).codes)
        for axis in (0, 1):
            assert len(np.unique(found[1:, axis])) == 8  # of code 0, nearest to all, apart


def test_perplexity_counts_codes_that_are_used_alike():
    assert float(vq.perplexity(jnp.array([3.0, 3, 3, 0]))) == pytest.approx(3)
    assert float(vq.perplexity(jnp.zeros(4))) == pytest.approx(1)
