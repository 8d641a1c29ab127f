"""Tests of unlabelled images, whose label is -1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.types import Batch, Data, Split
from ddpm_jax.diffusion.schedules import Cosine
from ddpm_jax.errors import UserError
from ddpm_jax.nn.classifier import ClassifierNetwork
from ddpm_jax.nn.unet import UNet
from ddpm_jax.task import Variables
from ddpm_jax.tasks.classifier import Classifier, without_unlabelled
from ddpm_jax.tasks.diffusion import Diffusion
from ddpm_jax.tasks.image_denoiser import SampleEvaluation
from ddpm_jax.tasks.vdm import VDM
from helpers.sampling import evaluated
from helpers.tasks import bound, first_variables, loss_of


def batch(labels):
    count = len(labels)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)
    return jax.tree.map(jnp.asarray, Batch(pixels, np.array(labels), np.arange(count)))


@pytest.fixture(scope="module")
def classifier():
    network = ClassifierNetwork(channels=(4,), features=4, dropout=0.0)
    task = bound(Classifier(network, eval_batch_size=4), (8, 8, 1), 256, classes=3)
    return task, task.init(jax.random.key(0), batch([0])).params


def losses(task, params, labels):
    keys = jax.random.split(jax.random.key(1), len(labels))
    return loss_of(task, Variables(params, {}), batch(labels), keys)


def test_the_loss_and_the_gradient_of_an_unlabelled_image_are_zero(classifier):
    task, params = classifier
    loss, metrics, _ = losses(task, params, [0, -1, 2, -1])
    assert (np.asarray(loss) == 0).tolist() == [False, True, False, True]
    assert not np.asarray(metrics["accuracy"])[1::2].any()
    gradient = jax.grad(lambda p: losses(task, p, [0, -1, 2, -1])[0].sum())(params)
    expected = jax.grad(lambda p: losses(task, p, [0, 1, 2, 2])[0][::2].sum())(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, expected)


def test_a_classifier_is_trained_and_evaluated_without_unlabelled_images(classifier, capfd):
    task, params = classifier

    def split(labels, rows=slice(None)):
        examples = batch(labels)
        return Split(np.asarray(examples.images)[rows], np.asarray(examples.labels)[rows])

    labels = [0, -1, 2, -1, 1, 1]
    rows = np.flatnonzero(np.array(labels) >= 0)
    data = Data("x", "x", split(labels), split(labels), 256, ("a", "b", "c"), "")
    expected = data._replace(train=split(labels, rows), test=split(labels, rows))
    result = without_unlabelled(data)
    assert capfd.readouterr().err == "x: skipped 2 train and 2 test images that have no class\n"
    assert np.asarray(result.train.labels).tolist() == [0, 2, 1, 1]
    np.testing.assert_array_equal(np.asarray(result.train.images), expected.train.images)
    metrics, expected_metrics = (
        evaluated(task, Variables(params, {}), part).metrics
        for part in (result, without_unlabelled(expected))
    )
    assert metrics == expected_metrics
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match="none of the 2 test images of x has a class"):
        without_unlabelled(data._replace(test=split([-1, -1])))


NETWORK = UNet(channels=4, multipliers=(1,), blocks=1, attention_sizes=())
CONDITIONAL = (
    Diffusion(NETWORK, Cosine(), label_dropout=0.0),
    VDM(NETWORK, 13.0, -5.0, conditional=True, evaluation=SampleEvaluation(4, 1)),
)


@pytest.mark.parametrize("task", CONDITIONAL, ids=lambda task: type(task).__name__)
def test_a_class_conditional_model_is_trained_on_unlabelled_images_as_no_class(task):
    task = bound(task, (8, 8, 1), 256, classes=3, batch_size=4)
    params, extra = first_variables(task, batch([0]))
    noise = jax.random.split(jax.random.key(2), 100)
    leaves, tree = jax.tree.flatten(params)  # no parameter is 0, so that every layer matters
    leaves = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, noise, strict=False)]
    variables = Variables(jax.tree.unflatten(tree, leaves), extra)
    loss = jax.jit(lambda batch, keys: loss_of(task, variables, batch, keys).losses)
    keys = jax.random.split(jax.random.key(1), 4)
    unlabelled, null, labelled = (
        np.asarray(loss(batch([0, label, 1, label]), keys)) for label in (-1, 3, 2)
    )
    np.testing.assert_array_equal(unlabelled, null)
    assert (unlabelled != labelled).tolist() == [False, True, False, True]
