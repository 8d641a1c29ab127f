"""Tests of the autoencoder whose latents a generation model is trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data import loader, types
from ddpm_jax.fields import FieldError
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.task import Variables
from ddpm_jax.tasks.autoencoder import LatentAutoencoder, Latents

NET = Autoencoder((16, 16, 3), (8, 8), latent_channels=3)


INFO = types.DataInfo("x", NET.shape, 256)


def batch(size=32, start=0):
    images = loader.load("shapes").train.images[np.arange(start, start + size)][:, ::2, ::2]
    labels = np.full(size, -1, np.int32)
    return jax.tree.map(jnp.asarray, types.Batch(images, labels, np.arange(size)))


@pytest.mark.parametrize("codes", [0, 16])
def test_latents_have_unit_variance_or_are_codes(codes):
    task = LatentAutoencoder(NET, codes=codes, info=INFO)
    params, extra = jax.jit(task.init)(jax.random.key(0), batch())
    keys = jax.random.split(jax.random.key(1), 32)

    @jax.jit
    def step(params, extra, batch):
        variables = Variables(params, extra)
        output = task.loss(variables, batch, keys, train=True, all_gather=lambda tree: tree)
        return task.update_extra(extra, output.statistics)

    for number in range(30):
        extra = step(params, extra, batch(start=32 * number))
    latents, frozen = Latents(NET, codes), {"params": params, "extra": extra}
    z = latents.encode(frozen, to_images(batch(256, 10_000).images, 256))
    assert z.shape == (256, 4, 4, 3)
    if not codes:  # the moments of z_q differ from those of z, which normalise it
        np.testing.assert_allclose(z.std((0, 1, 2)), 1.0, atol=0.1)
        np.testing.assert_allclose(z.mean((0, 1, 2)), 0.0, atol=0.15)
    else:
        all_codes = latents.embed_codes(frozen, jnp.arange(codes))
        distances = np.abs(np.asarray(z)[..., None, :] - all_codes).max(-1)  # [..., codes]
        assert distances.min(-1).max() == 0  # every latent is a code
        assert len(np.unique(distances.argmin(-1))) > 1
        decode = jax.jit(latents.decode)
        moved = decode(frozen, z[:8] + 1e-4)  # the nearest codes are the same
        np.testing.assert_array_equal(decode(frozen, z[:8]), moved)


def test_the_posterior_is_never_wider_than_the_prior_for_any_parameters():
    """With the variance as the exponential of the encoder's output, 1 of 3 runs diverged."""
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


def test_an_image_size_that_the_network_cannot_halve_raises_a_field_error():
    with pytest.raises(FieldError, match=r"^network\..* 30x30 is not divisible"):
        LatentAutoencoder(Autoencoder((30, 30, 3), (8, 8, 8))).check()
