"""A transformer that reads captions' bytes, and the image tower it is trained against.

The two towers of CLIP (Radford et al. 2021, sec. 2.4), small: features of a caption's tokens,
its words, for a generation model's cross-attention, and one vector of the whole for comparing
with an image's.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from ddpm_jax.data.tokenizer import VOCABULARY
from ddpm_jax.errors import UserError
from ddpm_jax.nn.layers import (
    Context,
    Conv,
    CrossAttention,
    Dropout,
    attention,
    layer_norm,
    time_embedding,
)


class Size(NamedTuple):
    """A transformer's: tokens' width, blocks, heads."""

    width: int
    depth: int
    heads: int

    @property
    def features(self) -> int:
        """Of a caption's token: the word's own, and those behind the blocks."""
        return 2 * self.width


SIZES = {"tiny": Size(64, 2, 2), "small": Size(128, 4, 4), "base": Size(384, 8, 6)}
LONGEST = 12  # bytes of a word, behind which another begins
USUAL = 5  # bytes of a caption for each token that it may have
NEAR = 3  # words on either side that a block sees at once: "small red circle to the left"
GROUPS = 8  # of the image tower's channels, for group norm
SPACE = ord(" ")  # and what is below it say nothing


class TextEncoder(nn.Module):
    """Bytes [B, L] -> Context: features [B, L / 5, 2 width], which are text, their mean pooled.

    A token for each word, made of its bytes alone, so that a word is the same wherever it stands
    (words as patches of bytes: Slagle 2024, "SpaceByte"); and then pre-norm blocks, in which
    every token sees those near it and then every other but padding, in both directions.  An empty
    caption has no tokens, and its pooled features are 0.

    A token's features are the word's own, of standard norm, and those behind the blocks.  The last
    ones alone would do for telling images apart, not for drawing: blocks trained for the pooled
    features need not keep a word where it stands.

    Attributes:
      size: of the transformer.
      length: of the longest caption.
      dtype: of the computation; norms and softmax stay float32.
    """

    size: Size
    length: int
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: UInt8[Array, "batch length"]) -> Context:
        width, depth, _ = self.size
        normal = nn.initializers.normal(0.02)

        def embed(count: int, name: str) -> nn.Embed:
            return nn.Embed(count, width, dtype=self.dtype, name=name)

        word, place = words(tokens)
        count = _room(tokens.shape[1])
        x = embed(VOCABULARY, "bytes")(tokens.astype(jnp.int32)) + embed(LONGEST, "within")(place)
        x = nn.gelu(nn.Dense(width, dtype=self.dtype, name="spell")(x))
        member = jax.nn.one_hot(jnp.where(tokens > SPACE, word, -1), count, dtype=x.dtype)
        mask = member.any(1)
        x = nn.Dense(width, dtype=self.dtype, name="word")(jnp.einsum("blw,bld->bwd", member, x))
        own = layer_norm(x).astype(x.dtype)
        places = self.param("places", normal, (_room(self.length), width))
        x += places[:count].astype(x.dtype)
        for number in range(depth):
            x = Block(self.size.heads, near=NEAR, dtype=self.dtype, name=f"block_{number}")(x, mask)
        x = jnp.concatenate([own, _norm(x, "norm_out")], -1)
        return Context(x, mask, _mean(x, mask))


def words(
    tokens: UInt8[Array, "batch length"],
) -> tuple[Int[Array, "batch length"], Int[Array, "batch length"]]:
    """(which word a byte belongs to, its place in it).

    A word begins where a letter, digit or byte of a character beyond ASCII follows any other
    byte, and behind `LONGEST` bytes of one; other bytes belong to the word before them.  Those
    beyond the L / 5 words that there is room for belong to the last.
    """
    length = tokens.shape[1]
    lower = tokens | 0x20
    inside = ((lower >= ord("a")) & (lower <= ord("z"))) | (tokens >= 0x80)
    inside |= (tokens >= ord("0")) & (tokens <= ord("9"))
    begins = inside & ~jnp.pad(inside[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(begins, jnp.arange(length), 0), axis=1)
    place = (jnp.arange(length) - start) % LONGEST
    word = jnp.cumsum(place == 0, 1) - 1
    return jnp.minimum(word, _room(length) - 1), place


def _room(length: int) -> int:
    """How many words there may be in so many bytes."""
    return -(-length // USUAL)


class Block(nn.Module):
    """Self-attention, attention to a context if there is one, and an MLP, each with its norm.

    With `near`, a linear convolution comes first, so that words side by side, "large blue square",
    are together at once (Allen-Zhu 2025, "Canon layers"; Gulati et al. 2020, "Conformer").

    Attributes:
      heads: of either attention.
      causal: a place sees those before it and itself.
      dropout: rate behind each branch, in training.
      dtype: of the computation.
      near: tokens on either side that a convolution sees, before the attention; 0: there is none.
    """

    heads: int
    causal: bool = False
    dropout: float = 0.0
    dtype: Any = None
    near: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "batch length"] | None = None,
        context: Context | None = None,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch length width"]:
        size, length, width = x.shape

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        def drop(h: Array, name: str) -> Array:
            return Dropout(self.dropout, name=name)(h, keys)

        seen = None if mask is None else mask[:, None, None]
        if self.causal:
            seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if self.near:
            h = _norm(x, "norm_near")
            h = h if mask is None else h * mask[..., None]
            conv = Conv(width, (2 * self.near + 1,), dtype=self.dtype, name="near")
            x += drop(conv(h), "drop_near")
        parts = jnp.split(dense(3 * width, "qkv")(_norm(x, "norm_1")), 3, -1)
        q, k, v = (a.reshape(size, length, self.heads, width // self.heads) for a in parts)
        x += drop(dense(width, "project")(attention(q, k, v, seen).reshape(x.shape)), "drop_1")
        if context is not None:
            cross = CrossAttention(self.heads, self.dtype, name="cross")
            x += drop(cross(_norm(x, "norm_cross"), context), "drop_cross")
        h = nn.gelu(dense(4 * width, "mlp_1")(_norm(x, "norm_2")))
        return x + drop(dense(width, "mlp_2")(h), "drop_2")


def check_width(width: int, heads: int) -> None:
    """Raises UserError unless a transformer, and its `Refiner`, can be so wide."""
    if width % heads:
        raise UserError(f"--config.width={width}: must divide by {heads} heads")
    if width % 2:
        raise UserError(f"--config.width={width}: must be even, for sines and cosines")


class Refiner(nn.Module):
    """A caption's features [B, L, any], read again: -> [B, L, width].

    A text encoder that was trained to tell images apart need not have kept what a drawing needs,
    and is frozen.  So a generation model reads its features with blocks of its own, which are
    trained with it (the token refiner of Kong et al. 2024, sec. 4.2, that is not told the time),
    and which are told tokens' places anew, by sines.

    Attributes:
      width, depth, heads: of the blocks.
      dtype: of the computation.
    """

    width: int
    depth: int
    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, context: Context) -> Context:
        tokens, mask, pooled = context
        x = nn.Dense(self.width, dtype=self.dtype, name="tokens")(tokens)
        x += time_embedding(jnp.arange(x.shape[1]) / 1000, self.width).astype(x.dtype)
        for number in range(self.depth):
            x = Block(self.heads, near=NEAR, dtype=self.dtype, name=f"block_{number}")(x, mask)
        x = _norm(x, "norm_out")
        pooled = nn.Dense(self.width, use_bias=False, name="pooled")(pooled)
        return Context(x, mask, pooled + _mean(x, mask))


def refined(
    context: Context | None, size: int, width: int, depth: int, heads: int, dtype: Any
) -> Any:
    """`context` as a generation model's `Refiner` reads it; as it is without one, or none at all.

    Of fewer captions than the `size` images of a batch, each is read once and told to as many
    images, side by side, as there are to it.

    Called within the model's compact method, whose submodule `refiner` it makes.
    """
    if context is None:
        return None
    if depth:
        context = Refiner(width, depth, heads, dtype, name="refiner")(context)
    each = size // len(context.mask)
    return jax.tree.map(lambda a: a.repeat(each, 0), context) if each > 1 else context


def _mean(
    x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
) -> Float[Array, "batch width"]:
    """Over the tokens that are text; 0 where there are none."""
    return jnp.einsum("bl,bld->bd", mask / jnp.maximum(mask.sum(1, keepdims=True), 1), x)


class ImageTower(nn.Module):
    """Images [B, H, W, C] in [-1, 1] -> features [B, width]: convolutions that halve down to 4.

    Behind each that halves is a residual one of as many channels.

    Attributes:
      channels: of each 3x3 convolution, the last of them repeated as long as the height exceeds 4.
      width: of the features.
      dtype: of the computation.
    """

    channels: tuple[int, ...]
    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch width"]:
        number = 0
        while x.shape[1] > 4:
            width = self.channels[min(number, len(self.channels) - 1)]
            x = Conv(width, (3, 3), strides=2, dtype=self.dtype, name=f"conv_{number}")(x)
            x = nn.gelu(nn.GroupNorm(GROUPS, dtype=jnp.float32, name=f"norm_{number}")(x))
            h = Conv(width, (3, 3), dtype=self.dtype, name=f"more_{number}")(x)
            x += nn.gelu(nn.GroupNorm(GROUPS, dtype=jnp.float32, name=f"norm_more_{number}")(h))
            number += 1
        x = nn.gelu(
            nn.Dense(4 * self.width, dtype=self.dtype, name="hidden")(x.reshape(len(x), -1))
        )
        return nn.Dense(self.width, name="features")(x)


class DualEncoder(nn.Module):
    """Both towers, their projections to one space, and the temperature.

    Attributes:
      size, length: of the text encoder.
      channels: of the image tower.
      joint: width of the space in which captions and images are compared.
      dtype: of the computation.
    """

    size: Size
    length: int
    channels: tuple[int, ...] = (32, 64, 128)
    joint: int = 64
    dtype: Any = None

    def setup(self) -> None:
        self.text = TextEncoder(self.size, self.length, self.dtype)
        self.text_out = nn.Dense(self.joint, use_bias=False)
        self.image = ImageTower(self.channels, self.joint, self.dtype)
        start = nn.initializers.constant(-math.log(0.07))
        self.log_scale = self.param("log_scale", start, ())

    def read(self, tokens: UInt8[Array, "batch length"]) -> Context:
        """A caption's features, what a generation model is told."""
        return self.text(tokens)

    def of_text(self, tokens: UInt8[Array, "batch length"]) -> Float[Array, "batch joint"]:
        """A caption's place in the joint space, of length 1."""
        return _unit(self.text_out(self.text(tokens).pooled[:, self.size.width :]))

    def of_image(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch joint"]:
        """An image's place in the joint space, of length 1."""
        return _unit(self.image(x))

    def scale(self) -> Float[Array, ""]:
        """1 / temperature, at most 100 (Radford et al. 2021, sec. 2.5)."""
        return jnp.exp(jnp.minimum(self.log_scale, jnp.log(100.0)))

    def __call__(self, tokens: UInt8[Array, "batch length"], x: Float[Array, "batch h w c"]) -> Any:
        return self.of_text(tokens), self.of_image(x), self.scale()

    def check(self) -> None:
        """Raises UserError unless the towers can be built."""
        for channels in self.channels:
            if channels % GROUPS:
                raise UserError(
                    f"--config.tower_channels: {channels} does not divide into the {GROUPS} groups "
                    "of group norm"
                )


def _unit(x: Float[Array, "batch joint"]) -> Float[Array, "batch joint"]:
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def _norm(x: Float[Array, "batch length width"], name: str) -> Float[Array, "batch length width"]:
    """Layer norm, in float32."""
    return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=name)(x).astype(x.dtype)
