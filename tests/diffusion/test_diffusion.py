"""The maths of diffusion against closed forms and exact denoisers.

For data N(mean, std^2) the best prediction of x0 is known at every logsnr. Samplers, bounds and
schedules can therefore be compared with exact results, without training.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

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
    times,
)
from ddpm_jax.diffusion.prediction import Prediction

pytestmark = pytest.mark.usefixtures("x64")

SCHEDULES = {
    "linear_betas": lambda: schedules.from_betas(schedules.linear_betas()),
    "cosine_betas": lambda: schedules.from_betas(schedules.cosine_betas()),
    "few betas": lambda: schedules.from_betas(np.array([0.1, 0.2, 0.5, 0.9])),
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
    "sigmoid 0 3 0.3": lambda: schedules.sigmoid(0.0, 3.0, 0.3),
    "shifted": lambda: schedules.shifted(schedules.cosine(), 0.5),
    "shifted betas": lambda: schedules.shifted(schedules.from_betas(schedules.linear_betas()), 0.5),
    "edm": schedules.edm,
    "learned": lambda: schedules.learned(schedules.learned_init(jax.random.key(0))),
}


@pytest.fixture(params=SCHEDULES)
def any_schedule(request):
    return SCHEDULES[request.param]()


def gaussian(mean, std):
    """The exact denoiser of N(mean, std^2): x0 = E[x_0 | x_t]."""

    def denoise(xt, logsnr):
        alpha, sigma = process.alpha_sigma(logsnr)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x0 = mean + gain * (xt - alpha * mean)
        return Prediction(x0, (xt - alpha * x0) / sigma)

    return denoise


# Schedules.


def test_a_schedule_decreases_and_time_is_its_inverse(any_schedule):
    steps = any_schedule.steps
    t = jnp.arange(1, steps + 1) / steps if steps else jnp.linspace(0.001, 0.999, 500)
    logsnr = any_schedule.logsnr(t)
    assert (jnp.diff(logsnr) < 0).all()
    np.testing.assert_allclose(any_schedule.time(logsnr), t, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid", "sigmoid 0 3 0.3"])
def test_a_continuous_schedule_reaches_its_ends_in_float32(name):
    with jax.enable_x64(False):
        schedule = SCHEDULES[name]()
        ends = schedule.logsnr(jnp.array([0.0, 1.0]))
        np.testing.assert_allclose(ends, [15, -15], rtol=1e-5)
        np.testing.assert_allclose(schedule.time(ends), [0, 1], atol=1e-5)


def test_linear_betas_are_the_betas_of_ho_et_al():
    betas = schedules.linear_betas()
    assert betas.dtype == np.float64
    assert np.exp(schedules.log_alpha_bars(betas)[-1]) == pytest.approx(4.0358e-5, rel=1e-4)
    schedule = schedules.from_betas(betas)
    logsnr_2, logsnr_1 = schedule.logsnr(2 / 1000), schedule.logsnr(1 / 1000)
    _, variance = process.q_posterior(jnp.zeros(()), jnp.zeros(()), logsnr_2, logsnr_1)
    assert variance == pytest.approx(5.4532e-5, rel=1e-4)
    assert schedule.logsnr(0.0) == jnp.inf
    assert schedule.time(jnp.inf) == 0


def test_a_table_rounds_to_the_nearest_step():
    schedule = schedules.from_betas(schedules.linear_betas())
    assert schedule.logsnr(0.5004) == schedule.logsnr(0.5)
    assert schedule.logsnr(0.5006) == schedule.logsnr(0.501)
    middle = (schedule.logsnr(0.5) + schedule.logsnr(0.501)) / 2
    assert schedule.time(middle + 1e-6) == pytest.approx(0.5)
    assert schedule.time(middle - 1e-6) == pytest.approx(0.501)


def test_cosine_betas_have_their_alpha_bar_except_at_the_maximum_beta():
    bars = np.exp(schedules.log_alpha_bars(schedules.cosine_betas()))
    t = np.arange(1000) / 1000
    expected = (np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2
    np.testing.assert_allclose(bars[:-1], expected, rtol=1e-9)
    assert schedules.cosine_betas().max() == 0.999


def test_the_sigmoid_schedule_is_its_formula():
    schedule = schedules.sigmoid(-3.0, 3.0, 0.9)
    u = np.linspace(-2.5, 2.5, 20)  # the time of the formula, from start to end
    curve = lambda x: 1 / (1 + np.exp(-x / 0.9))  # noqa: E731
    bars = (curve(3) - curve(u)) / (curve(3) - curve(-3))
    times = schedule.time(jnp.asarray(np.log(bars / (1 - bars))))
    assert np.ptp(np.diff(times)) < 1e-9  # t is linear in u


def test_log_sigma_of_the_edm_schedule_is_normal():
    schedule = schedules.edm()
    log_sigma = -0.5 * schedule.logsnr(jnp.linspace(0.0, 1.0, 100_001)[1:-1])
    assert log_sigma.mean() == pytest.approx(-1.2, abs=2e-3)
    assert log_sigma.std() == pytest.approx(1.2, abs=5e-3)


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("leading", [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]),
        ("trailing", [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]),
        ("linspace", [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]),
        ("quadratic", [801, 633, 484, 356, 247, 159, 89, 40, 10, 1]),
    ],
)
def test_a_grid_of_ten_steps_has_the_steps_of_the_paper(spacing, expected):
    schedule = schedules.from_betas(schedules.linear_betas())
    logsnrs = grids.grid(schedule, 10, spacing)
    assert logsnrs[-1] == jnp.inf
    np.testing.assert_allclose(logsnrs[:-1], schedule.logsnr(jnp.array(expected) / 1000))


@pytest.mark.parametrize(
    "spacing", ["leading", "trailing", "linspace", "quadratic", "logsnr", "rho7"]
)
@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("name", ["linear_betas", "few betas", "cosine"])
def test_a_grid_increases_to_the_clean_data(name, spacing, steps):
    any_schedule = SCHEDULES[name]()
    if any_schedule.steps is not None and steps > any_schedule.steps:
        with pytest.raises(ValueError, match=f"at most {any_schedule.steps}, the number"):
            grids.grid(any_schedule, steps, spacing)
        return
    logsnrs = grids.grid(any_schedule, steps, spacing)
    assert logsnrs.shape == (steps + 1,)
    assert (jnp.diff(logsnrs) > 0).all()
    assert jnp.isfinite(logsnrs[:-1]).all()
    assert logsnrs[-1] == jnp.inf


def test_a_grid_of_no_steps_raises():
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        grids.grid(schedules.linear(), 0)


# The process and its posterior.


def test_alpha_and_sigma_are_exact_at_both_ends():
    logsnr = jnp.array([-jnp.inf, -900.0, 0.0, 900.0, jnp.inf])
    alpha, sigma = process.alpha_sigma(logsnr)
    half = 0.5**0.5
    chex.assert_trees_all_close(alpha, jnp.array([0, np.exp(-450), half, 1, 1]))
    chex.assert_trees_all_close(sigma, jnp.array([1, 1, half, np.exp(-450), 0]))


def test_the_posterior_is_the_formula_of_ho_et_al_in_betas():
    betas = schedules.linear_betas()
    bars = np.concatenate([[1], np.cumprod(1 - betas)])
    schedule = schedules.from_betas(betas)
    x0, xt = jnp.array([0.3, -0.8]), jnp.array([1.1, 0.2])
    for step in (1, 2, 10, 500, 1000):
        beta, bar, before = betas[step - 1], bars[step], bars[step - 1]
        mean = np.sqrt(before) * beta / (1 - bar) * x0
        mean += np.sqrt(1 - beta) * (1 - before) / (1 - bar) * xt
        variance = (1 - before) / (1 - bar) * beta
        times = schedule.logsnr(step / 1000), schedule.logsnr((step - 1) / 1000)
        posterior = process.q_posterior(x0, xt, *times)
        chex.assert_trees_all_close(posterior[0], mean, rtol=1e-8)
        assert posterior[1] == pytest.approx(variance, rel=1e-8, abs=1e-30)
        assert process.step_beta(*times) == pytest.approx(beta, rel=1e-8)


def test_the_posterior_composes_to_the_marginal():
    """If x_t ~ q(x_t | x_0) and x_s ~ q(x_s | x_t, x_0), then x_s ~ q(x_s | x_0)."""
    t, s = jnp.asarray(-1.3), jnp.asarray(0.8)
    x0 = jnp.asarray(0.7)
    alpha_t, sigma_t = process.alpha_sigma(t)
    alpha_s, sigma_s = process.alpha_sigma(s)
    at = lambda xt: process.q_posterior(x0, xt, t, s)  # noqa: E731
    slope = at(jnp.asarray(1.0))[0] - at(jnp.asarray(0.0))[0]
    mean, variance = at(alpha_t * x0)
    assert mean == pytest.approx(float(alpha_s * x0))
    assert slope**2 * sigma_t**2 + variance == pytest.approx(float(sigma_s**2))


def test_the_posterior_at_the_data_is_the_data_and_at_noise_is_finite():
    x0, xt = jnp.array([0.5]), jnp.array([-2.0])
    mean, variance = process.q_posterior(x0, xt, jnp.asarray(-3.0), jnp.asarray(jnp.inf))
    chex.assert_trees_all_close((mean, variance), (x0, jnp.asarray(0.0)))
    mean, variance = process.q_posterior(x0, xt, jnp.asarray(-jnp.inf), jnp.asarray(1.0))
    alpha, sigma = process.alpha_sigma(jnp.asarray(1.0))
    chex.assert_trees_all_close((mean, variance), (alpha * x0, sigma**2))


# Predictions.


@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
@pytest.mark.parametrize("logsnr", [-8.0, 0.0, 5.0])
def test_to_prediction_inverts_from_prediction(prediction_type, logsnr):
    x0, eps = jax.random.normal(jax.random.key(0), (2, 3, 4))
    logsnr = jnp.asarray(logsnr)
    xt = process.q_sample(x0, eps, logsnr)
    out = prediction.from_prediction(prediction_type, Prediction(x0, eps), logsnr)
    chex.assert_trees_all_close(
        prediction.to_prediction(prediction_type, out, xt, logsnr), Prediction(x0, eps)
    )


def test_edms_preconditioning_is_minus_v():
    x0, eps, out = jax.random.normal(jax.random.key(1), (3, 5))
    sigma = 2.7  # EDM's sigma, of y = x0 + sigma eps
    y = x0 + sigma * eps
    denoised = y / (sigma**2 + 1) + sigma / np.sqrt(sigma**2 + 1) * out
    logsnr = jnp.asarray(-2 * np.log(sigma))
    xt = process.q_sample(x0, eps, logsnr)
    chex.assert_trees_all_close(prediction.to_prediction("v", -out, xt, logsnr).x0, denoised)


def test_after_clipping_x0_and_eps_are_consistent():
    denoise = prediction.clip_x0(gaussian(0.0, 5.0))
    xt, logsnr = 4 * jax.random.normal(jax.random.key(2), (3, 7)), jnp.asarray(0.3)
    predicted = denoise(xt, logsnr)
    assert jnp.abs(predicted.x0).max() == 1
    chex.assert_trees_all_close(process.q_sample(predicted.x0, predicted.eps, logsnr), xt)


def test_dynamic_thresholding_of_an_image_does_not_depend_on_other_images():
    denoise = prediction.threshold_x0(gaussian(0.0, 5.0), 90.0)
    xt, logsnr = 4 * jax.random.normal(jax.random.key(3), (3, 7)), jnp.asarray(0.3)
    together = denoise(xt, logsnr).x0
    alone = denoise(xt[1:2], logsnr).x0
    chex.assert_trees_all_close(together[1:2], alone)
    assert jnp.abs(together).max() <= 1 + 1e-12


def test_inpainting_returns_the_given_pixels():
    images, mask = jnp.linspace(-1, 1, 6)[None], (jnp.arange(6) < 3)[None].astype(float)
    denoise = prediction.inpaint(gaussian(0.2, 0.5), images, mask)
    xT = jax.random.normal(jax.random.key(4), (1, 6))
    keys = jax.random.split(jax.random.key(5), 1)
    x = samplers.sample(samplers.ancestral(), denoise, grids.grid(schedules.cosine(), 20), keys, xT)
    chex.assert_trees_all_close(x[0, :3], images[0, :3])
    assert jnp.abs(x[0, 3:] - images[0, 3:]).min() > 1e-3


# Samplers, with exact denoisers.

DETERMINISTIC = {
    "ddim": (samplers.ddim, 1),
    "heun": (samplers.heun, 2),
    "dpmpp_2m": (samplers.dpmpp_2m, 2),
    "unipc": (samplers.unipc, 3),  # the corrector adds one order
}


def run(sampler, denoise, grid, xT, seed=0, sample=samplers.sample):
    keys = jax.random.split(jax.random.key(seed), len(xT))
    return sample(sampler, denoise, grid, keys, xT)


def ode_solution(mean, std, x, logsnr_t, logsnr_s):
    """The solution of the probability-flow ODE of N(mean, std^2).

    (x - alpha mean) / (marginal standard deviation) is constant along it.
    """
    alpha_t, sigma_t = process.alpha_sigma(logsnr_t)
    alpha_s, sigma_s = process.alpha_sigma(logsnr_s)
    scale = jnp.sqrt((alpha_s**2 * std**2 + sigma_s**2) / (alpha_t**2 * std**2 + sigma_t**2))
    return alpha_s * mean + scale * (x - alpha_t * mean)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_of_a_sampler_decreases_with_its_order(name):
    make, order = DETERMINISTIC[name]
    mean, std = 0.4, 0.6
    start, end = jnp.asarray(-6.0), jnp.asarray(6.0)
    xT = jax.random.normal(jax.random.key(6), (4, 1))
    exact = ode_solution(mean, std, xT, start, end)
    counts, errors = np.array([20, 40, 80, 160]), []
    for steps in counts:
        grid = jnp.linspace(start, end, steps + 1)  # ends before +inf, a step of first order
        x = run(make(), gaussian(mean, std), grid, xT)
        errors.append(float(jnp.abs(x - exact).max()))
    slopes = -np.diff(np.log(errors)) / np.diff(np.log(counts))
    assert abs(slopes[-1] - order) < 0.2, slopes


def test_unipc_has_a_smaller_error_than_its_predictor():
    xT = jax.random.normal(jax.random.key(6), (4, 1))
    grid = jnp.linspace(-6.0, 6.0, 41)
    exact = ode_solution(0.4, 0.6, xT, grid[0], grid[-1])
    errors = {
        name: jnp.abs(run(DETERMINISTIC[name][0](), gaussian(0.4, 0.6), grid, xT) - exact).max()
        for name in ("unipc", "dpmpp_2m")
    }
    assert errors["unipc"] < errors["dpmpp_2m"]


STOCHASTIC = {
    "ancestral": samplers.ancestral,
    "ancestral_beta": lambda: samplers.ancestral("beta"),
    "ddim_eta1": lambda: samplers.ddim(1.0),
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde,
    "edm": lambda: samplers.edm(200, noise_scale=1.0),
}


@pytest.mark.parametrize("name", [*STOCHASTIC, *DETERMINISTIC])
def test_a_sampler_recovers_mean_and_variance(name):
    mean, std, count = 0.3, 0.5, 20_000
    make = STOCHASTIC.get(name) or DETERMINISTIC[name][0]
    grid = grids.grid(schedules.linear(-9.0, 9.0), 200, "logsnr")
    xT = jax.random.normal(jax.random.key(7), (count, 1))
    x = run(make(), gaussian(mean, std), grid, xT)
    assert abs(x.mean() - mean) < 4 * std / count**0.5 + 0.003  # and the discretisation error
    assert abs(x.std() - std) < 4 * std / (2 * count) ** 0.5 + 0.012


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_samples_of_a_point_mass_are_exact_without_noise_in_the_last_step(name):
    point = jnp.array([[0.5, -0.25, 1.0]])

    def denoise(xt, logsnr):
        alpha, sigma = process.alpha_sigma(logsnr)
        x0 = jnp.broadcast_to(point, xt.shape)
        return Prediction(x0, (xt - alpha * x0) / sigma, jnp.full_like(xt, 0.5))

    for steps in (1, 2, 10):
        grid = grids.grid(schedules.from_betas(schedules.linear_betas()), steps)
        xT = jax.random.normal(jax.random.key(8), (4, 3))
        x = run(samplers.named(name, steps), denoise, grid, xT)
        chex.assert_trees_all_close(x, jnp.broadcast_to(point, x.shape), atol=1e-9)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_the_number_of_calls_is_as_documented_and_none_is_at_clean_data(name):
    called = []

    def denoise(xt, logsnr):
        jax.debug.callback(lambda value: called.append(float(value)), logsnr)
        return gaussian(0.0, 1.0)(xt, logsnr)._replace(variance_fraction=jnp.zeros_like(xt))

    grid = grids.grid(schedules.cosine(), 6)
    run(samplers.named(name, 6), denoise, grid, jnp.ones((2, 1)))
    jax.effects_barrier()
    assert np.isfinite(called).all()
    assert len(called) == (11 if name in ("heun", "edm") else 6)


def test_ddim_with_eta_1_is_ancestral():
    grid = grids.grid(schedules.from_betas(schedules.linear_betas()), 50)
    xT = jax.random.normal(jax.random.key(9), (3, 2))
    ddim = run(samplers.ddim(1.0), gaussian(0.1, 0.4), grid, xT)
    ancestral = run(samplers.ancestral(), gaussian(0.1, 0.4), grid, xT)
    chex.assert_trees_all_close(ddim, ancestral, rtol=1e-9)


def test_image_7_of_64_is_image_7_of_8():
    grid = grids.grid(schedules.cosine(), 10)
    xT = jax.random.normal(jax.random.key(10), (64, 2))
    keys = jax.random.split(jax.random.key(11), 64)
    for make in (samplers.ancestral(), samplers.dpmpp_2m_sde(), samplers.edm(10)):
        of_64 = samplers.sample(make, gaussian(0.0, 0.5), grid, keys, xT)
        of_8 = samplers.sample(make, gaussian(0.0, 0.5), grid, keys[:8], xT[:8])
        chex.assert_trees_all_close(of_64[7], of_8[7])


def test_a_trace_starts_at_the_noise_and_ends_at_the_image():
    grid = grids.grid(schedules.cosine(), 10)
    xT = jax.random.normal(jax.random.key(12), (3, 2))
    x, trace = run(samplers.ddim(), gaussian(0.1, 0.4), grid, xT, sample=samplers.sample_and_trace)
    chex.assert_shape(trace, (10, 3, 2))
    chex.assert_trees_all_close(trace.xt[0], xT)
    chex.assert_trees_all_close(trace.x0[-1], x)


def test_ddim_from_the_inverted_noise_returns_the_image():
    grid = grids.grid(schedules.cosine(-9.0, 9.0), 500, "logsnr")
    x0 = jnp.array([[0.3, -0.4]])
    noise = inversion.invert(gaussian(0.1, 0.4), grid, x0)
    again = run(samplers.ddim(), gaussian(0.1, 0.4), grid, noise)
    chex.assert_trees_all_close(again, x0, atol=0.02)


def test_slerp_of_two_noises_is_noise():
    a, b = jax.random.normal(jax.random.key(13), (2, 10_000))
    middle = inversion.slerp(a, b, 0.5)
    assert middle.std() == pytest.approx(1.0, abs=0.03)
    chex.assert_trees_all_close(inversion.slerp(a, b, 0.0), a)


# Guidance.


def test_guidance_0_is_unconditional_and_1_conditional():
    xt, logsnr = jnp.array([[0.3], [1.0]]), jnp.asarray(0.2)
    conditional, plain = gaussian(1.0, 0.5), gaussian(-1.0, 0.8)
    for scale, expected in ((0.0, plain), (1.0, conditional)):
        guided = guidance.classifier_free(conditional, plain, scale)(xt, logsnr)
        chex.assert_trees_all_close(guided, expected(xt, logsnr))
    limited = guidance.within_interval(conditional, plain, -1.0, 1.0)
    chex.assert_trees_all_close(limited(xt, logsnr), conditional(xt, logsnr))
    chex.assert_trees_all_close(limited(xt, jnp.asarray(2.0)), plain(xt, jnp.asarray(2.0)))


def test_x0_and_eps_of_a_guided_prediction_are_consistent():
    xt, logsnr = jnp.array([[0.3], [1.0]]), jnp.asarray(0.2)
    predicted = guidance.classifier_free(gaussian(1.0, 0.5), gaussian(-1.0, 0.8), 3.0)(xt, logsnr)
    chex.assert_trees_all_close(process.q_sample(predicted.x0, predicted.eps, logsnr), xt)


def test_classifier_guidance_by_the_exact_classifier_gives_the_conditional():
    """For two Gaussians with the same std, p(y | x_t) is known, and scale 1 is Bayes' rule."""
    means, std = jnp.array([0.8, -0.8]), 0.5

    def log_joint(xt, logsnr):
        alpha, sigma = process.alpha_sigma(logsnr)
        marginal_std = jnp.sqrt(alpha**2 * std**2 + sigma**2)
        return jax.scipy.stats.norm.logpdf(xt, alpha * means, marginal_std)  # [B, 2]

    def mixture(xt, logsnr):
        share = jax.nn.softmax(log_joint(xt, logsnr))
        x0 = sum(share[:, i : i + 1] * gaussian(means[i], std)(xt, logsnr).x0 for i in range(2))
        return prediction.with_x0(Prediction(x0, x0), x0, xt, logsnr)

    guided = guidance.classifier(
        mixture, lambda xt, logsnr: jax.nn.log_softmax(log_joint(xt, logsnr))[:, 0], 1.0
    )
    xt, logsnr = jnp.array([[0.3], [-1.0]]), jnp.asarray(0.2)
    chex.assert_trees_all_close(guided(xt, logsnr), gaussian(means[0], std)(xt, logsnr))


