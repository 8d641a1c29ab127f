"""Blocks that a generation model reads a caption's features with."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ddpm_jax.nn.layers import (
    Context,
    time_embedding,
)
from ddpm_jax.nn.transformer import NEAR, Block, masked_mean, norm_float32


class TextRefiner(nn.Module):
    """A caption's features [B, L, any], read again: -> [B, L, width].

    A text encoder that was trained to distinguish images need not have kept what generation needs,
    and is frozen.  So a generation model reads its features with blocks of its own, which are
    trained with it (the token refiner of Kong et al. 2024, sec. 4.2, without its input of the
    time), and which get the tokens' places again, as sines.

    Attributes:
      width, depth, heads: of the blocks.
      dtype: of the computation.
    """

    width: int
    depth: int
    heads: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, context: Context) -> Context:
        tokens, mask, pooled = context
        x = nn.Dense(self.width, dtype=self.dtype, name="tokens")(tokens)
        x += time_embedding(jnp.arange(x.shape[1]) / 1000, self.width).astype(x.dtype)
        for number in range(self.depth):
            x = Block(self.heads, near=NEAR, dtype=self.dtype, name=f"block_{number}")(x, mask)
        x = norm_float32(x, "norm_out")
        pooled = nn.Dense(self.width, use_bias=False, name="pooled")(pooled)
        return Context(x, mask, pooled + masked_mean(x, mask))


def refine_text(
    context: Context, size: int, width: int, depth: int, heads: int, dtype: DTypeLike | None
) -> Context:
    """Return `context` as a generation model's `TextRefiner` reads it, repeated for every image.

    It is called within the model's compact method, whose submodule `refiner` it makes.

    Args:
      context: of as many captions as images, or of fewer; each is read once, and belongs to as many
        images, side by side, as there are for each caption.
      size: images of the batch.
      width, depth, heads: of the refiner's blocks; depth 0: there is no refiner.
      dtype: of the computation.
    """
    if depth:
        context = TextRefiner(width, depth, heads, dtype, name="refiner")(context)
    each = size // len(context.mask)
    return Context(*(a.repeat(each, 0) for a in context)) if each > 1 else context
