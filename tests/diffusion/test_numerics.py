"""Values and gradients in float32 and with unused branches, against float64 and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ddpm_jax.config import override, replace
from ddpm_jax.data.types import Batch, DataInfo
from ddpm_jax.diffusion import (
    elbo,
    grids,
    guidance,
    inversion,
    losses,
    prediction,
    process,
    samplers,
    schedules,
)
from ddpm_jax.diffusion.prediction import Prediction
from ddpm_jax.diffusion.times import (
    empty_history,
    importance_times,
    stratified_times,
    uniform_times,
)
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.registry import load_experiment
from ddpm_jax.experiment.requests import Request, resolve
from ddpm_jax.experiment.types import bind, checked_task
from ddpm_jax.fields import FieldError
from ddpm_jax.metrics.per_example import evaluation_times
from ddpm_jax.tasks.image_sampler import Sampling, check_start
from ddpm_jax.training import step as step_module
from helpers.sampling import NO_VARIABLES, edit_images
from helpers.tasks import ExactDenoiser

SPACINGS = ("leading", "trailing", "linspace", "quadratic", "logsnr", "rho7")
SCHEDULES = {
    "linear_betas": lambda: schedules.from_betas(schedules.linear_betas()),
    "cosine_betas": lambda: schedules.from_betas(schedules.cosine_betas()),
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
    "edm": schedules.edm,
    "shifted": lambda: schedules.shifted(schedules.cosine(), 0.5),
    "learned": lambda: schedules.learned(schedules.learned_init(jax.random.key(0))),
}


# Gradients of unused branches.


@pytest.mark.parametrize("betas", [schedules.cosine_betas, schedules.linear_betas])
@pytest.mark.parametrize("x64", [False, True])
def test_the_gradient_of_the_bound_at_every_step_is_that_of_the_selected_branch(betas, x64):
    """In float32 the gradients are finite; in float64 they are also equal, up to rounding."""
    with jax.enable_x64(x64):
        check_gradients(schedules.from_betas(betas(4000)), 4000, x64)


def check_gradients(schedule, steps, compare):
    x0 = jnp.array([-1.0, 1.0, 26 / 255 * 2 - 1, 0.0039215])
    keys = jax.random.split(jax.random.key(0), steps)
    number = jnp.arange(1, steps + 1)
    logsnr_t, logsnr_s = schedule.logsnr(number / steps), schedule.logsnr((number - 1) / steps)
    minimum = jnp.log(process.q_posterior(x0[0], x0[0], schedule.logsnr(2 / steps), logsnr_t[0])[1])
    share = jnp.array([0.1, 0.5, 0.9, 1.0])

    def gradients(key, logsnr_t, logsnr_s):
        eps, out = jax.random.normal(key, (2, 4))
        xt = process.q_sample(x0, eps, logsnr_t)

        def predicted(out, share):
            return prediction.to_prediction("eps", out, xt, logsnr_t)._replace(
                variance_fraction=share
            )

        def bound(out, share):
            arguments = (x0, xt, logsnr_t, logsnr_s, minimum)
            return elbo.step_nats(predicted(out, share), *arguments, variance="learned")

        def inner(out, share):
            return elbo.step_kl(predicted(out, share), x0, xt, logsnr_t, logsnr_s, "learned")

        def last(out, share):
            log_beta = jax.nn.log_sigmoid(-logsnr_t)
            std = jnp.exp(0.5 * (minimum + share * (log_beta - minimum)))
            return elbo.decoder_nll(predicted(out, share), x0, std)

        def vlb(share):
            arguments = (x0, xt, logsnr_t, logsnr_s, minimum, steps)
            return losses.variance_bound(predicted(out, share), *arguments)

        both = lambda fn: jax.value_and_grad(fn, (0, 1))(out, share)  # noqa: E731
        return both(bound), both(inner), both(last), jax.value_and_grad(vlb)(share)

    bound, inner, last, vlb = jax.jit(jax.vmap(gradients))(keys, logsnr_t, logsnr_s)
    for a, kl, decoder in zip(*map(jax.tree.leaves, (bound, inner, last)), strict=True):
        assert jnp.isfinite(a).all()
        if compare:
            np.testing.assert_allclose(a[0], decoder[0], rtol=1e-9)
            np.testing.assert_allclose(a[1:], kl[1:], rtol=1e-9, atol=1e-12)
    nats, (_, slope) = bound
    scale = steps / (4 * np.log(2))
    assert jnp.isfinite(vlb[1]).all()
    if compare:
        np.testing.assert_allclose(vlb[0], scale * nats, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(vlb[1], scale * slope, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_the_decoder_is_exact_for_any_error_of_the_prediction():
    """In the tail d/dmean of -log(mass) is (mean - nearer edge) / std^2, up to a factor 1 / z^2."""
    x0, std = jnp.float32(77 / 255 * 2 - 1), 1e-3
    means = jnp.array([1e-2, 1e-1, 1.0, 1e2, 1e5, 1e8]) + x0
    nll = lambda mean: elbo.decoder_nll(Prediction(mean, mean), x0, std)  # noqa: E731
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(nll)))(means)
    assert jnp.isfinite(values).all()
    distance = np.asarray(means, np.float64) - np.float64(x0) - 1 / 255
    np.testing.assert_allclose(slopes, distance / std**2, rtol=0.03)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_the_gradient_of_a_sample_is_its_difference_quotient(name):

    def total(xT, mean):
        def denoise(xt, logsnr):
            alpha, sigma = process.alpha_sigma(logsnr)
            x0 = jnp.tanh(mean + 0.5 * alpha * xt)
            return Prediction(x0, (xt - alpha * x0) / sigma, jax.nn.sigmoid(mean * xt))

        keys = jax.random.split(jax.random.key(1), 2)
        logsnrs = jnp.array([-6.0, -3.0, 0.0, 2.0, jnp.inf])
        return samplers.sample(samplers.named(name, 4), denoise, logsnrs, keys, xT).sum()

    with jax.enable_x64(True):
        xT, mean = jnp.array([[0.3], [-1.2]]), jnp.asarray(0.4)
        slopes = jax.jit(jax.grad(total, (0, 1)))(xT, mean)
        delta = 1e-5
        ends = jax.jit(jax.vmap(lambda change: total(xT, mean + change)))(
            jnp.array([-delta, delta])
        )
        assert jnp.isfinite(slopes[0]).all()
        np.testing.assert_allclose(slopes[1], (ends[1] - ends[0]) / (2 * delta), rtol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "sigmoid", "edm", "linear", "learned"])
def test_the_slopes_of_a_schedule_and_of_its_inverse_are_finite_and_reciprocal(name):
    schedule = SCHEDULES[name]()
    t = jnp.linspace(0.05, 0.95, 19)
    slope = jax.jit(jax.vmap(jax.grad(schedule.logsnr)))(t)
    assert (slope < 0).all()
    if name == "learned":
        return  # the inverse is computed by bisection
    inverse = jax.jit(jax.vmap(jax.grad(schedule.time)))
    np.testing.assert_allclose(inverse(schedule.logsnr(t)) * slope, 1.0, rtol=1e-3)
    assert jnp.isfinite(inverse(jnp.array([-1e3, -200.0, 0.0, 200.0, 1e3]))).all()


def test_rescaled_guidance_does_not_change_an_image_of_equal_pixels():
    logsnr = jnp.asarray(0.3)
    varied = jnp.linspace(-1, 1, 9).reshape(1, 3, 3)
    flat = jnp.full((1, 3, 3), 0.1)

    def rescale(x0, target):
        return guidance.rescaled(Prediction(x0, x0), Prediction(target, target), x0, logsnr, 0.7)

    np.testing.assert_array_equal(rescale(flat, varied).x0, flat)
    np.testing.assert_allclose(rescale(varied, flat).x0, 0.3 * varied, rtol=1e-3)
    np.testing.assert_allclose(rescale(2 * varied, varied).x0, 1.3 * varied, rtol=1e-5)
    for pair in ((flat, varied), (varied, flat), (flat, flat)):
        slopes = jax.jit(jax.grad(lambda a, b: rescale(a, b).x0.sum(), (0, 1)))(*pair)
        assert jnp.isfinite(slopes[0]).all()
        assert jnp.isfinite(slopes[1]).all()


@pytest.fixture
def optimised():
    """Compile with all optimizations, for programs that run for minutes."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
