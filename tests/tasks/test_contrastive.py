"""The text encoder's loss is CLIP's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data import batches, loader, shapes
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.tasks.contrastive import contrastive_nll, contrastive_task
from helpers.text import drawn


def nll(text, image, scale, same):
    text, image, scale, same = map(jnp.asarray, (text, image, scale, same))
    return contrastive_nll(text, image, text, image, scale, jnp.arange(len(text)), same)


def test_the_contrastive_loss_is_clips(x64):
    draws = np.random.default_rng(0)
    text, image = (draws.normal(size=(5, 4)) for _ in range(2))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    found, right = nll(text, image, 3.0, np.eye(5, dtype=bool))
    logits = 3.0 * text @ image.T
    rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    np.testing.assert_allclose(found, (rows + columns) / 2, rtol=1e-12)
    np.testing.assert_array_equal(right, logits.argmax(1) == np.arange(5))


def test_the_same_caption_is_no_negative(x64):
    text = np.eye(4)[[0, 0, 1]]
    same = (text[:, None] == text).all(-1)
    found, _ = nll(text, text, 2.0, same)
    # The first two have one negative each, which is orthogonal.
    np.testing.assert_allclose(found[:2], np.log(1 + np.exp(-2.0)), rtol=1e-12)


def test_altered_captions_stand_beside_the_others_of_an_image(x64):
    draws = np.random.default_rng(0)
    text, image, altered = (draws.normal(size=shape) for shape in ((5, 4), (5, 4), (5, 2, 4)))
    args = (*map(jnp.asarray, (text, image, text, image, 3.0)), jnp.arange(5))
    found, _ = contrastive_nll(*args, jnp.eye(5, dtype=bool), jnp.asarray(altered))
    logits = 3.0 * text @ image.T
    beside = 3.0 * (image[:, None] * altered).sum(-1)
    rows = np.log(np.exp(logits).sum(1))
    columns = np.log(np.exp(logits).sum(0) + np.exp(beside).sum(1))
    np.testing.assert_allclose(found, (rows + columns) / 2 - np.diag(logits), rtol=1e-12)


def test_a_part_of_a_batch_is_compared_with_all_of_it():
    data = shapes.with_altered(loader.load("shapes"), 2)
    whole = jax.tree.map(jnp.asarray, batches.batch_of(data.train, np.arange(8), np.arange(8)))
    net = DualEncoder("tiny", shapes.LENGTH, (8,), 16)
    task = contrastive_task(net, data.shape, data.levels, batch_size=8)
    params = drawn(lambda *some: task.init(*some)[0], whole)
    mine = whole.captions[:, 0]
    keys = jax.random.split(jax.random.key(0), 8)

    @functools.partial(jax.jit, static_argnames="gather")
    def loss(params, batch, keys, gather):
        return task.loss(params, {}, batch, keys, train=True, gather=gather)[0]

    every = loss(params, whole, keys, lambda a: a)
    text, image, _ = jax.jit(net.apply)(params, mine, to_images(whole.images, 256))
    part = jax.tree.map(lambda a: a[4:], whole)
    gathered = loss(params, part, keys[4:], lambda _: (text, image, mine))
    np.testing.assert_allclose(gathered, every[4:], rtol=1e-5)
