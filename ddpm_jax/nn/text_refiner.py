"""Blocks that a generation model reads a caption's features with."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.nn.layers import (
    Context,
    time_embedding,
)
from ddpm_jax.nn.transformer import NEAR, Block, masked_mean, norm_float32


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
        x = norm_float32(x, "norm_out")
        pooled = nn.Dense(self.width, use_bias=False, name="pooled")(pooled)
        return Context(x, mask, pooled + masked_mean(x, mask))


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