def test_the_first_200_gradients_of_iddpm_cifar10_are_finite(optimised):
    """Table, keys, batch and images are those of the recipe; the network is smaller."""
    cheap = dict(space_to_depth=4, blocks=1, attention_sizes=(8,), channels=32, head_channels=32)
    small = {f"task.network.{name}": value for name, value in cheap.items()}
    small["task.evaluation.features"] = ()
    config = replace(load_experiment("iddpm_cifar10").config, small)
    config = bind(config, DataInfo("cifar10", (32, 32, 3), 256, 10))
    task = checked_task(config)
    rng = np.random.default_rng(0)
    size = config.train.batch_size

    def batch():
        images = rng.integers(0, 256, (size, 32, 32, 3), np.uint8)
        images[rng.uniform(size=size) < 0.3] = 255  # both ends of the range
        return Batch(images, np.zeros(size, np.int32), np.arange(size, dtype=np.int32))

    state = step_module.init_state(task, config, batch(), 0)
    step = jax.jit(functools.partial(step_module.train_step, task, config, 0))
    for number in range(200):
        state, metrics = step(state, batch())
        assert np.isfinite(float(metrics["loss"])), number
        assert np.isfinite(float(metrics["gradient_norm"])), number


# Times and steps.


def set_uniform(monkeypatch, value):
    """Let jax.random.uniform return `value`."""
    constant = lambda key, shape=(), *_, **__: jnp.full(shape, value, jnp.float32)  # noqa: E731
    monkeypatch.setattr(jax.random, "uniform", constant)