# Bounds.


@pytest.mark.parametrize(
    ("levels", "mean", "std"),
    [(256, 0.37, 0.01), (256, -1.2, 0.3), (17, 0.9, 0.05), (256, 3.0, 1e-3)],
)
def test_the_decoders_probabilities_sum_to_one(levels, mean, std):
    predicted = Prediction(jnp.full(1, mean), jnp.zeros(1))
    values = jnp.linspace(-1, 1, levels)
    nll = jax.vmap(lambda x: elbo.decoder_nll(predicted, x[None], std, levels))(values)
    assert jnp.exp(-nll).sum() == pytest.approx(1.0, abs=1e-9)
    assert jnp.isfinite(nll).all()


def test_the_decoders_nll_is_scipys_and_is_finite_in_float32_for_any_error():
    value = 2 * 77 / 255 - 1
    nll = elbo.decoder_nll(Prediction(jnp.array([0.1]), jnp.zeros(1)), jnp.array([value]), 0.3)
    normal = scipy.stats.norm(0.1, 0.3)
    expected = -np.log(normal.cdf(value + 1 / 255) - normal.cdf(value - 1 / 255))
    assert nll == pytest.approx(expected)
    with jax.enable_x64(False):

        def nll_of(mean, x):
            return elbo.decoder_nll(Prediction(mean, mean), x, 0.01).sum()

        with_slope = jax.jit(jax.value_and_grad(nll_of))
        for x in (-1.0, 1.0, value):
            for mean in (-1.0, 1.0, 0.5):
                nll, slope = with_slope(*np.float32([[mean], [x]]))
                assert jnp.isfinite(nll)
                assert jnp.isfinite(slope).all()


