"""The VAE's equations against closed forms, Monte Carlo and independent implementations."""

import chex
import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ddpm_jax.variational import bayes, vae

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def gaussian():
    key = jax.random.key(0)
    mean = jax.random.normal(key, (7,))
    return mean, 0.7 * jax.random.normal(jax.random.fold_in(key, 1), (7,))


def test_kl_is_the_kl_of_an_independent_implementation(gaussian):
    mean, logvar = gaussian
    q = distrax.MultivariateNormalDiag(mean, jnp.exp(logvar / 2))
    p = distrax.MultivariateNormalDiag(jnp.zeros(7), jnp.ones(7))
    chex.assert_trees_all_close(vae.kl_to_standard_normal(mean, logvar), q.kl_divergence(p))


def test_kl_is_the_mean_of_the_log_ratio(gaussian):
    mean, logvar = gaussian
    eps = jax.random.normal(jax.random.key(2), (200_000, 7))
    z = jax.vmap(vae.reparameterize, (None, None, 0))(mean, logvar, eps)
    log_q = scipy.stats.norm.logpdf(z, mean, np.exp(logvar / 2)).sum(1)
    log_ratio = log_q - scipy.stats.norm.logpdf(z).sum(1)
    error = log_ratio.std() / np.sqrt(len(log_ratio))
    assert abs(vae.kl_to_standard_normal(mean, logvar) - log_ratio.mean()) < 4 * error


def test_kl_is_zero_only_for_the_prior():
    assert vae.kl_to_standard_normal(jnp.zeros(3), jnp.zeros(3)) == 0
    assert vae.kl_to_standard_normal(jnp.zeros(3), jnp.full(3, 1e-3)) > 0


def test_reparameterized_samples_have_the_mean_and_the_variance_of_q(gaussian):
    mean, logvar = gaussian
    eps = jax.random.normal(jax.random.key(3), (100_000, 7))
    z = jax.vmap(vae.reparameterize, (None, None, 0))(mean, logvar, eps)
    variance = jnp.exp(logvar)
    chex.assert_trees_all_close(z.mean(0), mean, atol=4 * float((variance.max() / 1e5) ** 0.5))
    chex.assert_trees_all_close(z.var(0), variance, rtol=4 * (2 / 1e5) ** 0.5)


def test_gaussian_nll_is_scipys(gaussian):
    mean, logvar = gaussian
    x = jnp.linspace(-2.0, 2.0, 7)
    expected = -scipy.stats.norm.logpdf(x, mean, np.exp(logvar / 2)).sum()
    assert vae.gaussian_nll(mean, logvar, x) == pytest.approx(expected)


def test_the_optimal_shared_variance_is_the_mean_squared_error():
    x, mean = jax.random.normal(jax.random.key(4), (2, 50))
    mse = jnp.mean((x - mean) ** 2)
    slope = jax.grad(lambda logvar: vae.gaussian_nll(mean, logvar, x))(jnp.log(mse))
    assert abs(slope) < 1e-10


def test_bernoulli_nll_is_scipys():
    logits = jnp.linspace(-6, 6, 25)
    for x in (jnp.zeros(25), jnp.ones(25), jnp.arange(25) % 2.0):
        expected = -scipy.stats.bernoulli.logpmf(x, jax.nn.sigmoid(logits)).sum()
        assert vae.bernoulli_nll(logits, x) == pytest.approx(expected)


@pytest.mark.parametrize("logit", [0.0, 30.0, 1e3, 1e30, float("inf")])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_bernoulli_nll_and_its_gradient_are_exact_for_any_logit(logit, dtype):
    right = jnp.array([logit, -logit], dtype), jnp.array([1, 0], dtype)
    assert vae.bernoulli_nll(*right) == pytest.approx(2 * np.log1p(np.exp(-logit)), rel=1e-5)
    wrong = jnp.array([-logit], dtype), jnp.array([1], dtype)
    if np.isfinite(logit):
        value = vae.bernoulli_nll(*wrong)
        assert value == pytest.approx(logit + np.log1p(np.exp(-logit)), rel=1e-5)
        gradient = jax.grad(vae.bernoulli_nll)(*wrong)
        chex.assert_trees_all_close(gradient, -jax.nn.sigmoid(jnp.array([logit], dtype)))


def test_bernoulli_probabilities_sum_to_one():
    logits = jnp.array([3.0, -700.0, 80.0])
    total = jnp.exp(-vae.bernoulli_nll(logits[:1], jnp.ones(1)))
    total += jnp.exp(-vae.bernoulli_nll(logits[:1], jnp.zeros(1)))
    assert total == pytest.approx(1)


def test_beta_1_is_the_vae_and_beta_0_the_autoencoder():
    nll, kl = jnp.array([3.0, 5.0]), jnp.array([1.0, 2.0])
    chex.assert_trees_all_close(vae.elbo(nll, kl), -nll - kl)
    chex.assert_trees_all_close(vae.elbo(nll, kl, beta=0.0), -nll)


# The linear-Gaussian model, where log p(x) is known exactly.


@pytest.fixture
def model():
    # With orthogonal columns the covariance of the true posterior is diagonal, like that of q.
    columns, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 3)))
    weights = jnp.asarray(columns * [2.0, 1.0, 0.5])
    return bayes.LinearGaussian(weights, jnp.arange(6.0) / 6, jnp.asarray(0.3))


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(1).normal(size=6))


