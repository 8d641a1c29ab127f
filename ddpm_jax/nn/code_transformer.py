"""The transformer of an autoregressive generation model of codebook indices, given a caption."""

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
    """A causal transformer: codebook indices [B, N] -> logits [B, N, codes].

    The logits at position i are those of p(index i | indices before i, caption).

    Attributes:
      codes: Number of vectors in the codebook.
      width: Number of features of a token.
      depth: Number of transformer blocks.
      heads: Number of attention heads.
      text_refiner_blocks: Number of blocks of the text refiner, a small transformer that is trained
        with this network and processes the text features; 0: there is no text refiner.
      dropout: Dropout rate after each branch of a block in training.
      dtype: Data type of the computation, except norms, softmax and logits, which are float32. If
        None, everything is computed in float32.
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
        """Return the logits of the codebook indices, [B, N, codes].

        Args:
          codes: Codebook indices of the B images in raster order. The last index has no effect.
          context: Text features of B / n captions; image i has the caption i // n.
          keys: Keys of dropout, one for each image. If None, dropout is off.
        """
        context = refine_text(
            context, len(codes), self.width, self.text_refiner_blocks, self.heads, self.dtype
        )
        normal = nn.initializers.normal(0.02)
        # The start token has the index `self.codes`.
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
        """Check that the network can be built with these fields.

        Raises:
          FieldError: If `width` is odd or not a multiple of `heads`.
        """
        check_width(self.width, self.heads)
