"""Tests of the loss of the text encoder, which is that of CLIP."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data import batches, loader
from ddpm_jax.data.types import info_of
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.task import Variables
from ddpm_jax.tasks.contrastive import Contrastive, contrastive_nll
from helpers.text import random_params


def nll(text, image, scale, same):
    text, image, scale, same = map(jnp.asarray, (text, image, scale, same))
    return contrastive_nll(text, image, text, image, scale, jnp.arange(len(text)), same)


def test_the_contrastive_loss_is_that_of_clip(x64):
    rng = np.random.default_rng(0)
    text, image = (rng.normal(size=(5, 4)) for _ in range(2))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    losses, correct = nll(text, image, 3.0, np.eye(5, dtype=bool))
    logits = 3.0 * text @ image.T
    rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    np.testing.assert_allclose(losses, (rows + columns) / 2, rtol=1e-12)
    np.testing.assert_array_equal(correct, logits.argmax(1) == np.arange(5))


def test_an_equal_caption_is_not_a_negative(x64):
    text = np.eye(4)[[0, 0, 1]]
    same = (text[:, None] == text).all(-1)
    losses, _ = nll(text, text, 2.0, same)
    # Each of the first two pairs has one negative, which is orthogonal to it.
    np.testing.assert_allclose(losses[:2], np.log(1 + np.exp(-2.0)), rtol=1e-12)


def test_hard_negatives_are_further_negatives_of_an_image(x64):
    rng = np.random.default_rng(0)
    text, image, negatives = (rng.normal(size=shape) for shape in ((5, 4), (5, 4), (5, 2, 4)))
    args = (*map(jnp.asarray, (text, image, text, image, 3.0)), jnp.arange(5))
    losses, _ = contrastive_nll(*args, jnp.eye(5, dtype=bool), jnp.asarray(negatives))
    logits = 3.0 * text @ image.T
    negative_logits = 3.0 * (image[:, None] * negatives).sum(-1)
    rows = np.log(np.exp(logits).sum(1))
    columns = np.log(np.exp(logits).sum(0) + np.exp(negative_logits).sum(1))
    np.testing.assert_allclose(losses, (rows + columns) / 2 - np.diag(logits), rtol=1e-12)


def test_a_part_of_a_batch_is_compared_with_the_complete_batch():
    data = loader.load("shapes")
    task = Contrastive(DualEncoder("tiny", channels=(8,), embedding_dim=16), hard_negatives=2)
    task = task.bind(info_of(data), "float32", batch_size=8)
    task.check()
    data = task.prepare_data(data)
    full = jax.tree.map(jnp.asarray, batches.batch_of(data.train, np.arange(8), np.arange(8)))
    params = random_params(lambda key, batch: task.init(key, batch).params, full)
    captions = full.captions[:, 0]
    keys = jax.random.split(jax.random.key(0), 8)

    @functools.partial(jax.jit, static_argnames="all_gather")
    def loss(params, batch, keys, all_gather):
        variables = Variables(params, {})
        return task.loss(variables, batch, keys, train=True, all_gather=all_gather).losses

    expected = loss(params, full, keys, lambda tree: tree)
    text, image, _ = jax.jit(task.network.apply)(params, captions, to_images(full.images, 256))
    part = jax.tree.map(lambda a: a[4:], full)
    gathered = loss(params, part, keys[4:], lambda _: (text, image, captions))
    np.testing.assert_allclose(gathered, expected[4:], rtol=1e-5)
