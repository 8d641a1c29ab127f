"""Labels of -1: images that have no class."""

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
from ddpm_jax.tasks.classifier import Classifier, labelled
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
        evaluated(task, Variables(params, {}), data).metrics for data in (found, labelled(clean))
    ]
    assert figures[0] == figures[1]
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match="none of the 2 test images of x has a class"):
        labelled(loose._replace(test=split([-1, -1])))


NETWORK = UNet(channels=4, multipliers=(1,), blocks=1, attention_sizes=())
CONDITIONAL = (
    Diffusion(NETWORK, Cosine(), label_dropout=0.0),
    VDM(NETWORK, 13.0, -5.0, conditional=True, evaluation=SampleEvaluation(4, 1)),
)


@pytest.mark.parametrize("task", CONDITIONAL, ids=lambda task: type(task).__name__)
def test_an_image_without_a_class_trains_a_conditional_generator_as_no_class(task):
    task = bound(task, (8, 8, 1), 256, classes=3, batch_size=4)
    params, extra = first_variables(task, batch([0]))
    noise = jax.random.split(jax.random.key(2), 100)
    leaves, tree = jax.tree.flatten(params)  # where every layer is at work
    leaves = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, noise, strict=False)]
    variables = Variables(jax.tree.unflatten(tree, leaves), extra)
    loss = jax.jit(lambda batch, keys: loss_of(task, variables, batch, keys).losses)
    keys = jax.random.split(jax.random.key(1), 4)
    none, null, last = (np.asarray(loss(batch([0, label, 1, label]), keys)) for label in (-1, 3, 2))
    np.testing.assert_array_equal(none, null)
    assert (none != last).tolist() == [False, True, False, True]
