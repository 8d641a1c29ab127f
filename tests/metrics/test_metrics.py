"""Distances of sets: closed forms and independent formulas."""

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
from ddpm_jax.metrics import distances
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


@pytest.mark.parametrize(("n", "m", "shift"), [(20, 20, 0.0), (40, 90, 0.0), (40, 90, 0.3)])
def test_kid_is_unbiased_and_its_error_is_the_spread_over_draws(n, m, shift):
    draws = np.random.default_rng(0)
    found = np.array(
        [
            distances.kernel_distance(draws.normal(shift, 1, (n, 8)), draws.normal(size=(m, 8)))
            for _ in range(300)
        ]
    )
    spread = found[:, 0].std(ddof=1)
    assert found[:, 0].mean() == pytest.approx(true_kid(shift, 8), abs=4 * spread / 300**0.5)
    error = np.sqrt(np.square(found[:, 1]).mean())
    # Where the distributions are equal, the least that the variance can be is taken half of the
    # time, and what is then too much stays below the jackknife's factor of 2.
    assert 0.85 < error / spread < (1.2 if shift else 2**0.5)


def true_kid(shift, d):
    """The squared MMD of N(shift, I) and N(0, I), from the moments of x.y of independent draws."""

    def moment(s, t):  # E (z / d + 1)^3 of z = x.y, x ~ N(s, I), y ~ N(t, I)
        one = d * s * t
        two = one**2 + d * (1 + s**2 + t**2)
        # Third cumulant of the sum of d independent products: E z^3 of one, by moments of each.
        mean, second, third = s * t, (1 + s**2) * (1 + t**2), (s**3 + 3 * s) * (t**3 + 3 * t)
        cumulant = d * (third - 3 * mean * second + 2 * mean**3)
        three = cumulant + 3 * one * two - 2 * one**3
        return three / d**3 + 3 * two / d**2 + 3 * one / d + 1

    return moment(shift, shift) + moment(0, 0) - 2 * moment(shift, 0)


def test_kid_is_the_u_statistic_of_all_pairs_and_its_jackknife_that_of_its_definition():
    draws = np.random.default_rng(1)
    a, b = draws.normal(2.0, 1, (7, 3)), draws.normal(size=(9, 3))  # far apart: no quadratic part

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
    assert 0.7 * variance < error**2 <= variance  # less the quadratic part, which it counts twice
    assert distances.kernel_distance(a[:3], b).error is None
    with pytest.raises(ValueError, match="at least 2 features"):
        distances.kernel_distance(a[:1], b)


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_a_frechet_distances_error_is_the_spread_over_draws(shift):
    """Within the accuracy of 20 groups, and up to sqrt(2) more where distributions are equal."""
    draws = np.random.default_rng(0)
    found = []
    for _ in range(60):
        a, b, c = (
            distances.Grouped(draws.normal(mean, 1, (size, 8)))
            for mean, size in ((shift, 150), (0, 400), (0, 150))
        )
        far, usual = distances.frechet_distance(a, b), distances.frechet_distance(c, b)
        ratio = far.over(usual)
        found.append((far.value, far.error, ratio.value, ratio.error))
    values, errors = np.array(found)[:, ::2], np.array(found)[:, 1::2]
    ratio = np.sqrt(np.square(errors).mean(0)) / values.std(0, ddof=1)
    # 60 spreads are known to 9 %, three times which are allowed.  The ratio's second distance is
    # always one of equal distributions.
    more = np.array([1.0 if shift else 2**0.5, 2**0.5])
    assert (ratio > 0.73).all()
    assert (ratio < 1.27 * more).all()


def test_the_error_of_a_frechet_distance_of_pairs_leaves_both_of_a_pair_out():
    x = gaussian(300, np.zeros(4), np.eye(4))
    one, same = distances.Grouped(x), distances.Grouped(x + 1.0)
    paired = distances.frechet_distance(one, same, paired=True)
    assert paired.value == pytest.approx(4.0)
    assert paired.error == pytest.approx(0, abs=1e-6)  # always apart by the same
    assert distances.frechet_distance(one, same).error > 0.1


def test_distances_without_a_group_are_those_of_the_rest_to_first_order():
    a, b = (
        distances.Grouped(gaussian(2000, np.full(3, mean), np.diag(scales), 1))
        for mean, scales in ((0.0, [1.0, 4.0, 0.5]), (0.7, [2.0, 1.0, 1.0]))
    )
    found = distances.frechet_distance(a, b)
    assert found.value == pytest.approx(distances.frechet(a.moments, b.moments), rel=1e-12)
    exact = (
        [distances.frechet(part, b.moments) for part in a.without()],
        [distances.frechet(a.moments, part) for part in b.without()],
    )
    for ours, theirs in zip(found.without, exact, strict=True):
        error = np.abs(ours - theirs).max()
        assert error < 0.05 * np.ptp(theirs)


def test_groups_left_out_one_by_one_are_the_moments_of_the_rest():
    x = np.random.default_rng(0).normal(size=(47, 3))
    whole = distances.Grouped(x)
    parts = distances.Grouped(x[30:], distances.Grouped(x[:30]))
    np.testing.assert_allclose(parts.moments.covariance, np.cov(x.T), rtol=1e-10)
    sizes = [part.size for part in whole.without()]
    assert len(sizes) == distances.GROUPS
    assert set(sizes) == {44, 45}
    for ours, theirs in zip(parts.without(), whole.without(), strict=True):
        np.testing.assert_allclose(ours.covariance, theirs.covariance, rtol=1e-9)
    total = sum(part.mean * part.size for part in whole.without()) / sum(sizes)
    np.testing.assert_allclose(total, x.mean(0), atol=0.02)  # every image is left out once