def test_prior_kl_is_the_kl_of_two_gaussians():
    x0 = jnp.array([0.5, -1.0])
    logsnr = jnp.asarray(-4.0)
    alpha, sigma = process.alpha_sigma(logsnr)
    expected = 0.5 * (alpha**2 * x0**2 + sigma**2 - 1 - jnp.log(sigma**2)).sum()
    assert elbo.prior_kl(x0, logsnr) == pytest.approx(float(expected))


@functools.partial(jax.jit, static_argnums=0)
def bound_of_gaussian(steps, x0, std, t_min=1e-3):
    """The sum of L_{t-1} down to t_min and the continuous bound, with the exact denoiser."""
    schedule = schedules.linear(-8.0, 8.0)
    eps = jnp.asarray(np.random.default_rng(0).normal(size=(4_000,)))
    data = jnp.full_like(eps, x0)
    denoise = gaussian(0.0, std)
    times = jnp.linspace(1.0, t_min, steps + 1)

    def kl(t, s):
        logsnr_t, logsnr_s = schedule.logsnr(t), schedule.logsnr(s)
        xt = process.q_sample(data, eps, logsnr_t)
        predicted = denoise(xt, logsnr_t)
        # `step_kl` sums over dimensions, which are 4,000 samples of one dimension.
        return elbo.step_kl(predicted, data, xt, logsnr_t, logsnr_s) / len(eps)

    def integrand(t):
        logsnr, slope = jax.value_and_grad(schedule.logsnr)(t)
        xt = process.q_sample(data, eps, logsnr)
        return elbo.continuous_kl(denoise(xt, logsnr), eps, slope) / len(eps)

    discrete = jax.vmap(kl)(times[:-1], times[1:]).sum()
    fine = jnp.linspace(t_min, 1.0, 501)
    continuous = jnp.trapezoid(jax.vmap(integrand)(fine), fine)
    return discrete, continuous