def log_weights(model, x, mean, logvar, count, seed=0):
    eps = jax.random.normal(jax.random.key(seed), (count, *mean.shape))

    def log_weight(eps):
        z = vae.reparameterize(mean, logvar, eps)
        nll = vae.gaussian_nll(model.weights @ z + model.bias, jnp.log(model.variance), x)
        return vae.log_weight(nll, z, mean, logvar)

    return jax.vmap(log_weight)(eps)


def test_elbo_at_the_true_posterior_is_log_p_x_for_every_sample(model, x):
    mean, covariance = bayes.linear_gaussian_posterior(model, x)
    weights = log_weights(model, x, mean, jnp.log(jnp.diag(covariance)), 100)
    expected = jnp.full(100, bayes.linear_gaussian_log_evidence(model, x))
    chex.assert_trees_all_close(weights, expected, rtol=1e-9)


def test_elbo_is_log_p_x_minus_the_kl_to_the_posterior(model, x):
    mean, covariance = bayes.linear_gaussian_posterior(model, x)
    off_mean, logvar = mean + 0.3, jnp.log(jnp.diag(covariance)) + 0.5
    weights = log_weights(model, x, off_mean, logvar, 100_000)
    kl = bayes.gaussian_kl(off_mean, jnp.diag(jnp.exp(logvar)), mean, covariance)
    expected = bayes.linear_gaussian_log_evidence(model, x) - kl
    assert abs(weights.mean() - expected) < 4 * weights.std() / 100_000**0.5
    assert kl > 0


def test_elbo_with_the_analytic_kl_has_the_same_mean(model, x):
    mean, logvar = jnp.array([0.1, -0.4, 0.2]), jnp.array([-1.0, -0.5, 0.1])
    weights = log_weights(model, x, mean, logvar, 100_000)
    eps = jax.random.normal(jax.random.key(5), (100_000, 3))
    z = jax.vmap(vae.reparameterize, (None, None, 0))(mean, logvar, eps)
    nll = jax.vmap(
        lambda z: vae.gaussian_nll(model.weights @ z + model.bias, jnp.log(model.variance), x)
    )(z)
    analytic = vae.elbo(nll, jnp.full(100_000, vae.kl_to_standard_normal(mean, logvar)))
    error = (weights.var() / 1e5 + analytic.var() / 1e5) ** 0.5
    assert abs(weights.mean() - analytic.mean()) < 4 * error


def test_iwae_does_not_decrease_with_k_and_is_below_log_p_x(model, x):
    mean, covariance = bayes.linear_gaussian_posterior(model, x)
    logvar = jnp.log(jnp.diag(covariance)) + 0.8
    bounds, errors = [], []
    for k in (1, 4, 16, 64):
        groups = log_weights(model, x, mean + 0.5, logvar, 64_000).reshape(-1, k)
        values = jax.vmap(vae.iwae_bound)(groups)
        bounds.append(float(values.mean()))
        errors.append(float(values.std()) / len(values) ** 0.5)
    exact = float(bayes.linear_gaussian_log_evidence(model, x))
    for low, high, error in zip(bounds, bounds[1:], errors[1:], strict=False):
        assert high > low - 4 * error
    assert bounds[-1] < exact + 4 * errors[-1]
    assert exact - bounds[-1] < 0.1 * (exact - bounds[0])


def test_iwae_of_one_sample_is_the_log_weight():
    assert vae.iwae_bound(jnp.array([-87.5])) == -87.5


def test_bits_per_dim_of_a_uniform_code_is_log2_of_the_levels():
    # The uniform density on [-1, 1]^10 has -log p = 10 log 2, which is 8 bits for 256 levels.
    for levels, bits in ((256, 8.0), (17, np.log2(17))):
        nats = jnp.asarray(10 * np.log(2.0))
        assert vae.density_to_bits_per_dim(nats, 10, levels) == pytest.approx(bits)


# Bayes' rule.


def test_a_coin_with_a_uniform_prior_and_7_heads_of_10():
    prior = bayes.Beta(1, 1)
    assert bayes.coin_posterior(prior, 7, 3) == bayes.Beta(8, 4)
    assert np.exp(bayes.coin_log_evidence(prior, 7, 3)) == pytest.approx(1 / 11)


def test_a_coins_evidence_is_scipys_beta_binomial():
    for heads in range(6):
        expected = scipy.stats.betabinom.logpmf(heads, 5, 2.5, 0.7)
        evidence = bayes.coin_log_evidence(bayes.Beta(2.5, 0.7), heads, 5 - heads)
        assert evidence == pytest.approx(expected)


def test_linear_gaussian_posterior_is_bayes_rule(model, x):
    mean, covariance = bayes.linear_gaussian_posterior(model, x)
    z = mean + 0.2
    log_joint = -vae.gaussian_nll(model.weights @ z + model.bias, jnp.log(model.variance), x)
    log_joint += scipy.stats.norm.logpdf(z).sum()
    log_posterior = scipy.stats.multivariate_normal.logpdf(z, mean, covariance)
    evidence = bayes.linear_gaussian_log_evidence(model, x)
    assert log_joint - evidence == pytest.approx(log_posterior)


def test_gaussian_kl_is_the_kl_of_an_independent_implementation():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(2, 4))
    q, p = (np.cov(rng.normal(size=(4, 9))) + np.eye(4) for _ in range(2))
    kl = bayes.gaussian_kl(*map(jnp.asarray, (means[0], q, means[1], p)))
    normal = distrax.MultivariateNormalFullCovariance
    expected = normal(means[0], q).kl_divergence(normal(means[1], p))
    assert kl == pytest.approx(float(expected))
