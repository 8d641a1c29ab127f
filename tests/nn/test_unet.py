"""The U-Net to the letter, the DiT, their layers and dropout."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ddpm_jax.fields import FieldError
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.layers import (
    Dropout,
    attention,
    depth_to_space,
    grid_embedding,
    space_to_depth,
    time_embedding,
)
from ddpm_jax.nn.unet import UNet
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


def test_a_pixel_is_given_its_row_and_its_column():
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


def test_folding_is_undone_and_keeps_a_patch_together():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    folded = space_to_depth(x, 2)
    chex.assert_shape(folded, (2, 2, 3, 12))
    chex.assert_trees_all_equal(depth_to_space(folded, 2), x)
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
        (DiT(patch=3), "^patch=3: .* and 28x28 does not divide by it"),
        (DiT(width=10, heads=4), "^width=10: must divide by heads=4"),
        (
            UNet(multipliers=(1, 2), channels=48, head_channels=32),
            "^head_channels=32: 48 channels do not",
        ),
        (
            UNet(space_to_depth=2, multipliers=(1, 2, 2)),
            "^multipliers=1,2,2: .* 2x2 pixels together and halves images 2 times",
        ),
        (UNet(multipliers=(1, 2)), "^attention_sizes=16: .* the side 16; .* they have 28, 14;"),
    ],
)
def test_a_network_that_does_not_fit_the_images_is_one_line(net, says):
    with pytest.raises(FieldError, match=says):
        net.check((28, 28, 1))


@pytest.mark.parametrize("size", [1.0, 3.0, 6.0])  # of queries and keys: flat and peaked softmax
def test_attention_in_bfloat16_errs_by_its_inputs_and_its_output_alone(size):
    rng = np.random.default_rng(0)
    exact = [rng.normal(size=(2, 64, 2, 32)) * scale for scale in (size, size, 1.0)]
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in exact]

    def reference(query, key, value):
        query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
        logits = np.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        return np.einsum("bhqk,bkhd->bqhd", scipy.special.softmax(logits, -1), value)

    right = reference(*rounded)
    output = np.asarray(jnp.asarray(right, jnp.float32).astype(jnp.bfloat16), np.float64)
    found = np.asarray(jax.jit(attention)(*rounded), np.float64)
    error = lambda a, b: np.sqrt(np.mean(np.square(a - b)))  # noqa: E731
    assert error(found, right) <= 1.02 * error(output, right)
    assert error(found, reference(*exact)) <= 1.02 * error(output, reference(*exact))
    single = [jnp.asarray(a, jnp.float32) for a in exact]
    logits = jnp.einsum("bqhd,bkhd->bhqk", *single[:2]) * 32**-0.5
    plain = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), single[2])
    np.testing.assert_array_equal(attention(*single), plain)
