"""Sampling with an exact denoiser: two classes of Gaussian images, or any of both."""

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
from helpers.sampling import NOTHING, context_of, edited, sample
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


def denoiser(predict=predict, classes=2, **how):
    """The task of an exact denoiser, with the settings `how` of its sampling."""
    info = DataInfo("x", SHAPE, 256, classes)
    sampling = Sampling("ddim", 40, "logsnr", **how)
    task = ExactDenoiser(predict, SCHEDULE, sampling, classes=classes, info=info)
    task.check()
    return task


def images(label, **how):
    """Images times the pattern, so that each pixel's mean is the class's."""
    keys = jax.random.split(jax.random.key(0), 64)
    samples = sample(denoiser(**how), NOTHING, keys, Request(label=label))
    return np.asarray(samples * PATTERN)


def test_each_class_is_sampled_with_its_mean_and_deviation():
    for label in (0, 1):
        assert images(label).mean() == pytest.approx(label - 0.5, abs=0.02)
        assert images(label).std() == pytest.approx(STD, rel=0.1)


def test_guidance_moves_the_mean_away_from_the_unconditional_one():
    # Of Gaussians of one variance the guided x0 is that of the mean  0 + 1.5 (0.5 - 0).
    assert images(1, guidance=1.5).mean() == pytest.approx(0.75, abs=0.02)


def test_scales_of_guidance_share_one_program():
    traced = []

    def counted(*arguments):
        traced.append(1)
        return predict(*arguments)

    task, keys = denoiser(counted), jax.random.split(jax.random.key(0), 8)

    def at(scale):
        return sample(task, NOTHING, keys, Request(label=1, guidance=scale)) * PATTERN

    assert at(1.5).mean() == pytest.approx(0.75, abs=0.05)
    once = len(traced)
    assert at(2.0).mean() == pytest.approx(1.0, abs=0.05)
    assert len(traced) == once
    assert at(1.0).mean() == pytest.approx(0.5, abs=0.05)  # unguided, it is another


def test_guidance_acts_within_its_interval_alone():
    guided = images(1, guidance=1.5)
    np.testing.assert_allclose(
        images(1, guidance=1.5, guidance_interval=(90.0, 91.0)), images(1), atol=1e-6
    )
    np.testing.assert_allclose(
        images(1, guidance=1.5, guidance_interval=(-99.0, 99.0)), guided, atol=1e-6
    )
    between = images(1, guidance=1.5, guidance_interval=(-2.0, 2.0)).mean()
    assert images(1).mean() + 0.02 < between < guided.mean() - 0.02


def test_rescaling_takes_guidances_contrast_back():
    strong = images(1, guidance=4.0, x0_thresholding="none")
    assert strong.mean() == pytest.approx(2.0, abs=0.1)
    # x0's deviation over an image is the pattern's size, which is set back to 0.5, or half-way.
    whole = images(1, guidance=4.0, x0_thresholding="none", guidance_rescale=1.0)
    assert whole.mean() == pytest.approx(0.5, abs=0.1)
    half = images(1, guidance=4.0, x0_thresholding="none", guidance_rescale=0.5)
    assert whole.mean() + 0.3 < half.mean() < strong.mean() - 0.3


def test_dynamic_thresholding_keeps_strong_guidance_within_the_range_unsaturated():
    clipped = images(1, guidance=4.0)
    dynamic = images(1, guidance=4.0, x0_thresholding="dynamic")
    assert np.abs(dynamic).max() <= 1 + 1e-5
    assert (np.abs(dynamic) > 0.999).mean() < (np.abs(clipped) > 0.999).mean()


# Guidance models: another network's parameters come as an argument.


def shifted(params, xt, logsnr, labels):
    """A worse model: the exact one of means that are `params` times as large."""
    exact = predict({}, xt, logsnr, labels)
    alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(logsnr))
    change = 1 - alpha**2 * STD**2 / (alpha**2 * STD**2 + sigma**2)
    x0 = exact.x0 + change * (params - 1) * MEANS[labels]
    return Prediction(x0, (xt - alpha * x0) / sigma)


def test_autoguidance_of_scale_0_is_the_worse_model_and_of_1_the_good_one():
    half = jnp.asarray(0.5)
    worse = GuidanceModel(denoiser(shifted), half, "it")
    keys = jax.random.split(jax.random.key(0), 64)

    def at(scale):
        return sample(denoiser(), NOTHING, keys, Request(label=1, guidance=scale), worse) * PATTERN

    expected = sample(denoiser(shifted), Variables(half, {}), keys, Request(label=1)) * PATTERN
    np.testing.assert_allclose(at(0.0), expected, atol=1e-5)
    np.testing.assert_array_equal(at(1.0), images(1))
    # Of Gaussians of one variance the guided mean is  0.25 + 2 (0.5 - 0.25).
    assert at(2.0).mean() == pytest.approx(0.75, abs=0.02)


