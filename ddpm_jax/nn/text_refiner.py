"""The text refiner: trained blocks of a generation model over the frozen features of captions."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ddpm_jax.nn.layers import Context, time_embedding
from ddpm_jax.nn.transformer import CONV_RADIUS, Block, masked_mean, norm_float32


class TextRefiner(nn.Module):
    """Transformer blocks over the features of captions: [B, L, any] -> [B, L, width].

    The text encoder is frozen, and was trained to distinguish images; its features may lack what
    generation needs.  The refiner transforms them and is trained with the generation model (the
    token refiner of Kong et al. 2024, sec. 4.2, but without the time as input).  It adds sinusoidal
    embeddings of the tokens' positions.

    Attributes:
      width: Width of a token.
      depth: Number of blocks.
      heads: Number of attention heads.
      dtype: Type of the computation; None: the type of the inputs.
    """

    width: int
    depth: int
    heads: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, context: Context) -> Context:
        """Return the transformed features of captions."""
        tokens, mask, pooled = context
        x = nn.Dense(self.width, dtype=self.dtype, name="tokens")(tokens)
        x += time_embedding(jnp.arange(x.shape[1]) / 1000, self.width).astype(x.dtype)
        for index in range(self.depth):
            block = Block(
                self.heads, conv_radius=CONV_RADIUS, dtype=self.dtype, name=f"block_{index}"
            )
            x = block(x, mask)
        x = norm_float32(x, "norm_out")
        pooled = nn.Dense(self.width, use_bias=False, name="pooled")(pooled)
        return Context(x, mask, pooled + masked_mean(x, mask))


def refine_text(
    context: Context, size: int, width: int, depth: int, heads: int, dtype: DTypeLike | None
) -> Context:
    """Return the output of the text refiner, repeated for every image of a caption.

    It is called within a module's compact method, and creates the submodule `refiner` of that
    module.

    Args:
      context: Features of B / n captions, each of which belongs to n images side by side.
      size: The number B of images.
      width: Width of a token of the refiner.
      depth: Number of blocks of the refiner. 0: there is no refiner, and `context` is repeated.
      heads: Number of attention heads of the refiner.
      dtype: Type of the computation; None: the type of the inputs.
    """
    if depth:
        context = TextRefiner(width, depth, heads, dtype, name="refiner")(context)
    repeats = size // len(context.mask)
    return Context(*(a.repeat(repeats, 0) for a in context)) if repeats > 1 else context
