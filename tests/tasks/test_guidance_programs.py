"""Tests that guided sampling compiles and computes nothing twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.types import Batch, Data, DataInfo, Split
from ddpm_jax.diffusion.guidance import Autoguidance, ClassifierFree, Guidance
from ddpm_jax.diffusion.prediction import Prediction
from ddpm_jax.diffusion.process import alpha_sigma
from ddpm_jax.diffusion.schedules import cosine
from ddpm_jax.experiment.requests import Request
from ddpm_jax.metrics.features import FeatureNetwork
from ddpm_jax.nn.dit import DiT
from ddpm_jax.parallel.sharding import make
from ddpm_jax.task import GuidanceModel, Resources, Variables
from ddpm_jax.tasks.diffusion import Diffusion
from ddpm_jax.tasks.image_denoiser import TRACED, ImageDenoiser, SampleEvaluation
from ddpm_jax.tasks.image_sampler import ImageSampler, Sampling
from helpers.sampling import context_of, evaluated, sample
from helpers.tasks import CutCosine, ExactDenoiser, bound, first_variables

SHAPE, CLASSES, COUNT = (4, 4, 1), 2, 8
SCHEDULE = cosine(-9.0, 9.0)
KEYS = jax.random.split(jax.random.key(0), COUNT)


class Counter:
    """A network that records the batch size of each call when the call is traced."""

    def __init__(self):
        self.batches = []

    def __call__(self, params, xt, logsnr, labels):
        self.batches.append(len(xt))
        alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(logsnr))
        x0 = 0.1 * (labels[:, None, None, None] + params["shift"]) * jnp.ones_like(xt)
        return Prediction(x0, (xt - alpha * x0) / sigma)


def counting(**settings):
    """Return a task with a `Counter` as its network, and the counter."""
    counter = Counter()
    sampling = Sampling("ddim", 3, "logsnr", **settings)
    info = DataInfo("x", SHAPE, 17, CLASSES)
    return ExactDenoiser(counter, SCHEDULE, sampling, classes=CLASSES, info=info), counter


VARIABLES = Variables({"shift": jnp.asarray(0.0)}, {})


def at(task, scale, model=None):
    """Return samples of class 1 at a guidance scale."""
    return sample(task, VARIABLES, KEYS, Request(label=1, guidance=scale), model)


def test_guidance_is_a_pytree_of_its_scale_and_of_the_guidance_models_parameters():
    task, _ = counting()
    guidance = Guidance(ClassifierFree(2.0), (-1.0, 3.0), 0.5)
    assert jax.tree.leaves(guidance) == [2.0]
    weaker = Guidance(Autoguidance(2.0, {"shift": 3.0}, task))
    assert sorted(jax.tree.leaves(weaker)) == [2.0, 3.0]
    assert jax.tree.leaves(Guidance()) == []
    doubled = jax.tree.map(lambda leaf: 2 * leaf, guidance)
    assert doubled == Guidance(ClassifierFree(4.0), (-1.0, 3.0), 0.5)


def test_one_program_serves_all_scales_and_all_parameters_of_a_guidance_model():
    task, counter = counting()
    at(task, 1.5)
    calls = len(counter.batches)
    assert set(counter.batches) == {2 * COUNT}  # labels and "no class" in one batch
    for scale in (0.0, 0.5, 3.0, -1.0):
        at(task, scale)
    assert len(counter.batches) == calls

    weaker, weaker_counter = counting()
    at(task, 1.5, GuidanceModel(weaker, {"shift": jnp.asarray(1.0)}))
    calls = len(weaker_counter.batches)
    assert set(weaker_counter.batches) == {COUNT}
    images = [
        at(task, 2.0, GuidanceModel(weaker, {"shift": jnp.asarray(shift)})) for shift in (2.0, 3.0)
    ]
    assert len(weaker_counter.batches) == calls
    assert not np.array_equal(*images)


@pytest.mark.parametrize("rescale", [0.0, 0.5])
@pytest.mark.parametrize("interval", [None, (-2.0, 2.0)])
def test_a_neutral_scale_calls_the_network_once_per_step_with_an_undoubled_batch(interval, rescale):
    task, counter = counting(guidance_interval=interval, guidance_rescale=rescale)
    assert task.guidance(1.0, None) == Guidance()
    plain, plain_counter = counting()
    labels = jnp.ones(COUNT, jnp.int32)
    compiled = jax.jit(ImageSampler.sample, static_argnums=(0, 1))
    inputs = VARIABLES.params, Guidance(), KEYS, labels, labels
    expected, _ = compiled(plain.sampler(), 0, *inputs)
    images = at(task, 1.0)
    np.testing.assert_allclose(images, expected, atol=1e-6)
    assert counter.batches == plain_counter.batches
    assert set(counter.batches) == {COUNT}
    weaker, weaker_counter = counting()
    at(task, 1.0, GuidanceModel(weaker, VARIABLES.params))
    assert weaker_counter.batches == []


def test_the_network_is_called_once_for_each_step():
    sizes = []

    def network(params, xt, logsnr, labels):
        jax.debug.callback(lambda value: sizes.append(len(value)), xt)
        return Counter()(params, xt, logsnr, labels)

    task, _ = counting()
    task = dataclasses.replace(task, function=network)
    for scale, size in ((1.0, COUNT), (2.0, 2 * COUNT)):
        sizes.clear()
        at(task, scale)
        jax.effects_barrier()
        assert sizes == [size] * 3


def test_the_guidance_interval_and_rescaling_are_static():
    """They are part of the compiled program and cost no time if they are turned off."""
    structures = [
        jax.tree.structure(Guidance(ClassifierFree(2.0), interval, rescale))
        for interval in (None, (-2.0, 2.0), (-1.0, 2.0))
        for rescale in (0.0, 0.5)
    ]
    assert len(set(structures)) == 6
    task, counter = counting()
    for guidance in (Guidance(ClassifierFree(2.0)), Guidance(ClassifierFree(2.0), None, 0.5)):
        counter.batches.clear()
        labels = jnp.ones(COUNT, jnp.int32)
        compiled = make().compile(ImageSampler.sample, static_argnums=(0, 1))
        compiled(task.sampler(), 0, VARIABLES.params, guidance, KEYS, labels, 1 + labels)
        assert counter.batches  # each value of the rescaling compiles a program


# Samples of an evaluation.

TINY = Diffusion(
    DiT(patch=2, width=8, depth=1, heads=1),
    sampling=Sampling("ddim", 3),
    evaluation=SampleEvaluation(40, 2),
)


def tiny_data():
    """Return a data set of 40 images in two classes."""
    images = np.random.default_rng(0).integers(0, 17, (40, *SHAPE), np.uint8)
    split = Split(images, (np.arange(40) % CLASSES).astype(np.int32))
    return Data("x", "x", split, split, 17, ("a", "b"), "")


BATCH = Batch(jnp.zeros((1, *SHAPE), jnp.uint8), jnp.zeros(1, jnp.int32), jnp.arange(1))


def row_means(name):
    """Return a feature network whose features are the means of the rows.

    The class is given by the sign of the first feature.
    """

    def extract(images):
        means = np.asarray(images, np.float64).mean((2, 3))
        log_probabilities = np.log(np.where(means[:, :1] > 0, [0.9, 0.1], [0.1, 0.9]))
        return means, log_probabilities

    return FeatureNetwork(name, extract, f"the network {name}")


@pytest.fixture
def calls(monkeypatch):
    """Return a list of the indices that each call of `sample_for_evaluation` samples."""
    indices = []
    sample_for_evaluation = ImageDenoiser.sample_for_evaluation

    def counted(self, keys, index, context):
        indices.append(np.asarray(index))
        return sample_for_evaluation(self, keys, index, context)

    monkeypatch.setattr(ImageDenoiser, "sample_for_evaluation", counted)
    return indices


def test_the_samples_of_an_evaluation_are_sampled_once_and_shared(calls):
    settings = dataclasses.replace(TINY.evaluation, num_samples=150, features=("rows", "others"))
    task = bound(dataclasses.replace(TINY, evaluation=settings), SHAPE, 17, CLASSES)
    variables, data = first_variables(task, BATCH), tiny_data()
    resources = Resources(features=(lambda: row_means("rows"), lambda: row_means("others")))
    evaluation = evaluated(task, variables, data, resources=resources)
    # 150 samples are two batches of 104: 100, rounded up to a multiple of 8 devices.
    np.testing.assert_array_equal(np.concatenate(calls), np.arange(208))
    assert len(calls) == 2
    for name in (
        "samples",
        "trajectories",
        "trajectories_animation",
        "inpainting",
        "nearest_training_images",
    ):
        assert name in evaluation.images
    assert {"test/fd_rows", "test/fd_others", "test/classifier_accuracy"} <= set(evaluation.metrics)
    assert evaluation.metrics["test/num_samples"] == 150


def test_samples_of_an_evaluation_are_not_sampled_again(calls):
    task, _ = counting()
    context = context_of(task, VARIABLES, tiny_data())
    first = context.samples(100)
    assert len(calls) == 1
    for count in (100, 50, 104, 1):
        again = context.samples(count)
        size = min(count, 100)
        np.testing.assert_array_equal(again.images[:size], first.images[:size])
        assert len(again.images) == len(again.labels) == count
        assert again.trace is first.trace
    assert len(calls) == 1
    assert len(context.samples(105).images) == 105
    assert len(calls) == 2
    np.testing.assert_array_equal(first.labels, np.arange(100) % CLASSES)
    assert [a.shape for a in first.trace] == [(3, TRACED, *SHAPE)] * 2


# A task is a value.


@dataclasses.dataclass(frozen=True)
class Counted(Diffusion):
    """A diffusion task that counts how often its prediction is traced."""

    def predict(self, *arguments, **keywords):
        """Return the prediction of the network."""
        TRACES.append(self)
        return super().predict(*arguments, **keywords)


TRACES = []


def test_equal_tasks_share_one_compiled_program_and_different_tasks_do_not():
    def build(**settings):
        sampling = Sampling("ddim", 2, **settings)
        task = Counted(network=TINY.network, sampling=sampling, schedule=CutCosine(-9.0, 9.0))
        return bound(task, SHAPE, 17, CLASSES)

    task, same, stronger = build(), build(), build(guidance=3.0)
    assert task is not same
    assert task == same
    assert hash(task) == hash(same)
    assert task != stronger
    variables, data = first_variables(task, BATCH), tiny_data()
    TRACES.clear()
    first = evaluated(task, variables, data, full=False)
    calls = len(TRACES)
    assert calls
    assert evaluated(same, variables, data, full=False).metrics == first.metrics
    assert len(TRACES) == calls
    sample(task, variables, KEYS)
    calls = len(TRACES)
    sample(same, variables, KEYS)
    assert len(TRACES) == calls
    evaluated(stronger, variables, data, full=False)
    assert len(TRACES) > calls