@pytest.mark.parametrize("value", [0.0, 0.5, 1 - 2.0**-23, 1 - 2.0**-24])
@pytest.mark.parametrize("size", [1, 3, 100, 128, 4000, 2**20])
def test_a_sampled_time_is_below_1_and_its_step_is_at_most_the_last(monkeypatch, value, size):
    set_uniform(monkeypatch, value)
    index = jnp.array([0, size // 2, size - 1], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    history = empty_history(4000)
    sampled = {
        "stratified": stratified_times(keys, index, size),
        "uniform": uniform_times(keys, index, size),
        "importance": importance_times(history, keys)[0],
        "evaluation": evaluation_times(index, keys, min(size, 100)).ravel(),
    }
    for name, times in sampled.items():
        assert (times >= 0).all(), name
        assert (times < 1).all(), name
        for steps in (3, 50, 1000, 4000, 10_007):
            number = grids.step_number(times, steps)
            assert (number >= 1).all()
            assert (number <= steps).all()
            schedule = schedules.Schedule(lambda t: t, lambda t: t, steps)
            assert (grids.step_time(schedule, times) <= 1).all()
    expected = (np.asarray(index) + np.float64(value)) / size
    np.testing.assert_allclose(sampled["stratified"], expected, rtol=2e-7)


def test_a_stratified_time_whose_sum_rounds_to_1_is_below_1():
    """In float32, 127 + u is 128 for u >= 1 - 2^-18."""
    share = jnp.float32([1 - 2.0**-18, 1 - 2.0**-20, 1 - 2.0**-24])
    assert (127 + share == 128).all()
    times = grids.stratum_time(jnp.int32([127] * 3), share, 128)
    assert (times < 1).all()
    assert (grids.step_number(times, 4000) == 4000).all()


def test_the_evaluation_times_of_a_million_images_are_uniform():
    count = 1_000_000
    keys = jax.random.key(0)
    key_of = jax.vmap(lambda index: jax.random.fold_in(keys, index))
    times_of = jax.jit(lambda index: evaluation_times(index, key_of(index), 1)[:, 0])
    index = np.arange(count, dtype=np.int32)
    times = np.asarray(times_of(index), np.float64)
    assert times.min() >= 0
    assert times.max() < 1
    for part in (times, times[30_000:], times[-1000:]):  # also for large indices
        assert scipy.stats.kstest(part, "uniform").statistic < 3 / len(part) ** 0.75
    cells = np.bincount((times * 1000).astype(int), minlength=1000)
    squares = np.square(cells - count / 1000).sum() / (count / 1000)
    assert squares < scipy.stats.chi2(999).ppf(0.999)  # more even than independent samples
    large = np.asarray(times_of(index[:1000] + 2_000_000_000), np.float64)
    assert scipy.stats.kstest(large, "uniform").statistic < 0.02


# Schedules and grids.


@pytest.mark.parametrize("steps", [21, 50, 100, 1000, 4000])
def test_linear_betas_end_at_nearly_the_same_noise_with_any_number_of_steps(steps):
    betas = schedules.linear_betas(steps)
    end = float(schedules.from_betas(betas).logsnr(1.0))
    integral = 1000 * (1e-4 + 0.02) / 2
    # log alpha_bar = sum of log(1 - beta), which is less than -(sum of beta).
    assert -25 < end < -integral + 0.1
    assert end == pytest.approx(np.log1p(-betas).sum(), abs=1e-3)
    if steps == 1000:
        np.testing.assert_array_equal(betas, np.linspace(1e-4, 0.02, 1000))


def test_linear_betas_of_too_few_steps_raise_an_error_of_one_line():
    for steps in (1, 6, 20):
        with pytest.raises(ValueError, match=r"steps must be at least 21$"):
            schedules.linear_betas(steps)
    fields = {"task.schedule": "linear_betas", "task.schedule.steps": "20"}
    config = override(load_experiment("ddpm_digits").config, fields)
    config = bind(config, DataInfo("digits", (8, 8, 1), 17, 10))
    with pytest.raises(UserError, match=r"^--config\.task\.schedule\.steps=20: .* at least 21$"):
        checked_task(config)


def test_a_schedule_that_does_not_end_in_noise_is_logged_once(capsys):
    short = schedules.linear(-2.5, 10.0)
    for schedule in (short, short, *(SCHEDULES[name]() for name in SCHEDULES if name != "learned")):
        check_start("v", schedule, Sampling())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "ends at logsnr -2.5" in lines[0]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_grid_of_few_steps_starts_at_noise_and_increases(spacing):
    for name, make in SCHEDULES.items():
        schedule = make()
        for steps in (1, 2, 3):
            logsnrs = np.asarray(grids.grid(schedule, steps, spacing))
            assert logsnrs.shape == (steps + 1,), name
            assert logsnrs[0] <= max(-5.0, schedule.logsnr(1.0)), (name, steps)
            assert np.isfinite(logsnrs[:-1]).all()
            assert logsnrs[-1] == np.inf
            assert (np.diff(logsnrs) > 0).all(), (name, steps)


def test_only_a_grid_that_does_not_start_at_noise_is_changed():
    schedule = SCHEDULES["linear_betas"]()
    times = np.array([667, 334, 1]) / 1000
    expected = np.append(schedule.logsnr(jnp.asarray(times)), np.inf)
    assert expected[0] > -5
    expected[0] = schedule.logsnr(1.0)
    np.testing.assert_array_equal(grids.grid(schedule, 3, "leading"), expected)
    times = np.array([751, 501, 251, 1]) / 1000
    expected = np.append(schedule.logsnr(jnp.asarray(times)), np.inf)
    np.testing.assert_array_equal(grids.grid(schedule, 4, "leading"), expected)


def test_the_edm_schedule_has_its_ends_and_its_inverse_in_float32():
    schedule = schedules.edm()
    ends = schedule.logsnr(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(jnp.exp(-0.5 * ends), [0.002, 80.0], rtol=1e-4)
    np.testing.assert_allclose(schedule.time(ends), [0.0, 1.0], atol=1e-6)
    t = np.linspace(0, 1, 101)
    low, high = (scipy.special.ndtr((np.log(s) + 1.2) / 1.2) for s in (0.002, 80.0))
    z = scipy.special.ndtri(low + t * (high - low))
    np.testing.assert_allclose(schedule.logsnr(jnp.asarray(t)), -2 * (1.2 * z - 1.2), atol=1e-3)
    np.testing.assert_allclose(schedule.time(schedule.logsnr(jnp.asarray(t))), t, atol=1e-6)
    narrow = schedules.edm(lowest=0.5, highest=2.0)
    ends = jnp.exp(-0.5 * narrow.logsnr(jnp.array([0.0, 1.0])))
    np.testing.assert_allclose(ends, [0.5, 2.0], rtol=1e-5)


@pytest.mark.parametrize("lowest", [-20.0, -10.0, -4.0])
@pytest.mark.parametrize("highest", [6.0, 20.0])
def test_truncated_schedules_have_their_ends_in_float32(lowest, highest):
    for make in (schedules.linear, schedules.cosine, schedules.sigmoid):
        schedule = make(lowest=lowest, highest=highest)
        ends = schedule.logsnr(jnp.array([0.0, 1.0]))
        np.testing.assert_allclose(ends, [highest, lowest], atol=1e-3)
        np.testing.assert_allclose(schedule.time(ends), [0, 1], atol=1e-5)
        shifted = schedules.shifted(schedule, 0.5)
        ends = shifted.logsnr(jnp.array([0.0, 1.0]))
        np.testing.assert_allclose(ends, np.array([highest, lowest]) - 2 * np.log(2), atol=1e-3)


# SDEdit.

POINT = jnp.array([0.5, -0.25, 1.0, 0.0]).reshape(2, 2, 1)
EDIT_SCHEDULE = schedules.from_betas(schedules.cosine_betas())


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_grid_of_an_edit_increases_from_its_start(spacing):
    grid_from = jax.jit(grids.grid_from)
    for name in ("linear_betas", "cosine_betas", "cosine", "edm"):
        schedule = SCHEDULES[name]()
        for steps in (1, 2, 3, 4, 5, 20):
            full = grids.grid(schedule, steps, spacing)
            for t in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
                start = schedule.logsnr(jnp.asarray(t))
                logsnrs, first = grid_from(full, start)
                rest = np.asarray(logsnrs)[int(first) :]
                assert rest[0] == start
                assert rest[-1] == np.inf
                assert len(rest) >= 2
                assert (np.diff(rest) > 0).all(), (name, steps, t)
                assert set(rest[1:]) <= set(np.asarray(full))
                cleaner = np.sum(np.asarray(full[:-1]) > start)
                assert len(rest) - 2 in (cleaner, cleaner - 1)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_an_edit_with_few_steps_has_increasing_logsnr_and_samples_the_data(name):
    visited = []

    def predict(params, xt, logsnr, labels):
        jax.debug.callback(lambda value: visited.append(float(value)), logsnr[0])
        alpha, sigma = (a[:, None, None, None] for a in process.alpha_sigma(logsnr))
        x0 = jnp.broadcast_to(POINT, xt.shape)
        return Prediction(x0, (xt - alpha * x0) / sigma, jnp.full_like(xt, 0.5))

    keys = jax.random.split(jax.random.key(0), 2)
    images, free = jnp.full((2, 2, 2, 1), 0.7), jnp.zeros((2, 2, 2, 1))
    for steps, spacing in ((1, "leading"), (2, "trailing"), (3, "trailing"), (5, "quadratic")):
        task = ExactDenoiser(
            predict,
            EDIT_SCHEDULE,
            Sampling(name, steps, spacing, x0_thresholding="none"),
            learned_variance=True,
            table_steps=1000,
            info=DataInfo("x", (2, 2, 1), 256),
        )
        task.check()
        for t in (0.1, 0.3, 0.6, 1.0):
            visited.clear()
            edit = edit_images(task, NO_VARIABLES, keys, None, t, images, images, free)
            jax.effects_barrier()
            np.testing.assert_allclose(edit, jnp.broadcast_to(POINT, edit.shape), atol=1e-3)
            start = float(EDIT_SCHEDULE.logsnr(jnp.asarray(t)))
            churned = 2 * np.log(2**0.5) + 1e-3 if name == "edm" else 1e-3
            assert visited[0] == pytest.approx(start, abs=churned)
            if name != "edm":  # edm adds noise before each step
                assert (np.diff(visited) >= 0).all()
                assert len(set(visited)) >= len(visited) / 2


# Interpolation of noise.


def test_slerp_between_any_two_vectors_is_finite_with_its_gradients():
    a = jax.random.normal(jax.random.key(0), (64,))
    b = jax.random.normal(jax.random.key(1), (64,))
    zero = jnp.zeros(64)
    pairs = {
        "equal": (a, a),
        "opposite": (a, -a),
        "parallel": (a, 3 * a),
        "first zero": (zero, a),
        "second zero": (a, zero),
        "zeros": (zero, zero),
        "nearly parallel": (a, a + 1e-5 * b),
        "nearly opposite": (a, -a + 1e-5 * b),
        "tiny": (1e-15 * a, 1e-15 * b),
        "ordinary": (a, b),
    }
    value = jax.jit(inversion.slerp)
    slopes = jax.jit(jax.grad(lambda a, b, s: inversion.slerp(a, b, s).sum(), (0, 1, 2)))
    for name, (first, second) in pairs.items():
        for share in (0.0, 0.3, 1.0):
            point = value(first, second, share)
            assert jnp.isfinite(point).all(), name
            assert all(jnp.isfinite(slope).all() for slope in slopes(first, second, share)), name
        for share, end in ((0.0, first), (1.0, second)):
            np.testing.assert_allclose(value(first, second, share), end, atol=1e-5)
    for share in (0.2, 0.5):
        np.testing.assert_allclose(value(a, a, share), a, rtol=1e-6)
        np.testing.assert_allclose(value(a, 3 * a, share), (1 + 2 * share) * a, rtol=1e-5)
        parallel = value(*pairs["nearly parallel"], share)
        np.testing.assert_allclose(parallel, a + share * 1e-5 * b, atol=1e-6)
    x, y = (np.asarray(v, np.float64) for v in (a, b))
    angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    expected = (np.sin(0.7 * angle) * x + np.sin(0.3 * angle) * y) / np.sin(angle)
    np.testing.assert_allclose(value(a, b, 0.3), expected, rtol=1e-5, atol=1e-6)
    half = value(*pairs["nearly opposite"], 0.5)  # a point of the sphere between both
    assert jnp.linalg.norm(half) == pytest.approx(float(jnp.linalg.norm(a)), rel=0.02)


# The number in the name of a sampler.


@pytest.mark.parametrize(
    "name",
    [
        *(f"ddim:{n}" for n in ("", "nan", "-0.1", "1.01", "2", "inf", "-inf", "x", "0.5:1")),
        *(f"{n}:1.5" for n in ("ancestral", "ancestral_beta", "ancestral_learned")),
        *(f"ancestral:{n}" for n in ("", "nan", "-1")),
        *(f"edm:{n}" for n in ("", "nan", "-1", "inf")),
        *(f"{n}:1" for n in ("heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")),
        *(f"{n}:" for n in ("heun", "unipc")),
    ],
)
def test_a_number_that_a_sampler_does_not_accept_is_an_error_of_one_line(name):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        samplers.named(name, 5)

    def predict(params, xt, logsnr, labels):
        return Prediction(xt, xt, xt)

    def task(name):
        sampling = Sampling(name, 5)
        return ExactDenoiser(predict, schedules.cosine(), sampling, learned_variance=True)

    with pytest.raises(FieldError) as error:
        task(name).check()
    assert str(error.value).startswith(f"sampling.sampler={name}: ")
    with pytest.raises(UserError) as error:
        resolve(task("ddim"), Request(sampler=name))
    assert str(error.value).startswith(f"--sampler={name}: ")


def test_the_constructor_of_a_sampler_raises_for_numbers_out_of_range():
    for make in (
        lambda: samplers.ddim(1.01),
        lambda: samplers.ddim(-0.01),
        lambda: samplers.ddim(float("nan")),
        lambda: samplers.ancestral(noise_scale=1.01),
        lambda: samplers.edm(5, -1.0),
        lambda: samplers.edm(5, low=3.0, high=2.0),
        lambda: samplers.edm(5, noise_scale=float("nan")),
    ):
        with pytest.raises(ValueError, match="must"):
            make()
    for name in ("ddim:0", "ddim:1", "ancestral:0", "ancestral:1", "edm:0", "edm:80"):
        samplers.named(name, 5)
