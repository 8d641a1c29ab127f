"""The transformer block of the text encoder, the text refiner and the `CodeTransformer`."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from ddpm_jax.fields import FieldError
from ddpm_jax.nn.layers import (
    Context,
    Conv,
    CrossAttention,
    Dropout,
    attention,
)

CONV_RADIUS = 3  # words on either side in the convolution: "small red circle to the left"


class Block(nn.Module):
    """A pre-norm transformer block: self-attention, cross-attention to captions (optional), MLP.

    If `conv_radius` is not 0, the first layer is a linear convolution, which mixes adjacent words
    such as "large blue square" (Allen-Zhu 2025, "Canon layers"; Gulati et al. 2020, "Conformer").

    Attributes:
      heads: Number of attention heads.
      causal: Let each position attend only to itself and to earlier positions.
      dropout: Dropout rate after each branch in training.
      dtype: Data type of the computation, except norms and softmax, which are float32. If None, the
        type of the inputs.
      conv_radius: Number of tokens on either side in the convolution. If 0, there is no
        convolution.
    """

    heads: int
    causal: bool = False
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    conv_radius: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "batch length"] | None = None,
        context: Context | None = None,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Return the output of the block, of the shape of x.

        Args:
          x: Tokens.
          mask: True for tokens that are text, False for padding; self-attention of a causal block
            does not use it. If None, there is no padding.
          context: Text features for cross-attention. If None, there is no cross-attention.
          keys: Keys of dropout, one for each example. If None, dropout is off.
        """
        size, length, width = x.shape

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        def drop(h: Array, name: str) -> Array:
            return Dropout(self.dropout, name=name)(h, keys)

        attended = None if mask is None else mask[:, None, None]
        if self.causal:
            attended = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if self.conv_radius:
            h = norm_float32(x, "norm_near")
            h = h if mask is None else h * mask[..., None]
            conv = Conv(width, (2 * self.conv_radius + 1,), dtype=self.dtype, name="near")
            x += drop(conv(h), "drop_near")
        parts = jnp.split(dense(3 * width, "qkv")(norm_float32(x, "norm_1")), 3, -1)
        q, k, v = (a.reshape(size, length, self.heads, width // self.heads) for a in parts)
        x += drop(dense(width, "project")(attention(q, k, v, attended).reshape(x.shape)), "drop_1")
        if context is not None:
            cross = CrossAttention(self.heads, self.dtype, name="cross")
            x += drop(cross(norm_float32(x, "norm_cross"), context), "drop_cross")
        h = nn.gelu(dense(4 * width, "mlp_1")(norm_float32(x, "norm_2")))
        return x + drop(dense(width, "mlp_2")(h), "drop_2")


def check_width(width: int, heads: int) -> None:
    """Check that a transformer and a `TextRefiner` can have `width` features and `heads` heads.

    Raises:
      FieldError: If `width` is odd or not a multiple of `heads`.
    """
    if width % heads:
        raise FieldError(f"width={width}: must be a multiple of heads={heads}", "heads")
    if width % 2:
        raise FieldError(f"width={width}: must be even, to embed positions by sines and cosines")


def masked_mean(
    x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
) -> Float[Array, "batch width"]:
    """Return the mean over the tokens whose mask is True, or 0 if there are none."""
    return jnp.einsum("bl,bld->bd", mask / jnp.maximum(mask.sum(1, keepdims=True), 1), x)


def norm_float32(
    x: Float[Array, "batch length width"], name: str
) -> Float[Array, "batch length width"]:
    """Return the layer norm of x, computed in float32, by a submodule named `name`."""
    out: Array = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=name)(x)
    return out.astype(x.dtype)
