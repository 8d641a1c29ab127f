"""Distances of sets: closed forms, independent formulas, and a classifier that judges."""

import dataclasses

import numpy as np
import pytest

from ddpm_jax import judge as judges
from ddpm_jax.classifier import Judge
from ddpm_jax.data.loader import load
from ddpm_jax.errors import UserError
from ddpm_jax.metrics import distances
from ddpm_jax.metrics.quality import look, quality
from ddpm_jax.run import Loaded, Options
from ddpm_jax.tasks import to_images
from experiments import classifier_digits, ddpm_digits


def gaussian(size, mean, covariance, seed=0):
    return np.random.default_rng(seed).multivariate_normal(mean, covariance, size)


def moments_of(mean, covariance, size=10**6):
    covariance = np.asarray(covariance, float)
    return distances.Moments(size, np.asarray(mean, float), covariance * (size - 1))


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
    # |m|^2 + sum (s_a - s_b)^2 for diagonal covariances s^2.
    a = moments_of([1.0, 2.0, 0.0], np.diag([1.0, 4.0, 9.0]))
    b = moments_of([0.0, 0.0, 0.0], np.diag([4.0, 4.0, 1.0]))
    assert distances.frechet(a, b) == pytest.approx(5 + 1 + 0 + 4, rel=1e-12)


