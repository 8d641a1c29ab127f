"""The U-Net of Ho et al. 2020, the DiT, their layers and dropout."""

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
from helpers.text import random_params


def count(net, shape, **inputs):
    keys = jax.random.key(0)
    params = jax.eval_shape(lambda: net.init(keys, jnp.zeros((1, *shape)), jnp.zeros(1), **inputs))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_cifar10_network_of_ho_et_al_has_35_746_307_parameters():
    assert count(UNet(), (32, 32, 3)) == 35_746_307


def test_options_add_the_expected_number_of_parameters():
    plain = UNet(channels=16, multipliers=(1, 2), blocks=1)
    labels = jnp.zeros(1, jnp.int32)
    base = count(plain, (8, 8, 3))
    assert count(plain.copy(classes=10), (8, 8, 3), labels=labels) == base + 11 * 64
    assert count(plain.copy(outputs=6), (8, 8, 3)) == base + 3 * (9 * 16 + 1)
    assert count(plain.copy(head_channels=8, remat=True), (8, 8, 3)) == base


def test_dropout_masks_depend_on_the_key_of_each_example_and_without_keys_it_is_the_identity():
    x, keys = jnp.ones((4, 1000)), jax.random.split(jax.random.key(0), 4)
    layer = Dropout(0.25)
    chex.assert_trees_all_equal(layer.apply({}, x, None), x)
    dropped = layer.apply({}, x, keys)
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert abs((dropped == 0).mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    chex.assert_trees_all_equal(layer.apply({}, x[2:3], keys[2:3])[0], dropped[2])


def test_the_time_embedding_is_that_of_ho_et_al():
    embedding = time_embedding(jnp.array([0.5]), 8)[0]
    rates = np.exp(-np.log(10_000) * np.arange(4) / 3)
    expected = np.concatenate([np.sin(500 * rates), np.cos(500 * rates)])
    np.testing.assert_allclose(embedding, expected, atol=1e-4)


def test_the_position_embedding_of_a_pixel_embeds_its_row_and_its_column():
    embedding = grid_embedding(3, 5, 8)
    assert embedding.shape == (3, 5, 8)
    angles = {"row": np.array([2.0, 2e-4]), "column": np.array([4.0, 4e-4])}
    waves = [wave(angles[axis]) for axis in ("row", "column") for wave in (np.sin, np.cos)]
    np.testing.assert_allclose(embedding[2, 4], np.concatenate(waves), atol=1e-5)
    assert jnp.isfinite(grid_embedding(2, 2, 4)).all()  # one frequency


def test_attention_equals_that_of_flax():
    import flax.linen as nn

    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8))
    expected = nn.dot_product_attention(q, k, v)
    np.testing.assert_allclose(attention(q, k, v), expected, atol=1e-5)


def test_depth_to_space_inverts_space_to_depth_which_moves_a_patch_into_one_pixel():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    patches = space_to_depth(x, 2)
    chex.assert_shape(patches, (2, 2, 3, 12))
    chex.assert_trees_all_equal(depth_to_space(patches, 2), x)
    chex.assert_trees_all_equal(patches[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))


DIT = DiT(outputs=2, patch=2, width=16, depth=3, heads=2, classes=3, dropout=0.5)


def test_a_dit_is_initially_zero_and_the_images_of_a_batch_are_independent():
    x, time = jax.random.normal(jax.random.key(0), (4, 4, 6, 1)), jnp.linspace(0.1, 0.9, 4)
    labels = jnp.arange(4) % 3
    apply = jax.jit(DIT.apply)
    params = jax.jit(DIT.init)(jax.random.key(1), x, time, labels)
    # adaLN-Zero (Peebles & Xie 2023, sec. 3.2): every block is the identity, the output 0.
    chex.assert_trees_all_equal(apply(params, x, time, labels), jnp.zeros((4, 4, 6, 2)))
    params = random_params(DIT.init, x, time, labels)
    dropout_keys = jax.random.split(jax.random.key(3), 4)
    for keys in (None, dropout_keys):
        batch = apply(params, x, time, labels, keys)
        single = apply(params, x[2:3], time[2:3], labels[2:3], None if keys is None else keys[2:3])
        np.testing.assert_allclose(batch[2], single[0], atol=1e-5)
    plain = apply(params, x, time, labels)
    assert not np.allclose(plain, apply(params, x, time, labels, dropout_keys), atol=1e-2)
    for changed in (
        apply(params, x, time + 0.1, labels),
        apply(params, x, time, (labels + 1) % 4),
    ):
        assert not np.allclose(plain, changed, atol=1e-3)


def test_the_blocks_of_a_dit_have_independent_dropout_masks():
    # The blocks are one layer in a scan, so the number of the block is folded into the key.
    x, keys = jnp.ones((2, 1000)), jax.random.split(jax.random.key(0), 2)
    layer = Dropout(0.5)
    first, second = (layer.apply({}, x, keys, number) for number in (0, 1))
    assert abs((first == second).mean() - 0.5) < 4 * (0.25 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (DiT(patch=3), "^patch=3: images of 28x28 pixels cannot be cut"),
        (DiT(width=10, heads=4), "^width=10: must be a multiple of heads=4"),
        (
            UNet(multipliers=(1, 2), channels=48, head_channels=32),
            "^head_channels=32: must divide .* and a level has 48",
        ),
        (
            UNet(space_to_depth=2, multipliers=(1, 2, 2)),
            "^multipliers=1,2,2: .* 2x2 pixels into channels and halves images 2 times",
        ),
        (UNet(multipliers=(1, 2)), "^attention_sizes=16: .* the side 16; .* the sides are 28, 14;"),
    ],
)
def test_a_network_that_does_not_fit_the_images_raises_an_error_of_one_line(net, message):
    with pytest.raises(FieldError, match=message):
        net.check((28, 28, 1))


@pytest.mark.parametrize("size", [1.0, 3.0, 6.0])  # of queries and keys: flat and peaked softmax
def test_attention_in_bfloat16_has_only_the_error_of_rounding_its_inputs_and_its_output(size):
    rng = np.random.default_rng(0)
    exact = [rng.normal(size=(2, 64, 2, 32)) * scale for scale in (size, size, 1.0)]
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in exact]

    def reference(query, key, value):
        query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
        logits = np.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        return np.einsum("bhqk,bkhd->bqhd", scipy.special.softmax(logits, -1), value)

    expected = reference(*rounded)
    output = np.asarray(jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16), np.float64)
    actual = np.asarray(jax.jit(attention)(*rounded), np.float64)
    error = lambda a, b: np.sqrt(np.mean(np.square(a - b)))  # noqa: E731
    assert error(actual, expected) <= 1.02 * error(output, expected)
    assert error(actual, reference(*exact)) <= 1.02 * error(output, reference(*exact))
    single = [jnp.asarray(a, jnp.float32) for a in exact]
    logits = jnp.einsum("bqhd,bkhd->bhqk", *single[:2]) * 32**-0.5
    plain = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), single[2])
    np.testing.assert_array_equal(attention(*single), plain)
