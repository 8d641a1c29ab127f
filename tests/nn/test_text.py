"""The text encoder and what reads it: padding changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.tokenizer import tokenize
from ddpm_jax.nn.code_transformer import CodeTransformer
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.layers import Context
from ddpm_jax.nn.text_encoder import LONGEST, SIZES, TextEncoder, words
from ddpm_jax.nn.transformer import Block
from ddpm_jax.nn.unet import UNet
from helpers.text import drawn

BRANCHES = ("project", "mlp_2")
SIZE = SIZES["tiny"]


def test_padding_changes_nothing():
    texts = ["a red circle", "two blue square", ""]
    long, short = (jnp.asarray(tokenize(texts, length)) for length in (48, 15))
    params, read = reader()
    one, other = read(params, long), read(params, short)
    np.testing.assert_allclose(one.pooled, other.pooled, atol=1e-5)
    mask = np.asarray(other.mask)
    assert mask.sum() == 3 + 3  # a token for each word
    np.testing.assert_allclose(one.tokens[:, : mask.shape[1]][mask], other.tokens[mask], atol=1e-5)
    np.testing.assert_array_equal(one.pooled[2], jnp.zeros(SIZE.features))


@functools.cache
def reader():
    """(parameters, compiled) of a text encoder."""
    net = TextEncoder(SIZE, 48)
    return drawn(net.init, jnp.zeros((1, 48), jnp.uint8)), jax.jit(net.apply)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a small red circle, to the  left", ["a", "small", "red", "circle,", "to", "the", "left"]),
        ("internationalisation", ["internationa", "lisation"]),  # after 12 bytes
        ("ein Bär 红色的三角!", ["ein", "Bär", "红色的三", "角!"]),
        ("a b c d e f g h i j k l m n", [*"abcdefghi", "jklmn"]),  # no more than L / 5
        ("  ?! \U0001f534", ["?!", "\U0001f534"]),
        (" ", []),
    ],
)  # fmt: skip
def test_words_are_tokens_in_any_language(text, parts):
    tokens = tokenize([text], 48)
    word, place = words(jnp.asarray(tokens))
    printable = tokens[0] > ord(" ")
    found = [bytes(tokens[0][printable & (word[0] == i)]).decode() for i in range(12)]
    assert [part for part in found if part] == parts
    assert place.max() < LONGEST
    params, read = reader()
    assert read(params, jnp.asarray(tokens)).mask.sum() == len(parts)


def test_a_word_is_read_alike_wherever_it_stands():
    net = TextEncoder(SIZE._replace(depth=0), 48)
    texts = jnp.asarray(tokenize(["red circle", "one red triangle"], 48))
    params = drawn(net.init, texts)
    params["params"]["places"] *= 0
    tokens = net.apply(params, texts).tokens
    np.testing.assert_allclose(tokens[0, 0], tokens[1, 1], atol=1e-5)
    assert np.abs(tokens[0, 0] - tokens[0, 1]).max() > 0.1


def test_the_first_half_of_a_tokens_features_are_the_words_own_whatever_the_blocks_do():
    params, read = reader()
    tokens = read(params, jnp.asarray(tokenize(["red circle", "one red triangle"], 48))).tokens
    own, seen = jnp.split(tokens, 2, -1)
    np.testing.assert_allclose(own[0, 0], own[1, 1], atol=1e-5)  # red
    assert np.abs(seen[0, 0] - seen[1, 1]).max() > 0.1
    np.testing.assert_allclose(own.std(-1), 1.0, atol=1e-3)


def test_a_block_sees_so_many_tokens_near_and_no_padding_at_once():
    """Without attention, what a token becomes depends on those near it alone."""
    net, x = Block(2, near=2), jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 4)))
    mask = jnp.arange(8)[None] < 6
    params = drawn(net.init, x, mask)
    silent = {name: jax.tree.map(jnp.zeros_like, params["params"][name]) for name in BRANCHES}
    params = {"params": {**params["params"], **silent}}
    jacobian = jax.jit(jax.jacobian(lambda x: net.apply(params, x, mask)))
    found = np.asarray(jacobian(x))[0, :, :, 0]  # [to, w, from, w]
    sees = np.abs(found).max((1, 3)) > 0
    apart = np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
    itself = np.eye(8, dtype=bool)
    np.testing.assert_array_equal(sees, ((apart <= 2) & np.asarray(mask)) | itself)


@pytest.mark.parametrize(
    "net",
    [
        UNet(channels=8, multipliers=(1,), blocks=1, attention_sizes=(4,), outputs=2),
        DiT(patch=1, width=16, depth=2, heads=2, outputs=2, text_refiner_blocks=1),
    ],
    ids=["unet", "dit that reads again"],
)
def test_a_generation_model_sees_text_and_no_padding(net):
    draws = np.random.default_rng(0)
    x = jnp.asarray(draws.normal(size=(2, 4, 4, 2)), jnp.float32)
    t = jnp.array([0.3, 0.7])
    mask = np.arange(6) < np.array([[4], [0]])  # four tokens, and an empty caption
    tokens = draws.normal(size=(2, 6, 8)).astype(np.float32)
    pooled = draws.normal(size=(2, 8)).astype(np.float32)

    def context(tokens, mask):
        return Context(*map(jnp.asarray, (tokens, mask, pooled)))

    apply = jax.jit(net.apply)
    params = drawn(net.init, x, t, None, None, context(tokens, mask))

    def out(tokens, mask=mask):
        return apply(params, x, t, None, None, context(tokens, mask))

    one = out(tokens)
    assert jnp.isfinite(one).all()
    np.testing.assert_array_equal(one, out(np.where(mask[..., None], tokens, 7.0)))
    longer = np.concatenate([tokens, tokens], 1), np.concatenate([mask, np.zeros_like(mask)], 1)
    np.testing.assert_allclose(one, out(*longer), atol=1e-6)
    assert np.abs(one - out(np.where(mask[..., None], tokens + 1, tokens)))[0].max() > 1e-3


def test_codes_attend_to_those_before_them_alone():
    net = CodeTransformer(11, width=16, depth=2, heads=2, text_refiner_blocks=1)
    context = Context(jnp.ones((1, 3, 8)), jnp.ones((1, 3), bool), jnp.ones((1, 8)))
    codes = jnp.arange(6)[None]
    params = drawn(net.init, codes, context)
    apply = jax.jit(net.apply)
    one, other = (apply(params, some, context) for some in (codes, codes.at[0, 3].set(9)))
    np.testing.assert_allclose(one[:, :4], other[:, :4], atol=1e-6)
    assert np.abs(one[:, 4:] - other[:, 4:]).min(-1).max() > 1e-4


def test_remat_changes_no_result():
    x, t = jnp.ones((2, 4, 4, 3)), jnp.array([0.2, 0.8])
    plain = DiT(patch=1, width=16, depth=2, heads=2)
    params = drawn(plain.init, x, t)
    again = plain.clone(remat=True)
    value = [
        jax.jit(jax.value_and_grad(lambda p, net=net: jnp.square(net.apply(p, x, t)).sum()))(params)
        for net in (plain, again)
    ]
    for a, b in zip(jax.tree.leaves(value[0]), jax.tree.leaves(value[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
