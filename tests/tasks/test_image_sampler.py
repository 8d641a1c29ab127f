"""Tests of sampling with the exact denoiser of Gaussian images in two classes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.types import Computed, Data, DataInfo, Rows, Split
from ddpm_jax.diffusion.guidance import ClassifierGuidance
from ddpm_jax.diffusion.prediction import Prediction
from ddpm_jax.diffusion.process import alpha_sigma
from ddpm_jax.diffusion.schedules import cosine, cosine_betas, from_betas, linear_betas
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.requests import Request
from ddpm_jax.fields import FieldError
from ddpm_jax.task import GuidanceModel, Resources, Task, Variables
from ddpm_jax.tasks.image_sampler import Sampling, check_start
from ddpm_jax.tasks.sample_figures import edits, sample_sheet
from helpers.sampling import NO_VARIABLES, context_of, edit_images, sample
from helpers.tasks import ExactDenoiser

STD = 0.1
SHAPE = (4, 4, 1)
PATTERN = jnp.ones(SHAPE).at[:, 2:].set(-1.0)
MEANS = jnp.array([-0.5, 0.5, 0.0])[:, None, None, None] * PATTERN  # class 0, class 1, neither
SCHEDULE = cosine(-9.0, 9.0)


def predict(params, xt, logsnr, labels):
    mean = MEANS[labels]
    alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(logsnr))
    pull = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    x0 = mean + pull * (xt - alpha * mean)
    return Prediction(x0, (xt - alpha * x0) / sigma)


def denoiser(predict=predict, classes=2, **settings):
    """Return the task of an exact denoiser with these settings of sampling."""
    info = DataInfo("x", SHAPE, 256, classes)
    sampling = Sampling("ddim", 40, "logsnr", **settings)
    task = ExactDenoiser(predict, SCHEDULE, sampling, classes=classes, info=info)
    task.check()
    return task


def images(label, **settings):
    """Return samples of a class, times PATTERN, so that all pixels have the same mean."""
    keys = jax.random.split(jax.random.key(0), 64)
    samples = sample(denoiser(**settings), NO_VARIABLES, keys, Request(label=label))
    return np.asarray(samples * PATTERN)


def test_each_class_is_sampled_with_its_mean_and_standard_deviation():
    for label in (0, 1):
        assert images(label).mean() == pytest.approx(label - 0.5, abs=0.02)
        assert images(label).std() == pytest.approx(STD, rel=0.1)


def test_guidance_moves_the_mean_away_from_the_unconditional_one():
    # For Gaussians of equal variance, the guided mean is 0 + 1.5 (0.5 - 0).
    assert images(1, guidance=1.5).mean() == pytest.approx(0.75, abs=0.02)


def test_guidance_scales_share_one_program():
    traces = []

    def counted(*arguments):
        traces.append(1)
        return predict(*arguments)

    task, keys = denoiser(counted), jax.random.split(jax.random.key(0), 8)

    def at(scale):
        return sample(task, NO_VARIABLES, keys, Request(label=1, guidance=scale)) * PATTERN

    assert at(1.5).mean() == pytest.approx(0.75, abs=0.05)
    count = len(traces)
    assert at(2.0).mean() == pytest.approx(1.0, abs=0.05)
    assert len(traces) == count
    assert at(1.0).mean() == pytest.approx(0.5, abs=0.05)  # a different program, without guidance


def test_guidance_acts_only_within_its_interval():
    guided = images(1, guidance=1.5)
    np.testing.assert_allclose(
        images(1, guidance=1.5, guidance_interval=(90.0, 91.0)), images(1), atol=1e-6
    )
    np.testing.assert_allclose(
        images(1, guidance=1.5, guidance_interval=(-99.0, 99.0)), guided, atol=1e-6
    )
    between = images(1, guidance=1.5, guidance_interval=(-2.0, 2.0)).mean()
    assert images(1).mean() + 0.02 < between < guided.mean() - 0.02


def test_rescaling_sets_the_standard_deviation_back_to_the_conditional_one():
    strong = images(1, guidance=4.0, x0_thresholding="none")
    assert strong.mean() == pytest.approx(2.0, abs=0.1)
    # The std of x0 over an image is the amplitude of the pattern, 2.0 with guidance alone.
    full = images(1, guidance=4.0, x0_thresholding="none", guidance_rescale=1.0)
    assert full.mean() == pytest.approx(0.5, abs=0.1)
    half = images(1, guidance=4.0, x0_thresholding="none", guidance_rescale=0.5)
    assert full.mean() + 0.3 < half.mean() < strong.mean() - 0.3


def test_dynamic_thresholding_saturates_fewer_pixels_than_clipping():
    clipped = images(1, guidance=4.0)
    dynamic = images(1, guidance=4.0, x0_thresholding="dynamic")
    assert np.abs(dynamic).max() <= 1 + 1e-5
    assert (np.abs(dynamic) > 0.999).mean() < (np.abs(clipped) > 0.999).mean()


# Guidance models, whose parameters are an argument of sampling.


def shifted(params, xt, logsnr, labels):
    """Return the prediction of a worse model, whose class means are `params` times as large."""
    exact = predict({}, xt, logsnr, labels)
    alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(logsnr))
    change = 1 - alpha**2 * STD**2 / (alpha**2 * STD**2 + sigma**2)
    x0 = exact.x0 + change * (params - 1) * MEANS[labels]
    return Prediction(x0, (xt - alpha * x0) / sigma)


def test_autoguidance_of_scale_0_is_the_worse_model_and_of_scale_1_the_better_one():
    half = jnp.asarray(0.5)
    worse = GuidanceModel(denoiser(shifted), half, "it")
    keys = jax.random.split(jax.random.key(0), 64)

    def at(scale):
        return (
            sample(denoiser(), NO_VARIABLES, keys, Request(label=1, guidance=scale), worse)
            * PATTERN
        )

    expected = sample(denoiser(shifted), Variables(half, {}), keys, Request(label=1)) * PATTERN
    np.testing.assert_allclose(at(0.0), expected, atol=1e-5)
    np.testing.assert_array_equal(at(1.0), images(1))
    # For Gaussians of equal variance, the guided mean is 0.25 + 2 (0.5 - 0.25).
    assert at(2.0).mean() == pytest.approx(0.75, abs=0.02)


def log_joint(params, xt, logsnr):
    """Return log p(x_t | y) + log p(y) up to a constant; `params` is log p(y)."""
    alpha, sigma = alpha_sigma(logsnr)
    distances = jnp.square(xt[:, None] - alpha * MEANS[:2]).sum((2, 3, 4))
    return params - distances / (2 * (alpha**2 * STD**2 + sigma**2))


EVEN = jnp.zeros(2)


def mixture(params, xt, logsnr, labels):
    """Return the exact unconditional prediction for the mixture of both classes."""
    shares = jax.nn.softmax(log_joint(EVEN, xt, logsnr[0]))
    x0 = sum(
        shares[:, i, None, None, None] * predict({}, xt, logsnr, jnp.full(len(xt), i)).x0
        for i in range(2)
    )
    alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(logsnr))
    return Prediction(x0, (xt - alpha * x0) / sigma)


@dataclasses.dataclass(frozen=True)
class ExactClassifier(Task):
    """The exact classifier of noisy images; its parameters are log p(y)."""

    classes: int = 2

    def log_likelihood(self, params, xt, logsnr, labels):
        logs = jax.nn.log_softmax(log_joint(params, xt, logsnr))
        log_p = jnp.take_along_axis(logs, jnp.minimum(labels, 1)[:, None], 1)[:, 0]
        return jnp.where(labels < 2, log_p, 0.0)

    def guidance_method(self, params, scale):
        return ClassifierGuidance(scale, params, self)


EXACT = GuidanceModel(ExactClassifier(), EVEN, "it")


IMAGES = Split(np.zeros((12, *SHAPE), np.uint8), np.zeros(12, np.int32))
NO_DATA = Data("x", "x", IMAGES, IMAGES, 256, ("a", "b"), "")


def evaluation_of(task, data=NO_DATA, model=None):
    """Return the context of an evaluation of a task, guided by `model` if it is not None."""
    return context_of(task, NO_VARIABLES, data, resources=Resources(guidance=lambda: model))


def test_an_unconditional_model_guided_by_the_exact_classifier_samples_the_class():
    guided = evaluation_of(denoiser(mixture, 0), model=EXACT)
    conditional = evaluation_of(denoiser())
    samples, expected = guided.samples(100), conditional.samples(100)
    np.testing.assert_array_equal(samples.labels, expected.labels)
    np.testing.assert_allclose(samples.images, expected.images, atol=1e-3)
    keys = jax.random.split(jax.random.key(0), 64)
    request = Request(label=0, guidance=0.0)
    unguided = sample(denoiser(mixture, 0), NO_VARIABLES, keys, request, EXACT)
    alone = sample(denoiser(mixture, 0), NO_VARIABLES, keys)
    np.testing.assert_array_equal(unguided, alone)
    means = (alone * PATTERN).mean((1, 2, 3))
    assert (means > 0.4).any()  # there are samples of both classes
    assert (means < -0.4).any()
    for context, name in ((guided, "it"), (conditional, "labels")):
        about = sample_sheet(context.task, context).about
        assert about["guidance_model"] == name


def test_classifier_guidance_has_no_effect_on_images_without_a_class():
    keys, start = jax.random.split(jax.random.key(3), 4), jnp.zeros((4, *SHAPE))
    task, labels = denoiser(mixture, 0), jnp.full(4, 2)
    guidance = task.guidance(None, EXACT)
    assert guidance.method is not None
    edit = functools.partial(edit_images, task, NO_VARIABLES, keys)
    unlabelled = edit(labels, 1.0, start, start, start, guidance)
    expected = edit(labels, 1.0, start, start, start)
    np.testing.assert_allclose(unlabelled, expected, atol=1e-5)
    labelled = edit(jnp.zeros(4, labels.dtype), 1.0, start, start, start, guidance)
    np.testing.assert_allclose((labelled * PATTERN).mean((1, 2, 3)), -0.5, atol=0.1)


def test_a_label_needs_a_class_conditional_network_or_a_classifier():
    keys = jax.random.split(jax.random.key(0), 1)
    alone = denoiser(mixture, 0)
    itself = GuidanceModel(alone, {}, "it")
    for request in (Request(label=1), Request(guidance=2.0)):
        with pytest.raises(UserError, match="needs a class-conditional run, or "):
            sample(alone, NO_VARIABLES, keys, request)
    with pytest.raises(UserError, match="--label needs a class-conditional run"):
        sample(alone, NO_VARIABLES, keys, Request(label=1), itself)
    guided = sample(alone, NO_VARIABLES, keys, Request(guidance=2.0), itself)
    np.testing.assert_allclose(guided, sample(alone, NO_VARIABLES, keys), atol=1e-4)
    with pytest.raises(UserError, match="there are 2 classes"):
        sample(alone, NO_VARIABLES, keys, Request(label=2), EXACT)


def test_an_edit_does_not_change_known_pixels_and_is_closer_to_the_image_for_smaller_t():
    start = jnp.asarray(images(0)) * PATTERN
    labels, keys = jnp.zeros(64, jnp.int32), jax.random.split(jax.random.key(3), 64)
    full, free = jnp.ones_like(start), jnp.zeros_like(start)
    edit = functools.partial(edit_images, denoiser(), NO_VARIABLES, keys, labels)
    np.testing.assert_allclose(edit(1.0, free, start, full), start, atol=1e-6)
    error = [float(jnp.abs(edit(t, start, start, free) - start).mean()) for t in (0.02, 0.3, 1.0)]
    assert error[0] < alpha_sigma(SCHEDULE.logsnr(0.02))[1]  # less than the std of the noise
    assert error[0] < error[1] < error[2]
    half = free.at[:, :2].set(1.0)
    filled = edit(1.0, start, start, half)
    np.testing.assert_allclose(filled[:, :2], start[:, :2], atol=1e-6)
    assert (filled * PATTERN)[:, 2:].mean() == pytest.approx(-0.5, abs=0.03)


def held_out(lower, labels, storage=np.asarray):
    """Return a data set of 12 held-out images with the lower halves of `lower`."""
    images = np.random.default_rng(0).integers(0, 256, (12, *SHAPE), np.uint8)
    images[:, 2:] = lower[:, 2:]
    split = Split(storage(images), storage(np.asarray(labels, np.int32)))
    return Data("x", "x", split, split, 256, ("a", "b"), "")


def computed(array):
    return Computed(lambda row: array[row], range(len(array)), array.shape[1:], array.dtype)


def rows(array):
    return Rows(array, np.arange(len(array)))


def sheets(data):
    """Return the sheets of edits of a data set."""
    context = evaluation_of(denoiser(guidance=1.5), data)
    return edits(context.task, context).images


def test_inpainting_depends_on_neither_hidden_pixels_nor_labels():
    rng = np.random.default_rng(1)
    lower, other_lower = rng.integers(0, 256, (2, 12, *SHAPE), np.uint8)
    sheet = sheets(held_out(lower, np.zeros(12)))["inpainting"]
    other = sheets(held_out(other_lower, np.ones(12)))["inpainting"]
    height = len(sheet) // 4  # the first of four rows shows the images
    assert not np.array_equal(sheet[:height], other[:height])
    np.testing.assert_array_equal(sheet[height + 2 :], other[height + 2 :])


def test_an_edit_from_time_1_starts_from_noise_alone_where_the_mask_is_0():
    start, labels = jnp.asarray(images(0)), jnp.zeros(64, jnp.int32)
    keys, half = jax.random.split(jax.random.key(3), 64), jnp.zeros_like(start).at[:, :2].set(1.0)
    edit = functools.partial(edit_images, denoiser(), NO_VARIABLES, keys, labels)
    filled = edit(1.0, start, start, half)
    changed = jnp.where(half == 0, 0.9, start)
    np.testing.assert_array_equal(filled, edit(1.0, changed, changed, half))
    assert not np.array_equal(filled, edit(0.9, changed, changed, half))


@pytest.mark.parametrize("storage", [computed, rows])
def test_edits_do_not_depend_on_how_images_are_stored(storage):
    lower = np.random.default_rng(1).integers(0, 256, (12, *SHAPE), np.uint8)
    expected = sheets(held_out(lower, np.zeros(12)))
    sheet = sheets(held_out(lower, np.zeros(12), storage))
    assert set(sheet) == {"inpainting", "image_to_image", "interpolation"}
    for name, image in expected.items():
        np.testing.assert_array_equal(sheet[name], image)


def test_invalid_settings_of_sampling_raise_a_field_error():
    with pytest.raises(
        FieldError, match=r'^sampling\.sampler: there is no "dimm"; did you mean "ddim"'
    ):
        ExactDenoiser(predict, cosine(), Sampling("dimm"), classes=2).check()
    with pytest.raises(FieldError, match=r"^sampling\.guidance_interval=3,1: must be LOW,HIGH"):
        denoiser(guidance_interval=(3.0, 1.0))


def test_prediction_of_eps_needs_a_start_where_eps_determines_the_image():
    """At logsnr -20, an error of 0.01 of eps is an error of 220 of x0."""
    cosine_table = from_betas(cosine_betas())
    with pytest.raises(
        FieldError, match=r"^prediction=eps: .* at logsnr -20, where eps does not determine"
    ):
        check_start("eps", cosine_table, Sampling(x0_thresholding="none"))
    check_start("v", cosine_table, Sampling(x0_thresholding="none"))
    check_start("eps", cosine_table, Sampling(x0_thresholding="clip"))
    check_start("eps", cosine_table, Sampling(x0_thresholding="none", steps=20, spacing="leading"))
    check_start("eps", from_betas(linear_betas()), Sampling(x0_thresholding="none"))
