"""Vector quantisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.variational import vq


def test_nearest_returns_the_code_at_the_smallest_distance(x64):
    z = jax.random.normal(jax.random.key(0), (5, 3, 4))
    codes = jax.random.normal(jax.random.key(1), (7, 4))
    distances = np.linalg.norm(np.asarray(z)[..., None, :] - np.asarray(codes), axis=-1)
    np.testing.assert_array_equal(vq.nearest(z, codes), distances.argmin(-1))


def test_the_straight_through_gradient_reaches_z_and_not_the_codes():
    z, codes = jnp.array([0.2, 0.9]), jnp.array([[0.0, 0.0], [1.0, 1.0]])

    def loss(z, codes):
        quantised = codes[vq.nearest(z, codes)]
        return jnp.sum(jnp.array([2.0, 3.0]) * vq.straight_through(z, quantised))

    value, (of_z, of_codes) = jax.value_and_grad(loss, (0, 1))(z, codes)
    assert value == pytest.approx(5.0)  # 2 * 1 + 3 * 1, of the quantised z
    np.testing.assert_array_equal(of_z, [2.0, 3.0])
    np.testing.assert_array_equal(of_codes, jnp.zeros((2, 2)))


def test_commitment_has_a_gradient_for_the_latent_and_not_for_the_code():
    grad = jax.grad(lambda z, e: vq.commitment(z, e), (0, 1))
    of_z, of_e = grad(jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0]))
    np.testing.assert_allclose(of_z, [1.0, 2.0])
    np.testing.assert_array_equal(of_e, [0.0, 0.0])


def test_codes_become_the_means_of_their_vectors():
    centres = jnp.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    book = vq.codebook(centres + 2 * jax.random.normal(jax.random.key(0), (4, 2)))

    @jax.jit
    def update(book, key):
        noise = jax.random.normal(key, (64, 2))
        return vq.update(book, centres[jnp.arange(64) % 4] + 0.1 * noise, decay=0.95)

    for step in range(600):
        book = update(book, jax.random.key(step))
    codes = np.asarray(sorted(map(tuple, np.asarray(book.codes).round().tolist())))
    np.testing.assert_array_equal(codes, [(0, 0), (0, 10), (10, 0), (10, 10)])
    assert float(vq.perplexity(book.sizes)) == pytest.approx(4, abs=0.1)


def test_unused_codes_are_replaced_by_vectors_of_all_rows_and_columns():
    rows, columns = np.mgrid[:8, :8].reshape(2, -1)
    positions = np.tile(np.stack([rows, columns], 1), (16, 1)).astype(np.float32)  # 16 images
    for count in (16, 64, 256):
        unused = jnp.full((count, 2), 1e6)
        codes = np.asarray(jax.jit(vq.update)(vq.codebook(unused), positions).codes)
        for axis in (0, 1):
            # Code 0 is the nearest one to all vectors and is not replaced.
            assert len(np.unique(codes[1:, axis])) == 8


def test_perplexity_is_the_number_of_codes_that_are_equally_frequent():
    assert float(vq.perplexity(jnp.array([3.0, 3, 3, 0]))) == pytest.approx(3)
    assert float(vq.perplexity(jnp.zeros(4))) == pytest.approx(1)
