"""The transformer of an autoregressive generation model of image codes, given a caption."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.fields import BOUND, Count, Layers, OptionalLayers, Share
from ddpm_jax.nn.layers import Context
from ddpm_jax.nn.text_refiner import refine_text
from ddpm_jax.nn.transformer import Block, check_width


class CodeTransformer(nn.Module):
    """A causal transformer: codes [B, N] -> logits [B, N, codes].

    The logits at position i are of code i, given the codes before it and the caption.

    Attributes:
      codes: Number of codes in the codebook.
      width: Width of a token.
      depth: Number of blocks.
      heads: Number of attention heads.
      text_refiner_blocks: Blocks of the text refiner (`nn.text_refiner`). 0: no text refiner.
      dropout: Dropout rate after each branch, in training.
      dtype: Type of the computation; norms, softmax and logits stay float32.
    """

    codes: Annotated[int, BOUND] = 0
    width: Count = 192
    depth: Layers = 6
    heads: Count = 6
    text_refiner_blocks: OptionalLayers = 0
    dropout: Share = 0.0
    dtype: Annotated[DTypeLike | None, BOUND] = None

    @nn.compact
    def __call__(
        self,
        codes: Int[Array, "batch positions"],
        context: Context,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch positions codes"]:
        """Return the logits.

        Args:
          codes: Codes in raster order; the last one has no effect.
          context: Features of captions, one for each n images side by side.
          keys: Keys of dropout, one for each image; None outside training.
        """
        context = refine_text(
            context, len(codes), self.width, self.text_refiner_blocks, self.heads, self.dtype
        )
        normal = nn.initializers.normal(0.02)
        # The start token has the index `codes`.
        previous = jnp.pad(codes[:, :-1], ((0, 0), (1, 0)), constant_values=self.codes)
        x = nn.Embed(self.codes + 1, self.width, embedding_init=normal, name="codes")(previous)
        x += self.param("places", normal, x.shape[1:])
        x += nn.Dense(self.width, name="pooled")(context.pooled)[:, None]
        x = x.astype(self.dtype or x.dtype)
        for index in range(self.depth):
            block = Block(self.heads, True, self.dropout, self.dtype, name=f"block_{index}")
            x = block(x, None, context, keys)
        x = nn.LayerNorm(epsilon=1e-6, name="norm_out")(x.astype(jnp.float32))
        return nn.Dense(self.codes, kernel_init=nn.initializers.zeros, name="out")(x)

    def check(self) -> None:
        """Check that the network can be built.

        Raises:
          FieldError: If `width` is odd or not a multiple of `heads`.
        """
        check_width(self.width, self.heads)
