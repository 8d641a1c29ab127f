"""The U-Net to the letter, its dropout, and the diffusion task around it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.types import Batch
from ddpm_jax.diffusion.schedules import cosine, from_betas, linear_betas
from ddpm_jax.errors import UserError
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.layers import Dropout, attention, fold, grid_embedding, time_embedding, unfold
from ddpm_jax.nn.unet import UNet
from ddpm_jax.task import Request
from ddpm_jax.tasks.diffusion import diffusion_task, noise_levels
from ddpm_jax.tasks.image_sampler import Sampling
from helpers.text import drawn


def count(net, shape, **inputs):
    keys = jax.random.key(0)
    params = jax.eval_shape(lambda: net.init(keys, jnp.zeros((1, *shape)), jnp.zeros(1), **inputs))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_hos_cifar10_network_has_its_35_746_307_parameters():
    assert count(UNet(), (32, 32, 3)) == 35_746_307


def test_options_change_the_network_as_they_say():
    plain = UNet(channels=16, multipliers=(1, 2), blocks=1)
    labels = jnp.zeros(1, jnp.int32)
    base = count(plain, (8, 8, 3))
    assert count(plain.copy(classes=10), (8, 8, 3), labels=labels) == base + 11 * 64
    assert count(plain.copy(outputs=6), (8, 8, 3)) == base + 3 * (9 * 16 + 1)
    assert count(plain.copy(head_channels=8, remat=True), (8, 8, 3)) == base


def test_dropout_drops_each_example_by_its_own_key_and_nothing_without_keys():
    x, keys = jnp.ones((4, 1000)), jax.random.split(jax.random.key(0), 4)
    layer = Dropout(0.25)
    chex.assert_trees_all_equal(layer.apply({}, x, None), x)
    dropped = layer.apply({}, x, keys)
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert abs((dropped == 0).mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    chex.assert_trees_all_equal(layer.apply({}, x[2:3], keys[2:3])[0], dropped[2])


def test_the_time_embedding_is_hos():
    found = time_embedding(jnp.array([0.5]), 8)[0]
    rates = np.exp(-np.log(10_000) * np.arange(4) / 3)
    expected = np.concatenate([np.sin(500 * rates), np.cos(500 * rates)])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_pixel_is_told_its_row_and_its_column():
    found = grid_embedding(3, 5, 8)
    assert found.shape == (3, 5, 8)
    angles = {"row": np.array([2.0, 2e-4]), "column": np.array([4.0, 4e-4])}
    waves = [wave(angles[axis]) for axis in ("row", "column") for wave in (np.sin, np.cos)]
    np.testing.assert_allclose(found[2, 4], np.concatenate(waves), atol=1e-5)
    assert jnp.isfinite(grid_embedding(2, 2, 4)).all()  # a single rate


def test_attention_is_flaxs():
    import flax.linen as nn

    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8))
    expected = nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(attention(q, k, v), expected, atol=1e-5)


@pytest.fixture(scope="module")
def tiny():
    net = UNet(
        outputs=1,
        channels=8,
        multipliers=(1,),
        blocks=1,
        attention_sizes=(),
        classes=3,
        dropout=0.5,
    )
    task = diffusion_task(
        net,
        from_betas(linear_betas()),
        (4, 4, 1),
        17,
        sampling=Sampling(steps=3),
        batch_size=8,
    )
    images = np.random.default_rng(0).integers(0, 17, (8, 4, 4, 1), np.uint8)
    batch = jax.tree.map(
        jnp.asarray, Batch(images, np.arange(8, dtype=np.int32) % 3, np.arange(8, dtype=np.int32))
    )
    params, fixed = jax.jit(task.init)(jax.random.key(0), batch)
    return task, params, fixed, batch


def test_a_new_networks_loss_is_the_noises_own_size(tiny):
    task, params, fixed, batch = tiny
    keys = jax.random.split(jax.random.key(1), 8)
    loss = functools.partial(task.loss, train=False, gather=lambda tree: tree)
    losses, metrics, _ = jax.jit(loss)(params, fixed, batch, keys)
    chex.assert_shape(losses, (8,))
    # The output layer starts at zero, so |eps - 0|^2 is 1 on average over 128 dimensions.
    assert abs(losses.mean() - 1) < 4 * (2 / 128) ** 0.5
    chex.assert_trees_all_equal(losses, metrics["mse"])


def test_the_task_draws_image_3_the_same_in_any_batch(tiny):
    task, params, fixed, _ = tiny
    keys = jax.random.split(jax.random.key(2), 8)
    many = task.sample(params, fixed, keys, Request())
    few = task.sample(params, fixed, keys[:4], Request())
    chex.assert_shape(many, (8, 4, 4, 1))
    assert jnp.abs(many).max() <= 1
    np.testing.assert_allclose(many[3], few[3], atol=1e-5)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request(sampler="ddimm"), 'no "ddimm"; did you mean "ddim"'),
        (Request(sampler="ancestral_learned"), "has not learned a variance"),
        (Request(steps=1001), "has 1000 steps"),
        (Request(label=3), "there are 3 classes"),
        (Request(prompt="a cat"), "--prompt means nothing"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_line(tiny, request_, says):
    task, params, fixed, _ = tiny
    with pytest.raises(UserError, match=says):
        task.sample(params, fixed, jax.random.split(jax.random.key(0), 2), request_)


def test_guidance_on_an_unconditional_network_is_refused():
    net = UNet(outputs=1, channels=8, multipliers=(1,), blocks=1, attention_sizes=())
    task = diffusion_task(net, from_betas(linear_betas()), (4, 4, 1), 17, batch_size=8)
    with pytest.raises(UserError, match="needs a class-conditional run"):
        task.sample({}, {}, jax.random.split(jax.random.key(0), 2), Request(guidance=2.0))


def test_an_image_that_the_network_cannot_halve_is_refused():
    with pytest.raises(UserError, match="halves images 3 times, and 28x28 does not divide by 8"):
        diffusion_task(UNet(), from_betas(linear_betas()), (28, 28, 1), 256, batch_size=8)


def test_folding_is_undone_and_keeps_a_patch_together():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    folded = fold(x, 2)
    chex.assert_shape(folded, (2, 2, 3, 12))
    chex.assert_trees_all_equal(unfold(folded, 2), x)
    chex.assert_trees_all_equal(folded[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))


DIT = DiT(outputs=2, patch=2, width=16, depth=3, heads=2, classes=3, dropout=0.5)


def test_a_dit_starts_as_nothing_and_its_images_do_not_mix():
    x, time = jax.random.normal(jax.random.key(0), (4, 4, 6, 1)), jnp.linspace(0.1, 0.9, 4)
    labels = jnp.arange(4) % 3
    apply = jax.jit(DIT.apply)
    params = jax.jit(DIT.init)(jax.random.key(1), x, time, labels)
    # adaLN-Zero (Peebles & Xie 2023, sec. 3.2): every block is the identity, the output 0.
    chex.assert_trees_all_equal(apply(params, x, time, labels), jnp.zeros((4, 4, 6, 2)))
    params = drawn(DIT.init, x, time, labels)
    drops = jax.random.split(jax.random.key(3), 4)
    for keys in (None, drops):
        many = apply(params, x, time, labels, keys)
        one = apply(params, x[2:3], time[2:3], labels[2:3], None if keys is None else keys[2:3])
        np.testing.assert_allclose(many[2], one[0], atol=1e-5)
    plain = apply(params, x, time, labels)
    assert not np.allclose(plain, apply(params, x, time, labels, drops), atol=1e-2)
    for other in (
        apply(params, x, time + 0.1, labels),
        apply(params, x, time, (labels + 1) % 4),
    ):
        assert not np.allclose(plain, other, atol=1e-3)


def test_a_dits_blocks_drop_differently():
    # One layer of a scan: the block's number is folded in, too.
    x, keys = jnp.ones((2, 1000)), jax.random.split(jax.random.key(0), 2)
    layer = Dropout(0.5)
    first, second = (layer.apply({}, x, keys, number) for number in (0, 1))
    assert abs((first == second).mean() - 0.5) < 4 * (0.25 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("net", "says"),
    [
        (DiT(patch=3), "28x28 does not divide by --config.patch=3"),
        (DiT(width=10, heads=4), "--config.width=10: must divide by 4 heads"),
        (UNet(multipliers=(1, 2), channels=48, head_channels=32), "48 channels do not divide into"),
        (UNet(fold=2, multipliers=(1, 2, 2)), "folds 2x2 pixels and halves images 2 times"),
    ],
)
def test_a_network_that_does_not_fit_the_images_is_one_line(net, says):
    with pytest.raises(UserError, match=says):
        net.check((28, 28, 1))


def test_a_dit_trains_in_the_diffusion_task():
    net = DiT(outputs=1, patch=2, width=16, depth=2, heads=2, classes=3)
    task = diffusion_task(net, from_betas(linear_betas()), (4, 4, 1), 17, batch_size=8)
    images = np.random.default_rng(0).integers(0, 17, (8, 4, 4, 1), np.uint8)
    batch = Batch(images, np.arange(8, dtype=np.int32) % 3, np.arange(8, dtype=np.int32))
    batch = jax.tree.map(jnp.asarray, batch)
    params, fixed = jax.jit(task.init)(jax.random.key(0), batch)
    keys = jax.random.split(jax.random.key(1), 8)

    @jax.jit
    def step(params):
        def mean(params):
            return task.loss(params, fixed, batch, keys, train=True, gather=lambda t: t)[0].mean()

        now, gradient = jax.value_and_grad(mean)(params)
        return now, jax.tree.map(lambda a, g: a - 0.3 * g, params, gradient)

    losses = []
    for _ in range(21):
        now, params = step(params)
        losses.append(now)
    assert losses[-1] < 0.8 * losses[0]


def test_a_learned_variance_and_importance_times_train_and_draw():
    net = DiT(outputs=2, patch=2, width=8, depth=1, heads=1)
    task = diffusion_task(
        net,
        from_betas(np.linspace(1e-4, 0.02, 6)),
        (4, 4, 1),
        17,
        variance="learned",
        times="importance",
        bound_scale=1.0,
        sampling=Sampling("ancestral_learned", 3),
        batch_size=32,
    )
    images = np.random.default_rng(0).integers(0, 17, (32, 4, 4, 1), np.uint8)
    batch = Batch(images, np.zeros(32, np.int32), np.arange(32, dtype=np.int32))
    batch = jax.tree.map(jnp.asarray, batch)
    params, fixed = jax.jit(task.init)(jax.random.key(0), batch)

    @jax.jit
    def step(params, fixed, number):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), number), 32)

        def mean(params):
            losses, metrics, statistics = task.loss(
                params, fixed, batch, keys, train=True, gather=lambda t: t
            )
            return losses.mean(), (metrics, statistics)

        gradient, (metrics, statistics) = jax.grad(mean, has_aux=True)(params)
        params = jax.tree.map(lambda a, g: a - 0.01 * jnp.clip(g, -1, 1), params, gradient)
        return params, task.update(fixed, statistics), metrics["vlb"].mean()

    bounds = []
    for number in range(60):
        params, fixed, bound = step(params, fixed, number)
        bounds.append(float(bound))
    assert fixed["history"].counts.sum() == 60 * 32
    assert np.isfinite(bounds).all()
    assert np.mean(bounds[-20:]) < np.mean(bounds[:20])
    drawn = task.sample(params, fixed, jax.random.split(jax.random.key(2), 2), Request())
    assert jnp.isfinite(drawn).all()


def test_a_learned_variance_needs_a_table():
    net = DiT(outputs=2, patch=2, width=8, depth=1, heads=1)
    with pytest.raises(UserError, match="need a table of betas"):
        diffusion_task(net, cosine(), (4, 4, 1), 17, variance="learned", batch_size=8)


def test_the_noise_levels_bits_add_up_and_their_rate_rises():
    times = (np.arange(1000)[None] + np.random.default_rng(0).uniform(size=(3, 1))) / 1000
    found = {"t": times, "mse": times**0, "kl": 64 * np.log(2) * 2 * times, "distortion": times}
    metrics, pictures = noise_levels(found, 64)
    bits = [metrics[f"bits_t_{t / 10:.1f}"] for t in range(10)]
    assert sum(bits) == pytest.approx(1, abs=1e-3)  # the integral of 2 t
    assert bits[9] == pytest.approx(0.19, abs=1e-3)
    assert metrics["mse_t_0.5"] == 1
    assert set(pictures) == {"levels", "rate_distortion"}
