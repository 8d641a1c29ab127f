"""A transformer that reads captions' bytes, and the image tower it is trained against.

The two towers of CLIP (Radford et al. 2021, sec. 2.4), small: features of a caption's tokens,
its words, for a generation model's cross-attention, and one vector of the whole for comparing
with an image's.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int, UInt8

from ddpm_jax.nn.layers import (
    Context,
    layer_norm,
)
from ddpm_jax.nn.transformer import NEAR, Block, masked_mean, norm_float32


class Size(NamedTuple):
    """A transformer's: tokens' width, blocks, heads."""

    width: int
    depth: int
    heads: int

    @property
    def features(self) -> int:
        """Features of a caption's token: the word's own, and those behind the blocks."""
        return 2 * self.width


SIZES = {"tiny": Size(64, 2, 2), "small": Size(128, 4, 4), "base": Size(384, 8, 6)}

VOCABULARY = 256  # bytes
LONGEST = 12  # bytes of a word, behind which another begins

USUAL = 5  # bytes of a caption for each token that it may have

SPACE = ord(" ")  # and what is below it say nothing


class TextEncoder(nn.Module):
    """Bytes [B, L] -> Context: features [B, L / 5, 2 width], which are text, their mean pooled.

    A token for each word, made of its bytes alone, so that a word is the same wherever it stands
    (words as patches of bytes: Slagle 2024, "SpaceByte"); and then pre-norm blocks, in which
    every token sees those near it and then every other but padding, in both directions.  An empty
    caption has no tokens, and its pooled features are 0.

    A token's features are the word's own, of standard norm, and those behind the blocks.  The last
    ones alone would do for distinguishing images, not for generating them: blocks trained for the
    pooled features need not keep a word where it stands.

    Attributes:
      size: of the transformer.
      length: of the longest caption.
      dtype: of the computation; norms and softmax stay float32.
    """

    size: Size
    length: int
    dtype: DTypeLike | None = None

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
        word_features = layer_norm(x).astype(x.dtype)
        places = self.param("places", normal, (_room(self.length), width))
        x += places[:count].astype(x.dtype)
        for number in range(depth):
            x = Block(self.size.heads, near=NEAR, dtype=self.dtype, name=f"block_{number}")(x, mask)
        x = jnp.concatenate([word_features, norm_float32(x, "norm_out")], -1)
        return Context(x, mask, masked_mean(x, mask))


def words(
    tokens: UInt8[Array, "batch length"],
) -> tuple[Int[Array, "batch length"], Int[Array, "batch length"]]:
    """Return (which word a byte belongs to, its place in it).

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
    """Return how many words there may be in so many bytes."""
    return -(-length // USUAL)
