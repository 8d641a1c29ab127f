"""The dual encoder of CLIP (Radford et al. 2021): image tower, text encoder and temperature."""

import math
from typing import Annotated, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from ddpm_jax.fields import BOUND, Count, FieldError
from ddpm_jax.nn.layers import Context, Conv
from ddpm_jax.nn.text_encoder import SIZES, TextEncoder

GROUPS = 8  # number of groups of group norm in the image tower


class ImageTower(nn.Module):
    """A convolutional network: images [B, H, W, C] in [-1, 1] -> features [B, width].

    Each level has a convolution of stride 2 and a residual convolution.  Levels follow each other
    until the height is at most 4.

    Attributes:
      channels: Channels of each level; further levels have as many as the last one.
      width: Width of the features.
      dtype: Type of the computation.
    """

    channels: tuple[int, ...]
    width: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch width"]:
        """Return the features of images."""
        level = 0
        while x.shape[1] > 4:
            width = self.channels[min(level, len(self.channels) - 1)]
            x = Conv(width, (3, 3), strides=2, dtype=self.dtype, name=f"conv_{level}")(x)
            x = nn.gelu(nn.GroupNorm(GROUPS, dtype=jnp.float32, name=f"norm_{level}")(x))
            h = Conv(width, (3, 3), dtype=self.dtype, name=f"more_{level}")(x)
            x += nn.gelu(nn.GroupNorm(GROUPS, dtype=jnp.float32, name=f"norm_more_{level}")(h))
            level += 1
        x = nn.gelu(
            nn.Dense(4 * self.width, dtype=self.dtype, name="hidden")(x.reshape(len(x), -1))
        )
        return nn.Dense(self.width, name="features")(x)


class DualEncoder(nn.Module):
    """An image tower and a text encoder with one embedding space, and a learned temperature.

    Attributes:
      size: Size of the text encoder: tiny, small or base (`text_encoder.SIZES`).
      length: Number of bytes of the longest caption.
      channels: Channels of the image tower's convolutions.
      embedding_dim: Dimensions of the embeddings by which captions and images are compared.
      dtype: Type of the computation.
    """

    size: Literal["tiny", "small", "base"] = "small"
    length: Annotated[int, BOUND] = 0
    channels: tuple[Count, ...] = (32, 64, 128)
    embedding_dim: Count = 64
    dtype: Annotated[DTypeLike | None, BOUND] = None

    def setup(self) -> None:
        """Create the text encoder and its projection, the image tower, and the temperature."""
        self.text = TextEncoder(SIZES[self.size], self.length, self.dtype)
        self.text_out = nn.Dense(self.embedding_dim, use_bias=False)
        self.image = ImageTower(self.channels, self.embedding_dim, self.dtype)
        start = nn.initializers.constant(-math.log(0.07))
        self.log_scale = self.param("log_scale", start, ())

    def encode_text(self, tokens: UInt8[Array, "batch length"]) -> Context:
        """Return the features of captions, to condition a generation model on."""
        return self.text(tokens)

    def embed_text(self, tokens: UInt8[Array, "batch length"]) -> Float[Array, "batch embedding"]:
        """Return the embeddings of captions, of norm 1."""
        return _unit(self.text_out(self.text(tokens).pooled[:, SIZES[self.size].width :]))

    def embed_image(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch embedding"]:
        """Return the embeddings of images, of norm 1."""
        return _unit(self.image(x))

    def scale(self) -> Float[Array, ""]:
        """Return 1 / temperature, at most 100 (Radford et al. 2021, sec. 2.5)."""
        return jnp.exp(jnp.minimum(self.log_scale, jnp.log(100.0)))

    def __call__(
        self, tokens: UInt8[Array, "batch length"], x: Float[Array, "batch h w c"]
    ) -> tuple[Float[Array, "batch embedding"], Float[Array, "batch embedding"], Float[Array, ""]]:
        """Return the embeddings of captions, those of images, and 1 / temperature."""
        return self.embed_text(tokens), self.embed_image(x), self.scale()

    def check(self) -> None:
        """Check that both encoders can be built.

        Raises:
          FieldError: If a number of `channels` is not a multiple of `GROUPS`.
        """
        for channels in self.channels:
            if channels % GROUPS:
                raise FieldError(
                    f"channels={','.join(map(str, self.channels))}: {channels} is not a "
                    f"multiple of {GROUPS}, the number of groups of group norm"
                )


def _unit(x: Float[Array, "batch embedding"]) -> Float[Array, "batch embedding"]:
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
