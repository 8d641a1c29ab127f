"""Distances of sets of images against closed forms and independent formulas."""

import numpy as np
import pytest

from ddpm_jax.config import replace
from ddpm_jax.data.loader import load
from ddpm_jax.data.types import Data, Loaded, Split, info_of
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import feature_networks
from ddpm_jax.experiment.registry import load_experiment
from ddpm_jax.experiment.train import train_alone
from ddpm_jax.experiment.types import Options, bind
from ddpm_jax.metrics import distances, neighbours
from ddpm_jax.metrics.features import FeatureNetwork
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.metrics.quality import extract_features, quality


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


def test_frechet_distance_agrees_with_the_matrix_square_root_of_scipy():
    from scipy.linalg import sqrtm

    matrices = np.random.default_rng(0).normal(size=(2, 6, 6))
    a, b = (moments_of(m[0], m @ m.T + 0.1 * np.eye(6)) for m in matrices)
    root = np.trace(sqrtm(a.covariance @ b.covariance)).real
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance) - 2 * root
    assert distances.frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert distances.frechet(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_equal_sets_with_singular_covariances_is_0():
    few = distances.moments(np.random.default_rng(0).normal(size=(5, 20)))  # rank 4 of 20
    assert abs(distances.frechet(few, few)) < 1e-6
    point = moments_of(np.ones(20), np.zeros((20, 20)))
    expected = np.square(few.mean - 1).sum() + np.trace(few.covariance)
    assert distances.frechet(few, point) == pytest.approx(expected, rel=1e-9)


def test_moments_of_parts_combine_to_the_moments_of_the_set():
    x = np.random.default_rng(0).normal(3.0, 2.0, (100, 4))
    parts = distances.moments(x[:7])
    parts = distances.moments(x[7:60], parts)
    parts = distances.moments(x[60:], parts)
    np.testing.assert_allclose(parts.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(parts.covariance, np.cov(x.T), rtol=1e-12)


@pytest.mark.parametrize(("n", "m", "shift"), [(20, 20, 0.0), (40, 90, 0.0), (40, 90, 0.3)])
def test_kid_is_unbiased_and_its_error_is_its_std_over_random_sets(n, m, shift):
    rng = np.random.default_rng(0)
    estimates = np.array(
        [
            distances.kernel_distance(rng.normal(shift, 1, (n, 8)), rng.normal(size=(m, 8)))
            for _ in range(300)
        ]
    )
    spread = estimates[:, 0].std(ddof=1)
    assert estimates[:, 0].mean() == pytest.approx(true_kid(shift, 8), abs=4 * spread / 300**0.5)
    error = np.sqrt(np.square(estimates[:, 1]).mean())
    # For equal distributions, about half of the estimates are replaced by the lower bound of the
    # variance. The mean is then too large, but by less than the factor 2 of the jackknife.
    assert 0.85 < error / spread < (1.2 if shift else 2**0.5)


def true_kid(shift, d):
    """Return the squared MMD of N(shift, I) and N(0, I), from the moments of x.y."""

    def moment(s, t):  # E (z / d + 1)^3 of z = x.y, x ~ N(s, I), y ~ N(t, I)
        one = d * s * t
        two = one**2 + d * (1 + s**2 + t**2)
        # The third cumulant of z is the sum of those of d independent products.
        mean, second, third = s * t, (1 + s**2) * (1 + t**2), (s**3 + 3 * s) * (t**3 + 3 * t)
        cumulant = d * (third - 3 * mean * second + 2 * mean**3)
        three = cumulant + 3 * one * two - 2 * one**3
        return three / d**3 + 3 * two / d**2 + 3 * one / d + 1

    return moment(shift, shift) + moment(0, 0) - 2 * moment(shift, 0)


def test_kid_and_its_jackknife_agree_with_their_definitions():
    rng = np.random.default_rng(1)
    a, b = rng.normal(2.0, 1, (7, 3)), rng.normal(size=(9, 3))  # the quadratic part is small

    def unbiased(x, y):
        xx, yy, xy = ((u @ v.T / 3 + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        n, m = len(x), len(y)
        inside = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (
            m * (m - 1)
        )
        return inside - 2 * xy.mean()

    value, error = distances.kernel_distance(a, b)
    assert value == pytest.approx(unbiased(a, b), rel=1e-9)
    variance = 6 * np.var([unbiased(np.delete(a, i, 0), b) for i in range(7)])
    variance += 8 * np.var([unbiased(a, np.delete(b, i, 0)) for i in range(9)])
    assert 0.7 * variance < error**2 <= variance  # the jackknife counts the quadratic part twice
    assert distances.kernel_distance(a[:3], b).error is None
    with pytest.raises(ValueError, match="at least 2 images"):
        distances.kernel_distance(a[:1], b)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_the_error_of_a_frechet_distance_is_its_std_over_random_sets(shift):
    """The error of 20 groups is inexact, and up to sqrt(2) too large for equal distributions."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(60):
        a, b, c = (
            distances.GroupedMoments(rng.normal(mean, 1, (size, 8)))
            for mean, size in ((shift, 150), (0, 400), (0, 150))
        )
        distance = distances.frechet_distance(a, b)
        ratio = distance.divided_by(distances.frechet_distance(c, b))
        rows.append((distance.value, distance.error, ratio.value, ratio.error))
    values, errors = np.array(rows)[:, ::2], np.array(rows)[:, 1::2]
    ratio = np.sqrt(np.square(errors).mean(0)) / values.std(0, ddof=1)
    # The std of 60 values is accurate to 9 %; the test allows three times as much. The denominator
    # of the ratio is always a distance of equal distributions.
    excess = np.array([1.0 if shift else 2**0.5, 2**0.5])
    assert (ratio > 0.73).all()
    assert (ratio < 1.27 * excess).all()


def test_the_error_of_a_frechet_distance_of_pairs_leaves_out_both_images_of_a_pair():
    x = gaussian(300, np.zeros(4), np.eye(4))
    original, shifted = distances.GroupedMoments(x), distances.GroupedMoments(x + 1.0)
    paired = distances.frechet_distance(original, shifted, paired=True)
    assert paired.value == pytest.approx(4.0)
    assert paired.error == pytest.approx(0, abs=1e-6)  # the shift is the same for all pairs
    assert distances.frechet_distance(original, shifted).error > 0.1


def test_distances_without_a_group_are_right_to_first_order():
    a, b = (
        distances.GroupedMoments(gaussian(2000, np.full(3, mean), np.diag(scales), 1))
        for mean, scales in ((0.0, [1.0, 4.0, 0.5]), (0.7, [2.0, 1.0, 1.0]))
    )
    result = distances.frechet_distance(a, b)
    assert result.value == pytest.approx(distances.frechet(a.moments, b.moments), rel=1e-12)
    exact = (
        [distances.frechet(part, b.moments) for part in a.without()],
        [distances.frechet(a.moments, part) for part in b.without()],
    )
    for first_order, expected in zip(result.without, exact, strict=True):
        error = np.abs(first_order - expected).max()
        assert error < 0.05 * np.ptp(expected)


def test_moments_without_each_group_do_not_depend_on_parts():
    x = np.random.default_rng(0).normal(size=(47, 3))
    whole = distances.GroupedMoments(x)
    parts = distances.GroupedMoments(x[30:], distances.GroupedMoments(x[:30]))
    np.testing.assert_allclose(parts.moments.covariance, np.cov(x.T), rtol=1e-10)
    sizes = [part.size for part in whole.without()]
    assert len(sizes) == distances.GROUPS
    assert set(sizes) == {44, 45}
    for combined, direct in zip(parts.without(), whole.without(), strict=True):
        np.testing.assert_allclose(combined.covariance, direct.covariance, rtol=1e-9)
    total = sum(part.mean * part.size for part in whole.without()) / sum(sizes)
    np.testing.assert_allclose(total, x.mean(0), atol=0.02)  # every image is left out once


def test_the_errors_of_a_score_and_of_a_median_are_their_std_over_random_sets():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(5, 0.4), (300, 200))
    values = np.array([distances.inception_score(rows) for rows in p])
    errors = np.array([distances.inception_score_error(rows) for rows in p])
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(values.std(ddof=1), rel=0.2)
    medians = [distances.median(row) for row in rng.exponential(size=(400, 101))]
    spread = np.std([median.value for median in medians], ddof=1)
    assert np.sqrt(np.mean([median.error**2 for median in medians])) == pytest.approx(
        spread, rel=0.2
    )
    three = distances.median(np.array([3.0, 1.0, 2.0]))
    # Of 27 bootstrap samples of {1, 2, 3} 7, 13 and 7 have the median 1, 2 and 3.
    assert three == pytest.approx((2.0, (14 / 27) ** 0.5))


def test_inception_score_of_certain_and_balanced_classes_is_their_number():
    assert distances.inception_score(np.eye(10).repeat(3, 0)) == pytest.approx(10)
    assert distances.inception_score(np.full((5, 10), 0.1)) == pytest.approx(1)


def test_precision_and_recall_detect_missing_and_false_modes():
    left, right = gaussian(300, [-50, 0], np.eye(2), 0), gaussian(300, [50, 0], np.eye(2), 1)
    both = np.concatenate([left, right])
    precision, recall = neighbours.precision_recall(both, gaussian(300, [-50, 0], np.eye(2), 2))
    assert precision > 0.95
    assert 0.4 < recall < 0.52
    precision, recall = neighbours.precision_recall(left, np.concatenate([both, both + 0.01]))
    assert 0.45 < precision < 0.55
    assert recall > 0.95


def test_nearest_neighbours_agree_with_all_distances():
    a, b = np.random.default_rng(0).normal(size=(2, 1500, 3))
    distance, index = neighbours.nearest_neighbours(a[:1200], b)
    expected = np.linalg.norm(a[:1200, None] - b, axis=-1)
    np.testing.assert_array_equal(index, expected.argmin(1))
    np.testing.assert_allclose(distance, expected.min(1), atol=1e-6)


def pixels(images):
    """Return the mean of each quarter of the images as features, and uniform classes."""
    x = np.asarray(images, np.float64)
    half = x.shape[1] // 2
    quarters = [x[:, a:, b:][:, :half, :half].mean((1, 2, 3)) for a in (0, half) for b in (0, half)]
    return np.stack(quarters, 1), np.log(np.full((len(x), 10), 0.1))


def test_quality_distinguishes_training_images_held_out_images_and_noise():
    data = load("digits")
    network = FeatureNetwork("quarters", pixels)
    train = to_images(data.train.images, data.levels)
    copied = quality(network, train[:500], data.train.labels[:500], data).metrics
    assert copied["nearest_ratio"] < 0.01  # every image is a training image
    held_out = quality(network, to_images(data.test.images, data.levels), None, data).metrics
    assert held_out["nearest_ratio"] == pytest.approx(1)
    assert held_out["fd_quarters"] == pytest.approx(0, abs=1e-9)
    assert "classifier_accuracy" not in held_out
    noise = np.random.default_rng(0).uniform(-1, 1, (500, 8, 8, 1))
    assert quality(network, noise, None, data).metrics["fd_quarters_ratio"] > 20


def few(size, seed=0, side=4):
    images = np.random.default_rng(seed).integers(0, 256, (size, side, side, 1), np.uint8)
    return Split(images, np.arange(size, dtype=np.int32) % 3)


@pytest.mark.parametrize("name", ["quarters", "inception"])
@pytest.mark.parametrize("side", ["training", "held-out", "sampled"])
def test_metrics_that_need_more_images_are_left_out(name, side, capfd):
    least = {"fd": 2, "kid": 2, "score": 2, "precision": 4, "recall": 4, "nearest": 1}
    for size in (1, 2, 3, 4):
        sizes = {"training": 30, "held-out": 30, "sampled": 30} | {side: size}
        splits = few(sizes["training"], 1), few(sizes["held-out"], 2)
        data = Data("few", "few", *splits, 256, ("a", "b", "c"), "")
        samples = to_images(few(sizes["sampled"], 3).images, 256)
        network = FeatureNetwork(name, pixels)
        metrics = quality(network, samples, np.zeros(len(samples), int), data).metrics
        assert np.isfinite(list(metrics.values())).all()
        distance = "fid" if name == "inception" else "fd_quarters"
        expected = {f"{word}_{name}": number for word, number in least.items() if word != "fd"}
        expected |= {distance: 2, f"{distance}_ratio": 2}
        for metric, number in expected.items():
            concerned = {
                f"score_{name}": ("sampled",),
                f"{distance}_ratio": tuple(sizes),
            }.get(metric, ("sampled", "held-out"))
            if metric.startswith("nearest"):
                metric = "nearest"
            assert (metric in metrics) == (min(sizes[s] for s in concerned) >= number), metric
        logged = capfd.readouterr().err
        assert (f"{size} {side}" in logged) == (size < (2 if side == "training" else 4))
        assert len(logged.splitlines()) <= 1


def test_a_perfect_model_has_a_ratio_near_1_whatever_the_number_of_training_images():
    """Both distances of the ratio are of equally many images, and their number is a metric."""
    log_ratios = []
    for seed in range(12):
        train, test = few(60, 3 * seed), few(400, 3 * seed + 1)
        data = Data("few", "few", train, test, 256, ("a", "b", "c"), "")
        samples = to_images(few(500, 3 * seed + 2).images, 256)
        metrics = quality(
            FeatureNetwork("quarters", pixels), samples, None, data, pixels=False
        ).metrics
        assert metrics["fd_quarters_ratio_images"] == 60
        assert metrics["num_samples"] == 500
        log_ratios.append(np.log(metrics["fd_quarters_ratio"]))
    assert abs(np.mean(log_ratios)) < 3 * np.std(log_ratios, ddof=1) / 12**0.5


def test_only_the_distance_of_inception_features_is_named_fid(tmp_path, monkeypatch, capfd):
    data = load("digits")
    samples = to_images(data.test.images[:50], data.levels)
    result = quality(FeatureNetwork("inception", pixels), samples, None, data, pixels=False)
    assert result.metrics["fid"] > 0
    assert result.metrics["fid_to_training"] > 0
    assert result.nearest_training_images is None
    other = quality(FeatureNetwork("quarters", pixels), samples, None, data).metrics
    assert not [name for name in other if name.startswith("fid")]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load_experiment("ddpm_digits").config
    config = bind(replace(config, {"task.evaluation.features": ("inception",)}), info_of(data))
    assert feature_networks.check_features(config, Loaded(data)) == config
    logged = capfd.readouterr().err
    assert "weights are missing: download pt_inception-2015-12-05-6726825d.pth" in logged
    assert len(logged.splitlines()) == 1
    arguments = (config, Loaded(data), Options(), train_alone)
    assert feature_networks.load_features(*arguments) == ()
    feature_networks.inception_file().parent.mkdir()
    feature_networks.inception_file().write_bytes(b"nothing of the kind")
    (network,) = feature_networks.load_features(*arguments)
    with pytest.raises(UserError):
        network()
    with pytest.raises(UserError, match="is damaged or another file"):
        feature_networks.check_features(config, Loaded(data))


def test_features_of_chunks_are_the_features_of_the_set():
    images = np.random.default_rng(0).uniform(-1, 1, (300, 8, 8, 1))
    network = FeatureNetwork("quarters", pixels)
    whole = extract_features(network, iter([images]))
    parts = extract_features(network, iter([images[:7], images[7:150], images[150:]]))
    np.testing.assert_allclose(parts.moments.covariance, whole.moments.covariance, atol=1e-12)
    np.testing.assert_array_equal(parts.features, whole.features)
    np.testing.assert_array_equal(parts.log_probs, whole.log_probs)