def test_the_discrete_bound_decreases_to_the_continuous_one():
    errors = []
    for steps in (50, 200, 800):
        discrete, continuous = bound_of_gaussian(steps, 0.4, 0.5)
        errors.append(discrete - continuous)
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 0.02 * continuous
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)  # proportional to 1 / steps


def test_the_continuous_loss_of_the_exact_denoiser_is_a_difference_of_mutual_information():
    """For Gaussian data it is I(x0; x_0) - I(x0; x_1), I(x0; x_t) = log(1 + std^2 SNR(t)) / 2."""
    std = 0.5
    schedule = schedules.linear(-8.0, 8.0)
    rng = np.random.default_rng(1)
    x0, eps = jnp.asarray(std * rng.normal(size=100_000)), jnp.asarray(rng.normal(size=100_000))

    def integrand(t):
        logsnr, slope = jax.value_and_grad(schedule.logsnr)(t)
        xt = process.q_sample(x0, eps, logsnr)
        return elbo.continuous_kl(gaussian(0.0, std)(xt, logsnr), eps, slope) / len(eps)

    fine = jnp.linspace(0.0, 1.0, 501)
    loss = jnp.trapezoid(jax.lax.map(integrand, fine), fine)
    information = lambda logsnr: 0.5 * np.log1p(std**2 * np.exp(logsnr))  # noqa: E731
    assert loss == pytest.approx(information(8.0) - information(-8.0), rel=5e-3)


