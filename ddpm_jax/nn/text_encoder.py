"""The text encoder: a transformer whose tokens are the words of a caption.

A caption is given as bytes, and the first layer computes the features of a word from its bytes.

It is a small version of the text encoder of CLIP (Radford et al. 2021, sec. 2.4).  It computes
features of each word, for the cross-attention of a generation model, and one feature vector of the
caption, from which the dual encoder computes the embedding of the caption.
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
      width: Number of features of a token within the transformer.
      depth: Number of transformer blocks.
      heads: Number of attention heads.
    """

    width: int
    depth: int
    heads: int

    @property
    def features(self) -> int:
        """The number of output features of a token; `TextEncoder` describes them."""
        return 2 * self.width


SIZES = {"tiny": Size(64, 2, 2), "small": Size(128, 4, 4), "base": Size(384, 8, 6)}

VOCABULARY = 256  # number of values of a byte
MAX_WORD_BYTES = 12  # longer words are split
BYTES_PER_TOKEN = 5  # a caption of L bytes has at most ceil(L / 5) tokens
SPACE = ord(" ")  # bytes <= SPACE are separators or padding


class TextEncoder(nn.Module):
    """The text encoder: bytes [B, L] -> `Context` with ceil(L / 5) tokens per caption.

    Each word is a token.  The embedding of a word is a function of the bytes of the word only, so
    it does not depend on the position of the word (Slagle 2024, "SpaceByte": words as patches of
    bytes).  Pre-norm transformer blocks follow, each with a convolution over adjacent tokens and
    bidirectional attention to all tokens except padding.  The pooled features are the mean over the
    tokens; for an empty caption, which has no tokens, they are 0.

    A token has 2 width features: the layer-normalised embedding of the word, and the output of the
    last block.  The output of the blocks alone suffices to distinguish images, but not to generate
    them: the blocks are trained through the mean over the tokens, so the output at a position need
    not contain the word of that position.

    Attributes:
      size: Size of the transformer.
      length: Maximum number of bytes of a caption.
      dtype: Data type of the computation, except norms and softmax, which are float32. If None,
        everything is computed in float32.
    """

    size: Size
    length: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, tokens: UInt8[Array, "batch length"]) -> Context:
        """Return the text features of captions, given as bytes that are padded with 0."""
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
    """Return, for each byte, (the index of the word of the byte, the offset within the word).

    Letters, digits and bytes of non-ASCII characters are word bytes.  A word begins at each word
    byte that does not follow a word byte; separators belong to the word before them.  A word is
    split after `MAX_WORD_BYTES` bytes.  If there are more words than `_max_words`, the last word
    contains all further words.
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
