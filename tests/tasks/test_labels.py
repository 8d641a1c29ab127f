"""Labels of -1: images that have no class."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.types import Batch, Data, Split
from ddpm_jax.diffusion.schedules import cosine
from ddpm_jax.errors import UserError
from ddpm_jax.nn.classifier import ClassifierNetwork
from ddpm_jax.nn.unet import UNet
from ddpm_jax.parallel.sharding import make
from ddpm_jax.tasks.classifier import classifier_task, labelled
from ddpm_jax.tasks.diffusion import diffusion_task
from ddpm_jax.tasks.image_sampler import Sampling
from ddpm_jax.tasks.vdm import vdm_task


def batch(labels):
    count = len(labels)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)
    return jax.tree.map(jnp.asarray, Batch(pixels, np.array(labels), np.arange(count)))


@pytest.fixture(scope="module")
def classifier():
    task = classifier_task(ClassifierNetwork(3, (4,), 4, 0.0), (8, 8, 1), 256, eval_batch=4)
    return task, task.init(jax.random.key(0), batch([0]))[0]


def losses(task, params, labels):
    keys = jax.random.split(jax.random.key(1), len(labels))
    return task.loss(params, {}, batch(labels), keys, train=True, gather=lambda x: x)


def test_an_image_without_a_class_teaches_a_classifier_nothing(classifier):
    task, params = classifier
    loss, metrics, _ = losses(task, params, [0, -1, 2, -1])
    assert (np.asarray(loss) == 0).tolist() == [False, True, False, True]
    assert not np.asarray(metrics["accuracy"])[1::2].any()
    one = jax.grad(lambda p: losses(task, p, [0, -1, 2, -1])[0].sum())(params)
    other = jax.grad(lambda p: losses(task, p, [0, 1, 2, 2])[0][::2].sum())(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)


def test_a_classifier_is_trained_and_measured_on_images_with_a_class(classifier, capfd):
    task, params = classifier

    def split(labels, shown=None):
        rows = np.arange(len(labels)) if shown is None else shown
        some = batch(labels)
        return Split(np.asarray(some.images)[rows], np.asarray(some.labels)[rows])

    labels = [0, -1, 2, -1, 1, 1]
    kept = np.flatnonzero(np.array(labels) >= 0)
    loose = Data("x", "x", split(labels), split(labels), 256, ("a", "b", "c"), "")
    clean = loose._replace(train=split(labels, kept), test=split(labels, kept))
    found = labelled(loose)
    assert capfd.readouterr().err == "x: skipped 2 train and 2 test images that have no class\n"
    assert np.asarray(found.train.labels).tolist() == [0, 2, 1, 1]
    np.testing.assert_array_equal(np.asarray(found.train.images), clean.train.images)
    figures = [
        task.evaluate(params, {}, data, split="test", seed=0, full=True, spread=make()).metrics
        for data in (found, labelled(clean))
    ]
    assert figures[0] == figures[1]
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match="none of the 2 test images of x has a class"):
        labelled(loose._replace(test=split([-1, -1])))


def unet(classes):
    return UNet(1, channels=4, multipliers=(1,), blocks=1, attention_sizes=(), classes=classes)


@pytest.mark.parametrize("task_of", [diffusion_task, vdm_task])
def test_an_image_without_a_class_trains_a_conditional_generator_as_no_class(task_of):
    if task_of is diffusion_task:
        task = task_of(unet(3), cosine(), (8, 8, 1), 256, label_dropout=0.0, batch_size=4)
    else:
        ends, sampling = (13.0, -5.0), Sampling()
        task = task_of(
            unet(3), (8, 8, 1), 256, ends=ends, sampling=sampling, batch_size=4, eval_batch=4,
            eval_times=1,
        )  # fmt: skip
    params, fixed = jax.jit(task.init)(jax.random.key(0), batch([0]))
    noise = jax.random.split(jax.random.key(2), 100)
    leaves, tree = jax.tree.flatten(params)  # where every layer is at work
    leaves = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, noise, strict=False)]
    params = jax.tree.unflatten(tree, leaves)
    loss = jax.jit(functools.partial(task.loss, train=True, gather=lambda x: x))
    keys = jax.random.split(jax.random.key(1), 4)
    none, null, last = (
        np.asarray(loss(params, fixed, batch([0, label, 1, label]), keys)[0])
        for label in (-1, 3, 2)
    )
    np.testing.assert_array_equal(none, null)
    assert (none != last).tolist() == [False, True, False, True]
