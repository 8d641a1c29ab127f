"""Ways to draw, with a denoiser that is exact: two classes of Gaussian images, or any of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.drawing import Sampling, drawing
from ddpm_jax.errors import UserError
from ddpm_jax.prediction import Prediction
from ddpm_jax.process import alpha_sigma
from ddpm_jax.schedule import cosine
from ddpm_jax.tasks import Request

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


def draw(**how):
    sampling = Sampling("ddim", 40, "logsnr", **how)
    return drawing(predict, lambda params: SCHEDULE, SHAPE, 2, sampling)


def images(label, **how):
    """Images times the pattern, so that each pixel's mean is the class's."""
    keys = jax.random.split(jax.random.key(0), 64)
    return np.asarray(draw(**how).sample({}, {}, keys, Request(label=label)) * PATTERN)


def test_each_class_is_drawn_with_its_mean_and_deviation():
    for label in (0, 1):
        assert images(label).mean() == pytest.approx(label - 0.5, abs=0.02)
        assert images(label).std() == pytest.approx(STD, rel=0.1)


def test_guidance_moves_the_mean_away_from_the_unconditional_one():
    # Of Gaussians of one variance the guided x0 is that of the mean  0 + 1.5 (0.5 - 0).
    assert images(1, guidance=1.5).mean() == pytest.approx(0.75, abs=0.02)


def test_guidance_acts_within_its_interval_alone():
    guided = images(1, guidance=1.5)
    np.testing.assert_allclose(images(1, guidance=1.5, interval=(90.0, 91.0)), images(1), atol=1e-6)
    np.testing.assert_allclose(images(1, guidance=1.5, interval=(-99.0, 99.0)), guided, atol=1e-6)
    between = images(1, guidance=1.5, interval=(-2.0, 2.0)).mean()
    assert images(1).mean() + 0.02 < between < guided.mean() - 0.02


def test_rescaling_takes_guidances_contrast_back():
    strong = images(1, guidance=4.0, limit="none")
    assert strong.mean() == pytest.approx(2.0, abs=0.1)
    # x0's deviation over an image is the pattern's size, which is set back to 0.5, or half-way.
    whole = images(1, guidance=4.0, limit="none", rescale=1.0)
    assert whole.mean() == pytest.approx(0.5, abs=0.1)
    half = images(1, guidance=4.0, limit="none", rescale=0.5)
    assert whole.mean() + 0.3 < half.mean() < strong.mean() - 0.3


def test_dynamic_thresholding_keeps_strong_guidance_within_the_range_unsaturated():
    clipped = images(1, guidance=4.0)
    dynamic = images(1, guidance=4.0, limit="dynamic")
    assert np.abs(dynamic).max() <= 1 + 1e-5
    assert (np.abs(dynamic) > 0.999).mean() < (np.abs(clipped) > 0.999).mean()


def test_an_edit_keeps_what_it_knows_and_stays_near_where_it_started():
    start = jnp.asarray(images(0)) * PATTERN
    labels, keys = jnp.zeros(64, jnp.int32), jax.random.split(jax.random.key(3), 64)
    whole, free = jnp.ones_like(start), jnp.zeros_like(start)
    edit = draw().edit
    np.testing.assert_allclose(edit({}, keys, labels, 1.0, free, start, whole), start, atol=1e-6)
    error = [
        float(jnp.abs(edit({}, keys, labels, t, start, start, free) - start).mean())
        for t in (0.02, 0.3, 1.0)
    ]
    assert error[0] < alpha_sigma(SCHEDULE.logsnr(0.02))[1]  # as far as the noise led away
    assert error[0] < error[1] < error[2]
    half = free.at[:, :2].set(1.0)
    filled = edit({}, keys, labels, 1.0, start, start, half)
    np.testing.assert_allclose(filled[:, :2], start[:, :2], atol=1e-6)
    assert (filled * PATTERN)[:, 2:].mean() == pytest.approx(-0.5, abs=0.03)


def test_a_way_to_draw_that_makes_no_sense_is_one_line():
    with pytest.raises(UserError, match='there is no "dimm"; did you mean "ddim"'):
        drawing(predict, lambda params: cosine(), SHAPE, 2, Sampling("dimm"))
    with pytest.raises(UserError, match="guidance_interval=3,1: must rise"):
        draw(interval=(3.0, 1.0))
