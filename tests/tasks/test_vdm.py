"""Tests of the VDM task: three estimates of bits per dimension, for a model with known bits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ddpm_jax.data.types import Batch, Data, Split
from ddpm_jax.diffusion import probability_flow, process
from ddpm_jax.diffusion.prediction import Prediction, from_prediction
from ddpm_jax.nn.dit import DiT
from ddpm_jax.task import Variables
from ddpm_jax.tasks.image_denoiser import SampleEvaluation
from ddpm_jax.tasks.image_sampler import Sampling
from ddpm_jax.tasks.vdm import VDM, rounding_nll
from helpers.sampling import evaluated
from helpers.tasks import bound, first_variables, loss_of


def test_the_decoder_term_is_exact_if_the_noise_is_far_smaller_than_a_bin():
    logsnr = jnp.asarray(14.0)
    alpha, _ = process.alpha_sigma(logsnr)
    grey = jnp.linspace(-1, 1, 17)
    nll = jax.jit(functools.partial(rounding_nll, logsnr=logsnr, levels=17))
    nats = [nll(alpha * x[None] + 1e-4, x[None]) for x in grey]
    np.testing.assert_allclose(nats, 0, atol=1e-6)
    wrong = rounding_nll(alpha * grey[3:4], grey[4:5], logsnr, 17)
    assert wrong > 100


@pytest.fixture(scope="module")
def tiny():
    network = DiT(patch=2, width=8, depth=1, heads=1)
    images = np.random.default_rng(0).integers(0, 17, (20, 4, 4, 1), np.uint8)
    split = Split(images, np.zeros(20, np.int32))
    data = Data("tiny", "tiny", split, split, 17, (), "x")
    task = VDM(
        network,
        9.0,
        -9.0,
        ode_images=20,
        sampling=Sampling("ddim", 3),
        evaluation=SampleEvaluation(20, 16),
    )
    task = bound(task, (4, 4, 1), 17)
    batch = Batch(images[:8], np.zeros(8, np.int32), np.arange(8, dtype=np.int32))
    batch = jax.tree.map(jnp.asarray, batch)
    return task, first_variables(task, batch), batch, data


LEVELS = np.linspace(-1, 1, 17)
SHARES = np.array([8, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 6]) / 31


def grey_denoiser(xt, logsnr):
    """Return the prediction for independent pixels, whose 17 grey levels have probability SHARES.

    It is exact: x0 is the posterior mean.
    """
    alpha, sigma = process.alpha_sigma(logsnr)
    nll = jnp.square(xt[..., None] - alpha[..., None] * LEVELS) / (2 * sigma[..., None] ** 2)
    x0 = (jax.nn.softmax(jnp.log(SHARES) - nll) * LEVELS).sum(-1).astype(xt.dtype)
    return Prediction(x0, (xt - alpha * x0) / sigma)


class GreyNetwork(DiT):
    """A network that returns the v of `grey_denoiser`, for the time (9 - logsnr) / 18."""

    def __call__(self, xt, time, labels=None, keys=None, context=None):
        logsnr = 9.0 - 18.0 * time[:, None, None, None]
        return from_prediction("v", grey_denoiser(xt, logsnr), logsnr)


def test_the_ode_likelihood_of_a_known_discrete_model_is_within_its_numerical_error():
    """A Gaussian mixture has a known density. float32 and the tolerance are those of a run."""
    clean, noisy = jnp.asarray(12.0), jnp.asarray(-10.0)
    alpha, sigma = (np.float64(a) for a in process.alpha_sigma(clean))
    rng = np.random.default_rng(0)
    x0, eps = LEVELS[rng.choice(17, (40, 64), p=SHARES)], rng.normal(size=(40, 64))
    z0 = np.float32(alpha * x0 + sigma * eps)
    z, probe = jnp.asarray(z0), jnp.asarray(np.sign(rng.normal(size=z0.shape)), jnp.float32)
    solve = jax.jit(
        lambda tol: probability_flow.log_density(grey_denoiser, z, probe, clean, noisy, tol)[0]
    )
    log_p, loose = (
        np.asarray(solve(t), np.float64)
        for t in (probability_flow.TOLERANCE, 10 * probability_flow.TOLERANCE)
    )
    log_normal = -0.5 * ((z0[..., None] - alpha * LEVELS) / sigma) ** 2
    log_normal -= 0.5 * np.log(2 * np.pi * sigma**2)
    exact = scipy.special.logsumexp(np.log(SHARES) + log_normal, -1).sum(-1)
    to_bits = 1 / (64 * np.log(2))
    error, estimate = abs((log_p - exact).mean()), np.abs(log_p - loose).mean()
    assert error * to_bits < 2e-3
    assert error < estimate


def metrics_of(evaluation):
    """Return the metrics of the test split by name, without the prefix "test/"."""
    return {name.removeprefix("test/"): value for name, value in evaluation.metrics.items()}


@pytest.mark.slow  # 7 s: the solver is compiled with several calls of the network
def test_all_three_estimates_give_the_known_bits_of_a_discrete_model(monkeypatch):
    monkeypatch.setattr("ddpm_jax.tasks.vdm.SAMPLE_EVALUATIONS", ())
    images = np.random.default_rng(0).choice(17, (200, 4, 4, 1), p=SHARES).astype(np.uint8)
    split = Split(images, np.zeros(200, np.int32))
    data = Data("grey", "grey", split, split, 17, (), "x")
    evaluation = SampleEvaluation(100, 16)
    task = VDM(GreyNetwork(), 9.0, -9.0, ode_images=200, evaluation=evaluation)
    task = bound(task, (4, 4, 1), 17)
    batch = Batch(images[:8], np.zeros(8, np.int32), np.arange(8, dtype=np.int32))
    variables = task.init(jax.random.key(0), jax.tree.map(jnp.asarray, batch))
    metrics = metrics_of(evaluated(task, variables, data))
    exact = -np.log2(SHARES)[images].mean()
    numerical = metrics["bits_per_dim_ode_numerical_error"]
    # z_0 determines the grey level (the edge of a bin is 5.6 standard deviations away), so that
    # eq. (2) is exact for each image, up to the prior's 1e-4 and the error of the solver.
    assert abs(metrics["bits_per_dim_ode"] - exact) < numerical + 3e-4
    assert numerical < 0.2 * metrics["bits_per_dim_ode_error"]
    for name in ("continuous", "discrete"):
        error = metrics[f"bits_per_dim_{name}_error"]
        assert abs(metrics[f"bits_per_dim_{name}"] - exact) < 4 * error


def test_the_loss_is_the_bound_and_has_gradients_of_the_schedules_end_points(tiny):
    task, variables, batch, _ = tiny
    keys = jax.random.split(jax.random.key(1), 8)

    def mean(params):
        losses, parts, _ = loss_of(task, Variables(params, {}), batch, keys)
        return losses.mean(), (losses, parts)

    gradient, (losses, parts) = jax.jit(jax.grad(mean, has_aux=True))(variables.params)
    chex.assert_trees_all_close(losses, sum(parts.values()), rtol=1e-5)
    assert (jnp.abs(gradient["schedule"]["ends"]) > 0).all()


def test_the_bounds_of_a_network_agree_within_their_standard_errors(tiny):
    task, variables, _, data = tiny
    evaluation = evaluated(task, variables, data)
    metrics = metrics_of(evaluation)
    bounds = [metrics[f"bits_per_dim_{name}"] for name in ("continuous", "discrete")]
    errors = [metrics[f"bits_per_dim_{name}_error"] for name in ("continuous", "discrete")]
    assert abs(bounds[0] - bounds[1]) < 4 * sum(errors)
    assert np.isfinite(metrics["bits_per_dim_ode"])
    numerical = metrics["bits_per_dim_ode_numerical_error"]
    assert 0 <= numerical < metrics["bits_per_dim_ode_error"]
    assert evaluation.images["trajectories_animation"].ndim == 4
    assert evaluation.images["schedule"].shape[-1] == 3
