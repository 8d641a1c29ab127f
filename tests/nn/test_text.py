"""The text encoder and the networks conditioned on its features: padding has no effect."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.tokenizer import tokenize
from ddpm_jax.nn.code_transformer import CodeTransformer
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.layers import Context
from ddpm_jax.nn.text_encoder import MAX_WORD_BYTES, SIZES, TextEncoder, words
from ddpm_jax.nn.transformer import Block
from ddpm_jax.nn.unet import UNet
from helpers.text import random_params

BRANCHES = ("project", "mlp_2")
SIZE = SIZES["tiny"]


def test_padding_has_no_effect():
    texts = ["a red circle", "two blue square", ""]
    long, short = (jnp.asarray(tokenize(texts, length)) for length in (48, 15))
    params, encode = encoder()
    padded, features = encode(params, long), encode(params, short)
    np.testing.assert_allclose(padded.pooled, features.pooled, atol=1e-5)
    mask = np.asarray(features.mask)
    assert mask.sum() == 3 + 3  # a token for each word
    tokens = padded.tokens[:, : mask.shape[1]]
    np.testing.assert_allclose(tokens[mask], features.tokens[mask], atol=1e-5)
    np.testing.assert_array_equal(padded.pooled[2], jnp.zeros(SIZE.features))


@functools.cache
def encoder():
    """Return the parameters of a text encoder, and its compiled `apply`."""
    net = TextEncoder(SIZE, 48)
    return random_params(net.init, jnp.zeros((1, 48), jnp.uint8)), jax.jit(net.apply)


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
    word, offset = words(jnp.asarray(tokens))
    printable = tokens[0] > ord(" ")
    texts = [bytes(tokens[0][printable & (word[0] == i)]).decode() for i in range(12)]
    assert [text for text in texts if text] == parts
    assert offset.max() < MAX_WORD_BYTES
    params, encode = encoder()
    assert encode(params, jnp.asarray(tokens)).mask.sum() == len(parts)


def test_the_embedding_of_a_word_does_not_depend_on_its_position():
    net = TextEncoder(SIZE._replace(depth=0), 48)
    texts = jnp.asarray(tokenize(["red circle", "one red triangle"], 48))
    params = random_params(net.init, texts)
    params["params"]["places"] *= 0
    tokens = net.apply(params, texts).tokens
    np.testing.assert_allclose(tokens[0, 0], tokens[1, 1], atol=1e-5)
    assert np.abs(tokens[0, 0] - tokens[0, 1]).max() > 0.1


def test_the_first_half_of_the_features_of_a_token_depends_on_its_word_alone():
    params, encode = encoder()
    tokens = encode(params, jnp.asarray(tokenize(["red circle", "one red triangle"], 48))).tokens
    word, contextual = jnp.split(tokens, 2, -1)
    np.testing.assert_allclose(word[0, 0], word[1, 1], atol=1e-5)  # red
    assert np.abs(contextual[0, 0] - contextual[1, 1]).max() > 0.1
    np.testing.assert_allclose(word.std(-1), 1.0, atol=1e-3)


def test_the_convolution_of_a_block_reaches_tokens_within_its_radius_and_no_padding():
    """The branches of attention and MLP are set to 0, and the Jacobian is inspected."""
    net, x = Block(2, conv_radius=2), jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 4)))
    mask = jnp.arange(8)[None] < 6
    params = random_params(net.init, x, mask)
    zeroed = {name: jax.tree.map(jnp.zeros_like, params["params"][name]) for name in BRANCHES}
    params = {"params": {**params["params"], **zeroed}}
    jacobian = jax.jit(jax.jacobian(lambda x: net.apply(params, x, mask)))
    derivatives = np.asarray(jacobian(x))[0, :, :, 0]  # [to, w, from, w]
    depends = np.abs(derivatives).max((1, 3)) > 0
    distance = np.abs(np.subtract.outer(np.arange(8), np.arange(8)))
    itself = np.eye(8, dtype=bool)
    np.testing.assert_array_equal(depends, ((distance <= 2) & np.asarray(mask)) | itself)


@pytest.mark.parametrize(
    "net",
    [
        UNet(channels=8, multipliers=(1,), blocks=1, attention_sizes=(4,), outputs=2),
        DiT(patch=1, width=16, depth=2, heads=2, outputs=2, text_refiner_blocks=1),
    ],
    ids=["unet", "dit with a text refiner"],
)
def test_the_output_of_a_generation_model_depends_on_text_but_not_on_padding(net):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 4, 2)), jnp.float32)
    t = jnp.array([0.3, 0.7])
    mask = np.arange(6) < np.array([[4], [0]])  # four tokens, and an empty caption
    tokens = rng.normal(size=(2, 6, 8)).astype(np.float32)
    pooled = rng.normal(size=(2, 8)).astype(np.float32)

    def context(tokens, mask):
        return Context(*map(jnp.asarray, (tokens, mask, pooled)))

    apply = jax.jit(net.apply)
    params = random_params(net.init, x, t, None, None, context(tokens, mask))

    def out(tokens, mask=mask):
        return apply(params, x, t, None, None, context(tokens, mask))

    plain = out(tokens)
    assert jnp.isfinite(plain).all()
    np.testing.assert_array_equal(plain, out(np.where(mask[..., None], tokens, 7.0)))
    longer = np.concatenate([tokens, tokens], 1), np.concatenate([mask, np.zeros_like(mask)], 1)
    np.testing.assert_allclose(plain, out(*longer), atol=1e-6)
    assert np.abs(plain - out(np.where(mask[..., None], tokens + 1, tokens)))[0].max() > 1e-3


def test_the_logits_of_a_code_depend_only_on_the_codes_before_it():
    net = CodeTransformer(11, width=16, depth=2, heads=2, text_refiner_blocks=1)
    context = Context(jnp.ones((1, 3, 8)), jnp.ones((1, 3), bool), jnp.ones((1, 8)))
    codes = jnp.arange(6)[None]
    params = random_params(net.init, codes, context)
    apply = jax.jit(net.apply)
    changed = codes.at[0, 3].set(9)
    before, after = (apply(params, inputs, context) for inputs in (codes, changed))
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert np.abs(before[:, 4:] - after[:, 4:]).min(-1).max() > 1e-4


def test_remat_does_not_change_results():
    x, t = jnp.ones((2, 4, 4, 3)), jnp.array([0.2, 0.8])
    plain = DiT(patch=1, width=16, depth=2, heads=2)
    params = random_params(plain.init, x, t)
    rematerialised = plain.clone(remat=True)
    values = [
        jax.jit(jax.value_and_grad(lambda p, net=net: jnp.square(net.apply(p, x, t)).sum()))(params)
        for net in (plain, rematerialised)
    ]
    for a, b in zip(jax.tree.leaves(values[0]), jax.tree.leaves(values[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