def test_frechet_distance_is_scipys_matrix_root():
    from scipy.linalg import sqrtm

    draws = np.random.default_rng(0).normal(size=(2, 6, 6))
    a, b = (moments_of(m[0], m @ m.T + 0.1 * np.eye(6)) for m in draws)
    root = np.trace(sqrtm(a.covariance @ b.covariance)).real
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance) - 2 * root
    assert distances.frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert distances.frechet(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_real_and_nothing_where_covariances_are_singular():
    few = distances.moments(np.random.default_rng(0).normal(size=(5, 20)))  # rank 4 of 20
    assert abs(distances.frechet(few, few)) < 1e-6
    point = moments_of(np.ones(20), np.zeros((20, 20)))
    expected = np.square(few.mean - 1).sum() + np.trace(few.covariance)
    assert distances.frechet(few, point) == pytest.approx(expected, rel=1e-9)


def test_moments_of_parts_are_the_moments_of_the_whole():
    x = np.random.default_rng(0).normal(3.0, 2.0, (100, 4))
    parts = distances.moments(x[:7])
    parts = distances.moments(x[7:60], parts)
    parts = distances.moments(x[60:], parts)
    np.testing.assert_allclose(parts.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(parts.covariance, np.cov(x.T), rtol=1e-12)


def test_kid_is_unbiased_zero_between_draws_of_one_law_and_right_for_shifted_ones():
    a, b = gaussian(800, [0, 0], np.eye(2), 1), gaussian(800, [0, 0], np.eye(2), 2)
    mean, deviation = distances.kernel_distance(a, b, size=200)
    assert abs(mean) < 4 * deviation / 4  # about 4 disjoint subsets' worth of draws
    # E k(x, y) = E (x.y / D + 1)^3 of one dimension, by moments of products of Gaussians.
    far = gaussian(20000, [1.0], [[1.0]], 3), gaussian(20000, [0.0], [[1.0]], 4)

    def moment(m, n):  # E (x y + 1)^3 of x ~ N(m, 1), y ~ N(n, 1)
        first = [1, m, m**2 + 1, m**3 + 3 * m]
        second = [1, n, n**2 + 1, n**3 + 3 * n]
        return sum(c * p * q for c, p, q in zip([1, 3, 3, 1], first, second, strict=True))

    expected = moment(1, 1) + moment(0, 0) - 2 * moment(1, 0)
    mean, deviation = distances.kernel_distance(*far, size=1000, subsets=20)
    assert mean == pytest.approx(expected, abs=4 * deviation / 20**0.5)


def test_inception_score_is_the_number_of_classes_when_sure_and_even():
    assert distances.inception_score(np.eye(10).repeat(3, 0)) == pytest.approx(10)
    assert distances.inception_score(np.full((5, 10), 0.1)) == pytest.approx(1)


def test_precision_and_recall_see_missing_and_false_modes():
    left, right = gaussian(300, [-50, 0], np.eye(2), 0), gaussian(300, [50, 0], np.eye(2), 1)
    both = np.concatenate([left, right])
    precision, recall = distances.precision_recall(both, gaussian(300, [-50, 0], np.eye(2), 2))
    assert precision > 0.95
    assert 0.4 < recall < 0.52
    precision, recall = distances.precision_recall(left, np.concatenate([both, both + 0.01]))
    assert 0.45 < precision < 0.55
    assert recall > 0.95


def test_the_nearest_is_the_nearest():
    a, b = np.random.default_rng(0).normal(size=(2, 1500, 3))
    distance, which = distances.nearest(a[:1200], b)
    expected = np.linalg.norm(a[:1200, None] - b, axis=-1)
    np.testing.assert_array_equal(which, expected.argmin(1))
    np.testing.assert_allclose(distance, expected.min(1), atol=1e-6)


def pixels(images):
    """A judge that looks at the mean of four quarters, and knows no class."""
    x = np.asarray(images, np.float64)
    half = x.shape[1] // 2
    quarters = [x[:, a:, b:][:, :half, :half].mean((1, 2, 3)) for a in (0, half) for b in (0, half)]
    return np.stack(quarters, 1), np.log(np.full((len(x), 10), 0.1))


def test_quality_knows_the_training_set_from_new_images_and_from_noise():
    data = load("digits")
    judge = Judge("quarters", pixels)
    train = to_images(data.train.images, data.levels)
    copied = quality(judge, train[:500], data.train.labels[:500], data).metrics
    assert copied["nearest_ratio"] < 0.01  # every image is a training image
    held_out = quality(judge, to_images(data.test.images, data.levels), None, data).metrics
    assert held_out["nearest_ratio"] == pytest.approx(1)
    assert held_out["fd_quarters"] == pytest.approx(0, abs=1e-9)
    assert "recognised" not in held_out
    noise = np.random.default_rng(0).uniform(-1, 1, (500, 8, 8, 1))
    assert quality(judge, noise, None, data).metrics["fd_quarters_ratio"] > 20


def test_a_distance_is_called_fid_in_inceptions_features_alone(tmp_path, monkeypatch, capfd):
    data = load("digits")
    drawn = to_images(data.test.images[:50], data.levels)
    found = quality(Judge("inception", pixels), drawn, None, data, pixels=False)
    assert found.metrics["fid"] > 0
    assert found.metrics["fid_to_training"] > 0
    assert found.neighbours is None
    other = quality(Judge("quarters", pixels), drawn, None, data).metrics
    assert not [name for name in other if "fid" in name]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = dataclasses.replace(ddpm_digits.Config(), judge="none", fid=True)
    assert judges.with_judge(classifier_digits, config, Loaded(data), Options()) == config
    said = capfd.readouterr().err
    assert "no FID: put pt_inception-2015-12-05-6726825d.pth" in said
    assert len(said.splitlines()) == 1
    assert judges.judges_of(classifier_digits, config) == ()
    judges.inception_file().parent.mkdir()
    judges.inception_file().write_bytes(b"nothing of the kind")
    (judge,) = judges.judges_of(classifier_digits, config)
    with pytest.raises(UserError):
        judge()


def test_a_set_looked_at_in_parts_is_the_set_looked_at_whole():
    images = np.random.default_rng(0).uniform(-1, 1, (300, 8, 8, 1))
    judge = Judge("quarters", pixels)
    whole = look(judge, iter([images]))
    parts = look(judge, iter([images[:7], images[7:150], images[150:]]))
    np.testing.assert_allclose(parts.moments.covariance, whole.moments.covariance, atol=1e-12)
    np.testing.assert_array_equal(parts.features, whole.features)
    np.testing.assert_array_equal(parts.logs, whole.logs)


def test_a_classifier_is_trained_once_and_judges(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, options = Loaded(load("digits")), Options(debug=True)

    @dataclasses.dataclass(frozen=True)
    class Config:
        judge: str = "auto"
        fid: bool = False

    config = judges.with_judge(classifier_digits, Config(), loaded, options)
    assert "training classifier_digits once" in capfd.readouterr().err
    assert judges.with_judge(classifier_digits, Config(), loaded, options) == config
    assert "training" not in capfd.readouterr().err
    assert judges.with_judge(classifier_digits, config, loaded, options) == config
    judge = judges.load_judge(classifier_digits, config.judge)
    features, logs = judge.see(to_images(loaded.data.test.images[:7], 17))
    assert judge.name == "classifier_digits"
    assert features.shape == (7, 64)
    np.testing.assert_allclose(np.exp(logs).sum(1), 1, rtol=1e-5)
    none = Config("none")
    assert judges.with_judge(classifier_digits, none, loaded, options) == none