def log_joint(params, xt, logsnr):
    """log p(x_t | y) + log p(y) of both classes, but for a constant; params: log p(y)."""
    alpha, sigma = alpha_sigma(logsnr)
    apart = jnp.square(xt[:, None] - alpha * MEANS[:2]).sum((2, 3, 4))
    return params - apart / (2 * (alpha**2 * STD**2 + sigma**2))


EVEN = jnp.zeros(2)


def mixture(params, xt, logsnr, labels):
    """The exact denoiser of both classes together, without labels."""
    shares = jax.nn.softmax(log_joint(EVEN, xt, logsnr[0]))
    x0 = sum(
        shares[:, i, None, None, None] * predict({}, xt, logsnr, jnp.full(len(xt), i)).x0
        for i in range(2)
    )
    alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(logsnr))
    return Prediction(x0, (xt - alpha * x0) / sigma)


@dataclasses.dataclass(frozen=True)
class ExactClassifier(Task):
    """The exact classifier of noisy images of both classes; its parameters are log p(y)."""

    classes: int = 2

    def log_likelihood(self, params, xt, logsnr, labels):
        logs = jax.nn.log_softmax(log_joint(params, xt, logsnr))
        picked = jnp.take_along_axis(logs, jnp.minimum(labels, 1)[:, None], 1)[:, 0]
        return jnp.where(labels < 2, picked, 0.0)

    def guide(self, params, scale):
        return ClassifierGuidance(scale, params, self)


EXACT = GuidanceModel(ExactClassifier(), EVEN, "it")


IMAGES = Split(np.zeros((12, *SHAPE), np.uint8), np.zeros(12, np.int32))
NO_DATA = Data("x", "x", IMAGES, IMAGES, 256, ("a", "b"), "")


def evaluation_of(task, data=NO_DATA, model=None):
    """The context of an evaluation of a task, guided by a model if there is one."""
    return context_of(task, NOTHING, data, resources=Resources(guidance=lambda: model))


def test_an_unconditional_model_guided_by_the_exact_classifier_samples_the_class():
    guided = evaluation_of(denoiser(mixture, 0), model=EXACT)
    conditional = evaluation_of(denoiser())
    ours, theirs = guided.samples(100), conditional.samples(100)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_allclose(ours.images, theirs.images, atol=1e-3)
    keys = jax.random.split(jax.random.key(0), 64)
    request = Request(label=0, guidance=0.0)
    unguided = sample(denoiser(mixture, 0), NOTHING, keys, request, EXACT)
    alone = sample(denoiser(mixture, 0), NOTHING, keys)
    np.testing.assert_array_equal(unguided, alone)
    means = (alone * PATTERN).mean((1, 2, 3))
    assert (means > 0.4).any()  # of both classes
    assert (means < -0.4).any()
    for context, guide in ((guided, "it"), (conditional, "labels")):
        about = sample_sheet(context.task, context).about
        assert about["guide"] == guide


def test_without_a_class_a_classifier_pulls_nowhere():
    keys, start = jax.random.split(jax.random.key(3), 4), jnp.zeros((4, *SHAPE))
    task, labels = denoiser(mixture, 0), jnp.full(4, 2)
    guidance = task.guidance(None, EXACT)
    assert guidance.method is not None
    edit = functools.partial(edited, task, NOTHING, keys)
    unlabelled = edit(labels, 1.0, start, start, start, guidance)
    expected = edit(labels, 1.0, start, start, start)
    np.testing.assert_allclose(unlabelled, expected, atol=1e-5)
    pulled = edit(jnp.zeros(4, labels.dtype), 1.0, start, start, start, guidance)
    np.testing.assert_allclose((pulled * PATTERN).mean((1, 2, 3)), -0.5, atol=0.1)


def test_a_label_needs_a_class_conditional_run_or_a_classifier():
    keys = jax.random.split(jax.random.key(0), 1)
    alone = denoiser(mixture, 0)
    itself = GuidanceModel(alone, {}, "it")
    for request in (Request(label=1), Request(guidance=2.0)):
        with pytest.raises(UserError, match="needs a class-conditional run, or "):
            sample(alone, NOTHING, keys, request)
    with pytest.raises(UserError, match="--label needs a class-conditional run"):
        sample(alone, NOTHING, keys, Request(label=1), itself)
    guided = sample(alone, NOTHING, keys, Request(guidance=2.0), itself)
    np.testing.assert_allclose(guided, sample(alone, NOTHING, keys), atol=1e-4)
    with pytest.raises(UserError, match="there are 2 classes"):
        sample(alone, NOTHING, keys, Request(label=2), EXACT)