def test_8_bits_in_each_of_10_dimensions_are_8_bits_per_dim():
    assert elbo.bits_per_dim(jnp.asarray(8 * 10 * np.log(2)), 10) == pytest.approx(8)


# Losses.


def test_losses_are_the_error_of_eps_with_different_weights():
    x0, eps, wrong = jax.random.normal(jax.random.key(14), (3, 9))
    logsnr = jnp.asarray(1.7)
    xt = process.q_sample(x0, eps, logsnr)
    predicted = prediction.to_prediction("eps", wrong, xt, logsnr)
    mse = losses.simple(predicted, eps)
    v = prediction.from_prediction("v", Prediction(x0, eps), logsnr)
    v_hat = prediction.from_prediction("v", predicted, logsnr)
    assert losses.v_weight(logsnr) * mse == pytest.approx(float(jnp.mean((v - v_hat) ** 2)))
    x0_error = jnp.mean((x0 - predicted.x0) ** 2)
    assert jnp.exp(-logsnr) * mse == pytest.approx(float(x0_error))
    assert losses.min_snr(logsnr) * mse == pytest.approx(float(min(np.exp(1.7), 5) * x0_error))
    assert losses.edm_weight(logsnr, 1.0) == pytest.approx(float(losses.v_weight(logsnr)))


