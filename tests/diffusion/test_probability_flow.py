"""The likelihood of the ODE, and three estimates of it, for data with a known likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import elbo, probability_flow, process, schedules
from ddpm_jax.diffusion.prediction import Prediction


def gaussian(mean, std):
    """The exact denoiser of data N(mean, std^2); mean and std may be arrays over the event."""

    def denoise(xt, logsnr):
        alpha, sigma = process.alpha_sigma(logsnr)
        eps = sigma * (xt - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return Prediction((xt - sigma * eps) / alpha, eps)

    return denoise


def log_normal(x, mean, variance):
    density = -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance))
    return density.reshape(len(x), -1).sum(-1)


@pytest.mark.usefixtures("x64")
def test_the_likelihood_of_the_ode_is_exact_for_a_gaussian():
    mean, std = np.array([[0.4], [-0.2]]), np.array([[0.3], [1.7]])
    clean, noisy = jnp.asarray(6.0), jnp.asarray(-20.0)
    alpha, sigma = process.alpha_sigma(clean)
    x = jax.random.normal(jax.random.key(0), (5, 2, 1))
    probe = jnp.sign(jax.random.normal(jax.random.key(1), x.shape))
    log_p, calls = probability_flow.log_density(gaussian(mean, std), x, probe, clean, noisy, 1e-8)
    # The Jacobian is diagonal, so that Hutchinson's estimate has no variance.
    expected = log_normal(x, alpha * mean, alpha**2 * std**2 + sigma**2)
    np.testing.assert_allclose(log_p, expected, atol=1e-4)
    assert calls > 6


@pytest.mark.usefixtures("x64")
def test_hutchinsons_estimate_is_unbiased_for_a_jacobian_that_is_not_diagonal():
    root = np.array([[0.9, 0.0], [0.7, 0.4]])
    covariance = root @ root.T
    clean, noisy = jnp.asarray(5.0), jnp.asarray(-18.0)

    def denoise(xt, logsnr):
        alpha, sigma = process.alpha_sigma(logsnr)
        total = alpha**2 * covariance + sigma**2 * np.eye(2)
        eps = sigma * jnp.linalg.solve(total, xt.T).T
        return Prediction((xt - sigma * eps) / alpha, eps)

    size = 400
    x = jnp.tile(jnp.array([[0.3, -0.8]]), (size, 1))
    probe = jnp.sign(jax.random.normal(jax.random.key(0), (size, 2)))
    log_p, _ = probability_flow.log_density(denoise, x, probe, clean, noisy, 1e-6)
    alpha, sigma = process.alpha_sigma(clean)
    total = alpha**2 * covariance + sigma**2 * np.eye(2)
    expected = -0.5 * x[0] @ np.linalg.solve(total, x[0])
    expected -= 0.5 * np.linalg.slogdet(2 * np.pi * total)[1]
    assert log_p.std() > 0.01
    assert abs(log_p.mean() - expected) < 4 * log_p.std() / size**0.5


@pytest.mark.usefixtures("x64")
def test_the_three_estimates_agree_with_the_closed_form_for_a_gaussian():
    mean, std, size = 0.3, 0.5, 40_000
    schedule = schedules.linear(-14.0, 6.0)
    keys = jax.random.split(jax.random.key(0), size)
    x0 = mean + std * jax.random.normal(jax.random.key(1), (size,))
    eps = jax.random.normal(jax.random.key(2), (size,))
    clean, noisy = schedule.logsnr(jnp.zeros(())), schedule.logsnr(jnp.ones(()))
    alpha, sigma = process.alpha_sigma(clean)
    z0 = jax.vmap(process.q_sample, (0, 0, None))(x0, eps, clean)
    denoise = gaussian(mean, std)
    # The mean of log q(z_0 | x0) - log p(z_0) is the mutual information of z_0 and x0.
    information = 0.5 * np.log((alpha**2 * std**2 + sigma**2) / sigma**2)
    prior = jax.vmap(elbo.prior_kl, (0, None))(x0, noisy)

    def at(key, x, steps=0):
        t_key, eps_key = jax.random.split(key)
        t, noise = jax.random.uniform(t_key), jax.random.normal(eps_key)
        if not steps:
            logsnr, slope = jax.jvp(schedule.logsnr, (t,), (jnp.ones(()),))
            xt = process.q_sample(x, noise, logsnr)
            return elbo.continuous_kl(denoise(xt, logsnr), noise, slope)
        i = jnp.floor(t * steps) + 1
        now, before = schedule.logsnr(i / steps), schedule.logsnr((i - 1) / steps)
        xt = process.q_sample(x, noise, now)
        return steps * elbo.step_kl(denoise(xt, now), x, xt, now, before)

    continuous = prior + jax.jit(jax.vmap(at))(keys, x0)
    discrete = prior + jax.jit(jax.vmap(lambda key, x: at(key, x, 2000)))(keys, x0)
    probe = jnp.ones((size, 1))
    log_p, _ = probability_flow.log_density(denoise, z0[:, None], probe, clean, noisy, 1e-6)
    log_q = -0.5 * (eps**2 + jnp.log(2 * jnp.pi * sigma**2))
    for nats in (continuous, discrete, log_q - log_p):
        error = nats.std() / size**0.5
        assert error < 0.05
        assert abs(nats.mean() - information) < 4 * error
