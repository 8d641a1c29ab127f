"""Tests of the diffusion task with a U-Net or a DiT."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.types import Batch
from ddpm_jax.diffusion.schedules import Cosine
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.requests import Request
from ddpm_jax.fields import FieldError
from ddpm_jax.metrics.noise_levels import noise_levels, rate_distortion
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.unet import UNet
from ddpm_jax.task import Variables
from ddpm_jax.tasks.diffusion import Diffusion
from ddpm_jax.tasks.image_sampler import Sampling
from helpers.sampling import NO_VARIABLES, sample
from helpers.tasks import EvenBetas, bound, first_variables, loss_of


@pytest.fixture(scope="module")
def tiny():
    network = UNet(
        channels=8,
        multipliers=(1,),
        blocks=1,
        attention_sizes=(),
        dropout=0.5,
    )
    task = bound(Diffusion(network, sampling=Sampling(steps=3)), (4, 4, 1), 17, classes=3)
    images = np.random.default_rng(0).integers(0, 17, (8, 4, 4, 1), np.uint8)
    batch = jax.tree.map(
        jnp.asarray, Batch(images, np.arange(8, dtype=np.int32) % 3, np.arange(8, dtype=np.int32))
    )
    return task, first_variables(task, batch), batch


def test_the_initial_loss_is_the_variance_of_the_noise(tiny):
    task, variables, batch = tiny
    keys = jax.random.split(jax.random.key(1), 8)
    loss = functools.partial(loss_of, task, train=False)
    losses, metrics, _ = jax.jit(loss)(variables, batch, keys)
    chex.assert_shape(losses, (8,))
    # The output layer is initialised with 0: |eps - 0|^2 is 1 on average over 128 dimensions.
    assert abs(losses.mean() - 1) < 4 * (2 / 128) ** 0.5
    chex.assert_trees_all_equal(losses, metrics["mse"])


def test_a_sample_does_not_depend_on_the_size_of_its_batch(tiny):
    task, variables, _ = tiny
    keys = jax.random.split(jax.random.key(2), 8)
    samples = sample(task, variables, keys)
    half = sample(task, variables, keys[:4])
    chex.assert_shape(samples, (8, 4, 4, 1))
    assert jnp.abs(samples).max() <= 1
    np.testing.assert_allclose(samples[3], half[3], atol=1e-5)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(sampler="ddimm"), 'no "ddimm"; did you mean "ddim"'),
        (Request(sampler="ancestral_learned"), "has not learned a variance"),
        (Request(steps=1001), "has 1000 steps"),
        (Request(label=3), "there are 3 classes"),
        (Request(prompt="a cat"), "--prompt has no effect"),
    ],
)
def test_an_invalid_request_raises_a_user_error(tiny, request_, message):
    task, variables, _ = tiny
    with pytest.raises(UserError, match=message):
        sample(task, variables, jax.random.split(jax.random.key(0), 2), request_)


def test_guidance_of_an_unconditional_network_raises_a_user_error():
    network = UNet(channels=8, multipliers=(1,), blocks=1, attention_sizes=())
    task = bound(Diffusion(network), (4, 4, 1), 17)
    with pytest.raises(UserError, match="needs a class-conditional run"):
        sample(task, NO_VARIABLES, jax.random.split(jax.random.key(0), 2), Request(guidance=2.0))


def test_an_image_size_that_the_network_cannot_halve_raises_a_field_error():
    with pytest.raises(FieldError, match=r"^network\..* 3 times, and 28x28 is not divisible by 8"):
        bound(Diffusion(UNet()), (28, 28, 1), 256)


def test_training_a_dit_lowers_the_loss():
    task = bound(Diffusion(DiT(patch=2, width=16, depth=2, heads=2)), (4, 4, 1), 17, classes=3)
    images = np.random.default_rng(0).integers(0, 17, (8, 4, 4, 1), np.uint8)
    batch = Batch(images, np.arange(8, dtype=np.int32) % 3, np.arange(8, dtype=np.int32))
    batch = jax.tree.map(jnp.asarray, batch)
    params, extra = first_variables(task, batch)
    keys = jax.random.split(jax.random.key(1), 8)

    @jax.jit
    def step(params):
        def mean(params):
            return loss_of(task, Variables(params, extra), batch, keys).losses.mean()

        now, gradient = jax.value_and_grad(mean)(params)
        return now, jax.tree.map(lambda a, g: a - 0.3 * g, params, gradient)

    losses = []
    for _ in range(21):
        now, params = step(params)
        losses.append(now)
    assert losses[-1] < 0.8 * losses[0]


def test_training_with_learned_variance_and_importance_sampled_times_lowers_the_bound():
    task = Diffusion(
        DiT(patch=2, width=8, depth=1, heads=1),
        EvenBetas(6),
        variance="learned",
        vlb_weight=1.0,
        times="importance",
        sampling=Sampling("ancestral_learned", 3),
    )
    task = bound(task, (4, 4, 1), 17, batch_size=32)
    images = np.random.default_rng(0).integers(0, 17, (32, 4, 4, 1), np.uint8)
    batch = Batch(images, np.zeros(32, np.int32), np.arange(32, dtype=np.int32))
    batch = jax.tree.map(jnp.asarray, batch)
    params, extra = first_variables(task, batch)

    @jax.jit
    def step(params, extra, number):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), number), 32)

        def mean(params):
            losses, metrics, statistics = loss_of(task, Variables(params, extra), batch, keys)
            return losses.mean(), (metrics, statistics)

        gradient, (metrics, statistics) = jax.grad(mean, has_aux=True)(params)
        params = jax.tree.map(lambda a, g: a - 0.01 * jnp.clip(g, -1, 1), params, gradient)
        return params, task.update_extra(extra, statistics), metrics["vlb"].mean()

    bounds = []
    for number in range(60):
        params, extra, bound_now = step(params, extra, number)
        bounds.append(float(bound_now))
    assert extra["history"].counts.sum() == 60 * 32
    assert np.isfinite(bounds).all()
    assert np.mean(bounds[-20:]) < np.mean(bounds[:20])
    samples = sample(task, Variables(params, extra), jax.random.split(jax.random.key(2), 2))
    assert jnp.isfinite(samples).all()


def test_a_learned_variance_without_a_table_of_betas_raises_a_field_error():
    network = DiT(patch=2, width=8, depth=1, heads=1)
    with pytest.raises(FieldError, match=r"^variance=learned: needs a table of betas"):
        bound(Diffusion(network, Cosine(), variance="learned"), (4, 4, 1), 17)


def test_the_bits_of_all_noise_levels_add_up_to_the_bound():
    times = (np.arange(1000)[None] + np.random.default_rng(0).uniform(size=(3, 1))) / 1000
    terms = {"t": times, "mse": times**0, "kl": 64 * np.log(2) * 2 * times, "distortion": times}
    metrics, images = noise_levels(terms, 64)
    bits = [metrics[f"bits_t_{t / 10:.1f}"] for t in range(10)]
    assert sum(bits) == pytest.approx(1, abs=1e-3)  # the integral of 2 t
    assert bits[9] == pytest.approx(0.19, abs=1e-3)
    assert metrics["mse_t_0.5"] == 1
    assert set(images) == {"levels", "rate_distortion"}


def test_rate_and_distortion_are_those_of_the_same_time():
    """With kl(t) = c (1 + a t) and distortion t^2, rate(t) = c ((1 - t) + a (1 - t^2) / 2)."""
    times = np.random.default_rng(0).permutation((np.arange(20_000) + 0.5) / 20_000)
    times, dims = times.reshape(-1, 8), 64
    kl = 100 * (1 + 3 * times)
    rate, rmse = rate_distortion(times, kl, times**2, dims)
    t = rmse / 127.5
    expected = 100 * ((1 - t) + 3 * (1 - t**2) / 2) / (dims * np.log(2))
    assert (np.diff(rate) > 0).all()
    assert (np.diff(rmse) < 0).all()
    np.testing.assert_allclose(rate, expected, atol=2e-3 * expected.max())