def test_the_name_of_a_sampler_may_contain_its_number():
    grid, xT = grids.grid(SCHEDULES["cosine"](), 5), jnp.ones((2, 1))
    denoise = gaussian(0.3, 0.5)
    for name, same in (
        ("ddim:0.5", samplers.ddim(0.5)),
        ("ddim:1", samplers.ancestral()),
        ("ancestral:0", samplers.ancestral(noise_scale=0.0)),
        ("edm:10", samplers.edm(5, 10.0)),
    ):
        samples = run(samplers.named(name, 5), denoise, grid, xT)
        np.testing.assert_allclose(samples, run(same, denoise, grid, xT), atol=1e-9)
    for wrong in ("heun:1", "ddim:x", "ddim:-1", "ddim:nan"):
        with pytest.raises(ValueError):  # noqa: PT011
            samplers.named(wrong, 5)


def test_ancestral_sampling_without_noise_loses_variance_and_the_ode_does_not():
    # For data N(0, 0.5^2), ancestral steps without noise shrink samples towards 0.
    grid = grids.grid(SCHEDULES["cosine"](), 200)
    xT = jax.random.normal(jax.random.key(5), (4000, 1))
    denoise = gaussian(0.0, 0.5)
    stds = {
        name: float(run(samplers.named(name, 200), denoise, grid, xT).std())
        for name in ("ddim", "ancestral", "ancestral:0")
    }
    assert stds["ddim"] == pytest.approx(0.5, abs=0.03)
    assert stds["ancestral"] == pytest.approx(0.5, abs=0.03)
    assert stds["ancestral:0"] < 0.1