def test_the_errors_of_a_score_and_of_a_median_are_the_spread_over_draws():
    draws = np.random.default_rng(0)
    p = draws.dirichlet(np.full(5, 0.4), (300, 200))
    values = np.array([distances.inception_score(some) for some in p])
    errors = np.array([distances.inception_score_error(some) for some in p])
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(values.std(ddof=1), rel=0.2)
    medians = [distances.median(some) for some in draws.exponential(size=(400, 101))]
    spread = np.std([found.value for found in medians], ddof=1)
    assert np.sqrt(np.mean([found.error**2 for found in medians])) == pytest.approx(spread, rel=0.2)
    three = distances.median(np.array([3.0, 1.0, 2.0]))
    # Of 27 bootstrap samples of {1, 2, 3} 7, 13 and 7 have the median 1, 2 and 3.
    assert three == pytest.approx((2.0, (14 / 27) ** 0.5))


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
    """A network that looks at the mean of four quarters, and knows no class."""
    x = np.asarray(images, np.float64)
    half = x.shape[1] // 2
    quarters = [x[:, a:, b:][:, :half, :half].mean((1, 2, 3)) for a in (0, half) for b in (0, half)]
    return np.stack(quarters, 1), np.log(np.full((len(x), 10), 0.1))


def test_quality_knows_the_training_set_from_new_images_and_from_noise():
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
@pytest.mark.parametrize("side", ["training", "held-out", "generated"])
def test_metrics_that_so_few_images_do_not_give_are_left_out(name, side, capfd):
    least = {"fd": 2, "kid": 2, "score": 2, "precision": 4, "recall": 4, "nearest": 1}
    for size in (1, 2, 3, 4):
        sizes = {"training": 30, "held-out": 30, "generated": 30} | {side: size}
        splits = few(sizes["training"], 1), few(sizes["held-out"], 2)
        data = Data("few", "few", *splits, 256, ("a", "b", "c"), "")
        drawn = to_images(few(sizes["generated"], 3).images, 256)
        network = FeatureNetwork(name, pixels)
        found = quality(network, drawn, np.zeros(len(drawn), int), data).metrics
        assert np.isfinite(list(found.values())).all()
        distance = "fid" if name == "inception" else "fd_quarters"
        expected = {f"{word}_{name}": number for word, number in least.items() if word != "fd"}
        expected |= {distance: 2, f"{distance}_ratio": 2}
        for metric, number in expected.items():
            concerned = {
                f"score_{name}": ("generated",),
                f"{distance}_ratio": tuple(sizes),
            }.get(metric, ("generated", "held-out"))
            if metric.startswith("nearest"):
                metric = "nearest"
            assert (metric in found) == (min(sizes[of] for of in concerned) >= number), metric
        said = capfd.readouterr().err
        assert (f"{size} {side}" in said) == (size < (2 if side == "training" else 4))
        assert len(said.splitlines()) <= 1


def test_a_perfect_model_has_a_ratio_near_1_whatever_the_number_of_training_images():
    """Both distances of the ratio are of as many images, which is reported."""
    found = []
    for seed in range(12):
        train, test = few(60, 3 * seed), few(400, 3 * seed + 1)
        data = Data("few", "few", train, test, 256, ("a", "b", "c"), "")
        drawn = to_images(few(500, 3 * seed + 2).images, 256)
        metrics = quality(
            FeatureNetwork("quarters", pixels), drawn, None, data, pixels=False
        ).metrics
        assert metrics["fd_quarters_ratio_images"] == 60
        assert metrics["num_samples"] == 500
        found.append(np.log(metrics["fd_quarters_ratio"]))
    assert abs(np.mean(found)) < 3 * np.std(found, ddof=1) / 12**0.5


def test_a_distance_is_called_fid_in_inceptions_features_alone(tmp_path, monkeypatch, capfd):
    data = load("digits")
    drawn = to_images(data.test.images[:50], data.levels)
    found = quality(FeatureNetwork("inception", pixels), drawn, None, data, pixels=False)
    assert found.metrics["fid"] > 0
    assert found.metrics["fid_to_training"] > 0
    assert found.neighbours is None
    other = quality(FeatureNetwork("quarters", pixels), drawn, None, data).metrics
    assert not [name for name in other if name.startswith("fid")]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load_experiment("ddpm_digits").config
    config = bind(replace(config, {"task.evaluation.features": ("inception",)}), info_of(data))
    assert feature_networks.check_features(config, Loaded(data)) == config
    said = capfd.readouterr().err
    assert "FID is not computed: download pt_inception-2015-12-05-6726825d.pth" in said
    assert len(said.splitlines()) == 1
    wanted = (config, Loaded(data), Options(), train_alone)
    assert feature_networks.load_features(*wanted) == ()
    feature_networks.inception_file().parent.mkdir()
    feature_networks.inception_file().write_bytes(b"nothing of the kind")
    (network,) = feature_networks.load_features(*wanted)
    with pytest.raises(UserError):
        network()
    with pytest.raises(UserError, match="is damaged or another file"):
        feature_networks.check_features(config, Loaded(data))


def test_a_set_looked_at_in_parts_is_the_set_looked_at_whole():
    images = np.random.default_rng(0).uniform(-1, 1, (300, 8, 8, 1))
    network = FeatureNetwork("quarters", pixels)
    whole = extract_features(network, iter([images]))
    parts = extract_features(network, iter([images[:7], images[7:150], images[150:]]))
    np.testing.assert_allclose(parts.moments.covariance, whole.moments.covariance, atol=1e-12)
    np.testing.assert_array_equal(parts.features, whole.features)
    np.testing.assert_array_equal(parts.logs, whole.logs)
