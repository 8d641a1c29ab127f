"""The text encoder: a transformer over the bytes of captions.

It is a small version of CLIP's (Radford et al. 2021, sec. 2.4).  It computes the features of each
word, for the cross-attention of a generation model, and of the caption as a whole, for the
embedding that is compared with those of images.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int, UInt8

from ddpm_jax.nn.layers import Context, layer_norm
from ddpm_jax.nn.transformer import CONV_RADIUS, Block, masked_mean, norm_float32


class Size(NamedTuple):
    """The size of a text encoder.

    Attributes:
      width: Width of a token.
      depth: Number of blocks.
      heads: Number of attention heads.
    """

    width: int
    depth: int
    heads: int

    @property
    def features(self) -> int:
        """Number of features of a token: those of its word, and the output of the blocks."""
        return 2 * self.width


SIZES = {"tiny": Size(64, 2, 2), "small": Size(128, 4, 4), "base": Size(384, 8, 6)}

VOCABULARY = 256  # values of a byte
MAX_WORD_BYTES = 12  # longer words are split
BYTES_PER_TOKEN = 5  # L bytes have room for ceil(L / 5) tokens
SPACE = ord(" ")  # it and the bytes below it are separators or padding


class TextEncoder(nn.Module):
    """The text encoder: bytes [B, L] -> `Context` with ceil(L / 5) tokens of 2 width features.

    Each word is a token, embedded from its bytes alone, so that its embedding does not depend on
    its position (words as patches of bytes: Slagle 2024, "SpaceByte").  Pre-norm blocks follow,
    each with a convolution over adjacent tokens and attention to all tokens but padding, in both
    directions.  The pooled features are the mean over the tokens; an empty caption has no tokens,
    and its pooled features are 0.

    The features of a token are the layer-normalised embedding of its word and the output of the
    blocks.  The output of the blocks suffices for distinguishing images, but not for generating
    them: blocks trained through the pooled features need not preserve a word at its position.

    Attributes:
      size: Size of the transformer.
      length: Number of bytes of the longest caption.
      dtype: Type of the computation; norms and softmax stay float32.
    """

    size: Size
    length: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, tokens: UInt8[Array, "batch length"]) -> Context:
        """Return the features of captions."""
        width, depth, _ = self.size
        normal = nn.initializers.normal(0.02)

        def embed(count: int, name: str) -> nn.Embed:
            return nn.Embed(count, width, dtype=self.dtype, name=name)

        word, offset = words(tokens)
        count = _max_words(tokens.shape[1])
        x = embed(VOCABULARY, "bytes")(tokens.astype(jnp.int32))
        x += embed(MAX_WORD_BYTES, "within")(offset)
        x = nn.gelu(nn.Dense(width, dtype=self.dtype, name="spell")(x))
        membership = jax.nn.one_hot(jnp.where(tokens > SPACE, word, -1), count, dtype=x.dtype)
        mask = membership.any(1)
        x = jnp.einsum("blw,bld->bwd", membership, x)  # the sum over the bytes of each word
        x = nn.Dense(width, dtype=self.dtype, name="word")(x)
        word_features = layer_norm(x).astype(x.dtype)
        positions = self.param("places", normal, (_max_words(self.length), width))
        x += positions[:count].astype(x.dtype)
        for index in range(depth):
            block = Block(
                self.size.heads, conv_radius=CONV_RADIUS, dtype=self.dtype, name=f"block_{index}"
            )
            x = block(x, mask)
        x = jnp.concatenate([word_features, norm_float32(x, "norm_out")], -1)
        return Context(x, mask, masked_mean(x, mask))


def words(
    tokens: UInt8[Array, "batch length"],
) -> tuple[Int[Array, "batch length"], Int[Array, "batch length"]]:
    """Return (the index of the word that each byte belongs to, the byte's offset in the word).

    A word begins where a letter, a digit or a byte of a non-ASCII character follows any other byte;
    other bytes belong to the word before them.  A word is split after `MAX_WORD_BYTES` bytes.
    Words beyond the maximum number of words are parts of the last one.
    """
    length = tokens.shape[1]
    lower = tokens | 0x20
    is_letter = ((lower >= ord("a")) & (lower <= ord("z"))) | (tokens >= 0x80)
    is_letter |= (tokens >= ord("0")) & (tokens <= ord("9"))
    begins = is_letter & ~jnp.pad(is_letter[:, :-1], ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(begins, jnp.arange(length), 0), axis=1)
    offset = (jnp.arange(length) - start) % MAX_WORD_BYTES
    word = jnp.cumsum(offset == 0, 1) - 1
    return jnp.minimum(word, _max_words(length) - 1), offset


def _max_words(length: int) -> int:
    """Return the maximum number of words of a caption of `length` bytes."""
    return -(-length // BYTES_PER_TOKEN)