@pytest.mark.parametrize("logsnr_s", [0.9, np.inf])
def test_the_bound_of_the_hybrid_loss_trains_only_the_variance(logsnr_s):
    eps, wrong = jax.random.normal(jax.random.key(15), (2, 9))
    x0 = jnp.linspace(-1, 1, 9)
    logsnr_t, logsnr_s, minimum = jnp.asarray(0.5), jnp.asarray(logsnr_s), jnp.asarray(-3.0)
    xt = process.q_sample(x0, eps, logsnr_t)

    def value(out, fraction, scale):
        predicted = prediction.to_prediction("eps", out, xt, logsnr_t)._replace(
            variance_fraction=fraction
        )
        mse = losses.simple(predicted, eps)
        vlb = losses.variance_bound(predicted, x0, xt, logsnr_t, logsnr_s, minimum, 1000, 9)
        return losses.hybrid(mse, vlb, scale)

    fraction = jnp.full(9, 0.3)
    gradient = jax.jit(jax.grad(value, (0, 1)), static_argnums=2)
    with_bound, without = (gradient(wrong, fraction, scale) for scale in (1e-3, 0.0))
    chex.assert_trees_all_close(with_bound[0], without[0])
    assert jnp.abs(with_bound[1]).min() > 0
    assert jnp.isfinite(with_bound[1]).all()
    predicted = prediction.to_prediction("eps", wrong, xt, logsnr_t)._replace(
        variance_fraction=fraction
    )
    if jnp.isfinite(logsnr_s):
        nats = elbo.step_kl(predicted, x0, xt, logsnr_t, logsnr_s, "learned")
    else:  # the decoder, whose variance is between the minimum and beta = sigma^2 of step 1
        log_beta = jnp.log(process.alpha_sigma(logsnr_t)[1] ** 2)
        std = jnp.exp(0.5 * (0.7 * minimum + 0.3 * log_beta))
        nats = elbo.decoder_nll(predicted, x0, std, 9)
    expected = losses.simple(predicted, eps) + 1e-3 * 1000 * elbo.bits_per_dim(nats, 9)
    assert value(wrong, fraction, 1e-3) == pytest.approx(float(expected))


