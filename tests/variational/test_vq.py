"""Vector quantisation, and the autoencoders whose latents a generation model sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data import loader, types
from ddpm_jax.errors import UserError
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.metrics.reconstruction import psnr, ssim
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.tasks.autoencoder import autoencoder_task, latents
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


def test_psnr_and_ssim_of_known_pairs():
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3))
    np.testing.assert_allclose(psnr(x, x), 100.0)
    np.testing.assert_allclose(psnr(x, x + 0.2), 20.0)  # (2 / 0.2)^2 is 20 dB
    np.testing.assert_allclose(ssim(x, x), 1.0)
    a, b = np.full((1, 16, 16, 1), 0.5), np.full((1, 16, 16, 1), -0.25)
    c1 = (0.01 * 2) ** 2  # flat images: their means alone
    expected = (2 * 0.5 * -0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    np.testing.assert_allclose(ssim(a, b), expected)
    assert (ssim(0.5 + 0.3 * x, 0.5 - 0.3 * x) < 0).all()  # of one brightness, and opposite


NET = Autoencoder((16, 16, 3), (8, 8), latent=3)


def state(task, batch):
    return jax.jit(task.init)(jax.random.key(0), batch)


def batch(size=32, start=0):
    images = loader.load("shapes").train.images[np.arange(start, start + size)][:, ::2, ::2]
    labels = np.full(size, -1, np.int32)
    return jax.tree.map(jnp.asarray, types.Batch(images, labels, np.arange(size)))


@pytest.mark.parametrize("codes", [0, 16])
def test_latents_have_unit_variance_or_are_codes(codes):
    task = autoencoder_task(NET, 256, codes=codes)
    params, fixed = state(task, batch())
    keys = jax.random.split(jax.random.key(1), 32)
    step = jax.jit(lambda params, fixed, b: task.update(fixed, task.loss(
        params, fixed, b, keys, train=True, gather=lambda a: a)[2]))  # fmt: skip
    for number in range(30):
        fixed = step(params, fixed, batch(start=32 * number))
    of, frozen = latents(NET, codes), {"params": params, "fixed": fixed}
    z = of.encode(frozen, to_images(batch(256, 10_000).images, 256))
    assert z.shape == (256, 4, 4, 3)
    if not codes:  # of codes the variance is of what they stand for, but for what is between
        np.testing.assert_allclose(z.std((0, 1, 2)), 1.0, atol=0.1)
        np.testing.assert_allclose(z.mean((0, 1, 2)), 0.0, atol=0.15)
    else:
        every = of.lay(frozen, jnp.arange(codes))
        apart = np.abs(np.asarray(z)[..., None, :] - every).max(-1)  # [..., codes]
        assert apart.min(-1).max() == 0  # every latent is a code, and
        assert len(np.unique(apart.argmin(-1))) > 1
        decode = jax.jit(of.decode)
        near = decode(frozen, z[:8] + 1e-4)  # what is near one is that code's image
        np.testing.assert_array_equal(decode(frozen, z[:8]), near)


def test_the_posterior_is_never_wider_than_the_prior_whatever_the_encoder_says():
    """A variance that is an exponential of it blew up one training in three."""
    params = jax.jit(NET.init)(jax.random.key(0), jnp.zeros((1, *NET.shape)))
    x = to_images(batch(8).images, 256)

    @jax.jit
    def encode(size):
        return NET.apply(jax.tree.map(lambda leaf: size * leaf, params), x, method="encode")

    for size in (0.0, 1.0, 1e3, 1e6):
        mean, logvar = encode(size)
        assert np.isfinite(mean).all()
        assert -20 <= logvar.min() <= logvar.max() <= 0
        if size == 0:  # the sigmoid of 0
            np.testing.assert_allclose(logvar, np.log(0.5), rtol=1e-6)


def test_an_image_that_does_not_divide_is_told_in_one_line():
    with pytest.raises(UserError, match="30x30 does not divide"):
        autoencoder_task(Autoencoder((30, 30, 3), (8, 8, 8)), 256)
