"""An image tower, and both towers of CLIP (Radford et al. 2021) with their temperature."""

import math
from typing import Annotated, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from ddpm_jax.fields import BOUND, Count, FieldError
from ddpm_jax.nn.layers import (
    Context,
    Conv,
)
from ddpm_jax.nn.text_encoder import SIZES, TextEncoder

GROUPS = 8  # of the image tower's channels, for group norm


class ImageTower(nn.Module):
    """Images [B, H, W, C] in [-1, 1] -> features [B, width]: convolutions that halve down to 4.

    Behind each that halves is a residual one of as many channels.

    Attributes:
      channels: of each 3x3 convolution, the last of them repeated as long as the height exceeds 4.
      width: of the features.
      dtype: of the computation.
    """

    channels: tuple[int, ...]
    width: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch width"]:
        number = 0
        while x.shape[1] > 4:
            width = self.channels[min(number, len(self.channels) - 1)]
            x = Conv(width, (3, 3), strides=2, dtype=self.dtype, name=f"conv_{number}")(x)
            x = nn.gelu(nn.GroupNorm(GROUPS, dtype=jnp.float32, name=f"norm_{number}")(x))
            h = Conv(width, (3, 3), dtype=self.dtype, name=f"more_{number}")(x)
            x += nn.gelu(nn.GroupNorm(GROUPS, dtype=jnp.float32, name=f"norm_more_{number}")(h))
            number += 1
        x = nn.gelu(
            nn.Dense(4 * self.width, dtype=self.dtype, name="hidden")(x.reshape(len(x), -1))
        )
        return nn.Dense(self.width, name="features")(x)


class DualEncoder(nn.Module):
    """Both towers, their projections to one space, and the temperature.

    Attributes:
      size: Size of the text encoder: tiny, small or base (`text_encoder.SIZES`).
      length: Tokens of the longest caption.
      channels: Channels of the image tower's convolutions.
      embedding_dim: Dimensions of the space in which captions and images are compared.
      dtype: Type of the computation.
    """

    size: Literal["tiny", "small", "base"] = "small"
    length: Annotated[int, BOUND] = 0
    channels: tuple[Count, ...] = (32, 64, 128)
    embedding_dim: Count = 64
    dtype: Annotated[DTypeLike | None, BOUND] = None

    def setup(self) -> None:
        """Make both towers, the projection of the text, and the temperature."""
        self.text = TextEncoder(SIZES[self.size], self.length, self.dtype)
        self.text_out = nn.Dense(self.embedding_dim, use_bias=False)
        self.image = ImageTower(self.channels, self.embedding_dim, self.dtype)
        start = nn.initializers.constant(-math.log(0.07))
        self.log_scale = self.param("log_scale", start, ())

    def read(self, tokens: UInt8[Array, "batch length"]) -> Context:
        """Return a caption's features, which a generation model is conditioned on."""
        return self.text(tokens)

    def embed_text(self, tokens: UInt8[Array, "batch length"]) -> Float[Array, "batch embedding"]:
        """Return a caption's place in the joint space, of length 1."""
        return _unit(self.text_out(self.text(tokens).pooled[:, SIZES[self.size].width :]))

    def embed_image(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch embedding"]:
        """Return an image's place in the joint space, of length 1."""
        return _unit(self.image(x))

    def scale(self) -> Float[Array, ""]:
        """1 / temperature, at most 100 (Radford et al. 2021, sec. 2.5)."""
        return jnp.exp(jnp.minimum(self.log_scale, jnp.log(100.0)))

    def __call__(
        self, tokens: UInt8[Array, "batch length"], x: Float[Array, "batch h w c"]
    ) -> tuple[Float[Array, "batch embedding"], Float[Array, "batch embedding"], Float[Array, ""]]:
        return self.embed_text(tokens), self.embed_image(x), self.scale()

    def check(self) -> None:
        """Check that both encoders can be built.

        Raises:
          FieldError: one cannot.
        """
        for channels in self.channels:
            if channels % GROUPS:
                raise FieldError(
                    f"channels={','.join(map(str, self.channels))}: {channels} does not divide "
                    f"into the {GROUPS} groups of group norm"
                )


def _unit(x: Float[Array, "batch embedding"]) -> Float[Array, "batch embedding"]:
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