def test_each_part_of_the_interval_has_one_stratified_time():
    keys = jax.random.split(jax.random.key(16), 64)
    t = times.stratified_times(keys, jnp.arange(64), 64)
    assert (jnp.floor(t * 64) == jnp.arange(64)).all()


def test_importance_sampled_times_follow_the_losses_and_are_unbiased():
    history = times.empty_history(4)
    size = np.array([1.0, 2.0, 3.0, 4.0])
    for _ in range(10):
        history = jax.jit(times.add_losses)(history, (np.arange(4) + 0.5) / 4, size)
    keys = jax.random.split(jax.random.key(17), 50_000)
    t, weights = map(np.asarray, jax.jit(times.importance_times)(history, keys))
    rows = np.floor(t * 4).astype(int)
    counts = np.bincount(rows, minlength=4) / len(rows)
    np.testing.assert_allclose(counts, size / size.sum(), atol=0.01)
    values = weights * size[rows]
    assert abs(values.mean() - size.mean()) < 4 * values.std() / len(rows) ** 0.5 + 1e-9


def test_importance_sampling_is_uniform_until_the_history_is_full_of_the_last_losses():
    history = times.add_losses(times.empty_history(2, 3), jnp.full(5, 0.1), jnp.arange(5.0))
    assert sorted(np.asarray(history.losses[0])) == [2, 3, 4]
    _, weights = times.importance_times(history, jax.random.split(jax.random.key(0), 9))
    chex.assert_trees_all_close(weights, jnp.ones(9))
