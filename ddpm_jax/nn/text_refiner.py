"""The text refiner: a small transformer that processes the text features of captions.

It is trained with the generation model, whereas the text encoder is frozen.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from ddpm_jax.nn.layers import Context, time_embedding
from ddpm_jax.nn.transformer import CONV_RADIUS, Block, masked_mean, norm_float32


class TextRefiner(nn.Module):
    """A transformer over the text features of captions: [B, L, features] -> [B, L, width].

    The frozen text encoder was trained to distinguish images, and its features may lack information
    that generation requires.  The text refiner follows the token refiner of Kong et al. 2024,
    sec. 4.2, but time is not an input.  It adds sinusoidal embeddings of the token positions.

    Attributes:
      width: Number of output features of a token.
      depth: Number of transformer blocks.
      heads: Number of attention heads.
      dtype: Data type of the computation, except norms and softmax, which are float32. If None, the
        type of the inputs.
    """

    width: int
    depth: int
    heads: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, context: Context) -> Context:
        """Return the transformed text features; tokens and captions have `width` features."""
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
    """Return the text features of the captions of B images, after the text refiner (`TextRefiner`).

    Call this function in a compact method of a Flax module; the text refiner becomes the submodule
    `refiner` of that module.

    Args:
      context: Text features of B / n captions; image i has the caption i // n.
      size: The number B of images.
      width: Number of output features of a token.
      depth: Number of blocks of the text refiner. If 0, there is no text refiner, and `context` is
        only repeated n times.
      heads: Number of attention heads of the text refiner.
      dtype: Data type of the computation. If None, the type of the inputs.
    """
    if depth:
        context = TextRefiner(width, depth, heads, dtype, name="refiner")(context)
    repeats = size // len(context.mask)
    return Context(*(a.repeat(repeats, 0) for a in context)) if repeats > 1 else context