def test_an_edit_keeps_what_it_knows_and_stays_near_where_it_started():
    start = jnp.asarray(images(0)) * PATTERN
    labels, keys = jnp.zeros(64, jnp.int32), jax.random.split(jax.random.key(3), 64)
    whole, free = jnp.ones_like(start), jnp.zeros_like(start)
    edit = functools.partial(edited, denoiser(), NOTHING, keys, labels)
    np.testing.assert_allclose(edit(1.0, free, start, whole), start, atol=1e-6)
    error = [float(jnp.abs(edit(t, start, start, free) - start).mean()) for t in (0.02, 0.3, 1.0)]
    assert error[0] < alpha_sigma(SCHEDULE.logsnr(0.02))[1]  # as far as the noise led away
    assert error[0] < error[1] < error[2]
    half = free.at[:, :2].set(1.0)
    filled = edit(1.0, start, start, half)
    np.testing.assert_allclose(filled[:, :2], start[:, :2], atol=1e-6)
    assert (filled * PATTERN)[:, 2:].mean() == pytest.approx(-0.5, abs=0.03)


def held_out(lower, labels, kind=np.asarray):
    """A data set whose 10 held-out images have the lower halves `lower`."""
    rows = np.random.default_rng(0).integers(0, 256, (12, *SHAPE), np.uint8)
    rows[:, 2:] = lower[:, 2:]
    split = Split(kind(rows), kind(np.asarray(labels, np.int32)))
    return Data("x", "x", split, split, 256, ("a", "b"), "")


def made(array):
    return Computed(lambda row: array[row], range(len(array)), array.shape[1:], array.dtype)


def sheets(data):
    """The sheets of edits of a data set."""
    context = evaluation_of(denoiser(guidance=1.5), data)
    return edits(context.task, context).images


def test_what_is_inpainted_depends_on_no_hidden_pixel_and_no_label():
    draws = np.random.default_rng(1)
    one, other = draws.integers(0, 256, (2, 12, *SHAPE), np.uint8)
    sheet = sheets(held_out(one, np.zeros(12)))["inpainting"]
    again = sheets(held_out(other, np.ones(12)))["inpainting"]
    high = len(sheet) // 4  # the images themselves are the first row
    assert not np.array_equal(sheet[:high], again[:high])
    np.testing.assert_array_equal(sheet[high + 2 :], again[high + 2 :])


def test_an_edit_from_time_1_starts_from_noise_alone_where_nothing_is_known():
    start, labels = jnp.asarray(images(0)), jnp.zeros(64, jnp.int32)
    keys, half = jax.random.split(jax.random.key(3), 64), jnp.zeros_like(start).at[:, :2].set(1.0)
    edit = functools.partial(edited, denoiser(), NOTHING, keys, labels)
    filled = edit(1.0, start, start, half)
    changed = jnp.where(half == 0, 0.9, start)
    np.testing.assert_array_equal(filled, edit(1.0, changed, changed, half))
    assert not np.array_equal(filled, edit(0.9, changed, changed, half))


@pytest.mark.parametrize("kind", [made, lambda array: Rows(array, np.arange(len(array)))])
def test_images_that_are_made_when_asked_for_are_edited_as_an_array_is(kind):
    lower = np.random.default_rng(1).integers(0, 256, (12, *SHAPE), np.uint8)
    expected, sheet = (sheets(held_out(lower, np.zeros(12), of)) for of in (np.asarray, kind))
    assert set(sheet) == {"inpainting", "image_to_image", "interpolation"}
    for name, image in expected.items():
        np.testing.assert_array_equal(sheet[name], image)


def test_a_way_to_draw_that_makes_no_sense_is_one_line():
    with pytest.raises(
        FieldError, match=r'^sampling\.sampler: there is no "dimm"; did you mean "ddim"'
    ):
        ExactDenoiser(predict, cosine(), Sampling("dimm"), classes=2).check()
    with pytest.raises(FieldError, match=r"^sampling\.guidance_interval=3,1: must be LOW,HIGH"):
        denoiser(guidance_interval=(3.0, 1.0))


def test_eps_that_says_nothing_of_the_image_is_not_divided_by_nothing():
    """At logsnr -20 an error of 1 % in eps is one of 200 in x0."""
    cut = from_betas(cosine_betas())
    with pytest.raises(
        FieldError, match=r"^prediction=eps: .* at logsnr -20, where eps determines no"
    ):
        check_start("eps", cut, Sampling(x0_thresholding="none"))
    check_start("v", cut, Sampling(x0_thresholding="none"))
    check_start("eps", cut, Sampling(x0_thresholding="clip"))
    check_start("eps", cut, Sampling(x0_thresholding="none", steps=20, spacing="leading"))
    check_start("eps", from_betas(linear_betas()), Sampling(x0_thresholding="none"))
