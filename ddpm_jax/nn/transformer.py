"""Transformer blocks, which text encoders and models over codes are built of."""

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

NEAR = 3  # words on either side that a block sees at once: "small red circle to the left"


class Block(nn.Module):
    """Self-attention, attention to a context if there is one, and an MLP, each with its norm.

    With `near`, a linear convolution comes first, so that words side by side, "large blue square",
    are together at once (Allen-Zhu 2025, "Canon layers"; Gulati et al. 2020, "Conformer").

    Attributes:
      heads: of either attention.
      causal: a place sees those before it and itself.
      dropout: rate behind each branch, in training.
      dtype: of the computation.
      near: tokens on either side that a convolution sees, before the attention; 0: there is none.
    """

    heads: int
    causal: bool = False
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    near: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "batch length"] | None = None,
        context: Context | None = None,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch length width"]:
        size, length, width = x.shape

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        def drop(h: Array, name: str) -> Array:
            return Dropout(self.dropout, name=name)(h, keys)

        seen = None if mask is None else mask[:, None, None]
        if self.causal:
            seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if self.near:
            h = norm_float32(x, "norm_near")
            h = h if mask is None else h * mask[..., None]
            conv = Conv(width, (2 * self.near + 1,), dtype=self.dtype, name="near")
            x += drop(conv(h), "drop_near")
        parts = jnp.split(dense(3 * width, "qkv")(norm_float32(x, "norm_1")), 3, -1)
        q, k, v = (a.reshape(size, length, self.heads, width // self.heads) for a in parts)
        x += drop(dense(width, "project")(attention(q, k, v, seen).reshape(x.shape)), "drop_1")
        if context is not None:
            cross = CrossAttention(self.heads, self.dtype, name="cross")
            x += drop(cross(norm_float32(x, "norm_cross"), context), "drop_cross")
        h = nn.gelu(dense(4 * width, "mlp_1")(norm_float32(x, "norm_2")))
        return x + drop(dense(width, "mlp_2")(h), "drop_2")


def check_width(width: int, heads: int) -> None:
    """Check that a transformer and its `TextRefiner` can have this width.

    Raises:
      FieldError: they cannot.
    """
    if width % heads:
        raise FieldError(f"width={width}: must divide by heads={heads}", "heads")
    if width % 2:
        raise FieldError(f"width={width}: must be even, for sines and cosines")


def masked_mean(
    x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
) -> Float[Array, "batch width"]:
    """Return the mean over the tokens that are text; 0 where there are none."""
    return jnp.einsum("bl,bld->bd", mask / jnp.maximum(mask.sum(1, keepdims=True), 1), x)


def norm_float32(
    x: Float[Array, "batch length width"], name: str
) -> Float[Array, "batch length width"]:
    """Layer norm, in float32."""
    out: Array = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=name)(x)
    return out.astype(x.dtype)
