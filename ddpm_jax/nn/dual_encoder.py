"""The dual encoder of CLIP (Radford et al. 2021): image encoder, text encoder and temperature."""

import math
from typing import Annotated, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from ddpm_jax.fields import BOUND, Count, FieldError
from ddpm_jax.nn.layers import Context, Conv
from ddpm_jax.nn.text_encoder import SIZES, TextEncoder

GROUPS = 8  # number of groups of group norm in the image encoder


class ImageTower(nn.Module):
    """The image encoder, a convolutional network: images [B, H, W, C] -> features [B, width].

    The images are in [-1, 1].  Each level has a convolution of stride 2 and a residual convolution.
    There are as many levels as halvings are necessary for a height of at most 4.

    Attributes:
      channels: Number of channels of each level. If there are more levels than entries, the last
        entry is used for the remaining levels.
      width: Number of features.
      dtype: Data type of the computation, except norms and features, which are float32. If None,
        the type of the images.
    """

    channels: tuple[int, ...]
    width: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch width"]:
        """Return one vector of features for each image."""
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
    """An image encoder and a text encoder with a common embedding space, and a temperature.

    Attributes:
      size: Size of the text encoder (`text_encoder.SIZES`).
      length: Maximum number of bytes of a caption.
      channels: Number of channels of each level of the image encoder.
      embedding_dim: Dimension of the embeddings by which captions and images are compared.
      dtype: Data type of the computation, except norms, softmax and embeddings, which are float32.
        If None, everything is computed in float32.
    """

    size: Literal["tiny", "small", "base"] = "small"
    length: Annotated[int, BOUND] = 0
    channels: tuple[Count, ...] = (32, 64, 128)
    embedding_dim: Count = 64
    dtype: Annotated[DTypeLike | None, BOUND] = None

    def setup(self) -> None:
        """Create the text encoder, a linear projection, the image encoder and the temperature."""
        self.text = TextEncoder(SIZES[self.size], self.length, self.dtype)
        self.text_out = nn.Dense(self.embedding_dim, use_bias=False)
        self.image = ImageTower(self.channels, self.embedding_dim, self.dtype)
        start = nn.initializers.constant(-math.log(0.07))
        self.log_scale = self.param("log_scale", start, ())

    def encode_text(self, tokens: UInt8[Array, "batch length"]) -> Context:
        """Return the text features of captions, on which a generation model is conditioned."""
        return self.text(tokens)

    def embed_text(self, tokens: UInt8[Array, "batch length"]) -> Float[Array, "batch embedding"]:
        """Return one embedding of norm 1 for each caption, given as padded bytes."""
        return _unit(self.text_out(self.text(tokens).pooled[:, SIZES[self.size].width :]))

    def embed_image(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch embedding"]:
        """Return one embedding of norm 1 for each image."""
        return _unit(self.image(x))

    def scale(self) -> Float[Array, ""]:
        """Return 1 / temperature, clipped at 100 (Radford et al. 2021, sec. 2.5)."""
        return jnp.exp(jnp.minimum(self.log_scale, jnp.log(100.0)))

    def __call__(
        self, tokens: UInt8[Array, "batch length"], x: Float[Array, "batch h w c"]
    ) -> tuple[Float[Array, "batch embedding"], Float[Array, "batch embedding"], Float[Array, ""]]:
        """Return (embeddings of the captions, embeddings of the images, 1 / temperature)."""
        return self.embed_text(tokens), self.embed_image(x), self.scale()

    def check(self) -> None:
        """Check that both encoders can be built with these fields.

        Raises:
          FieldError: If an entry of `channels` is not a multiple of `GROUPS`.
        """
        for channels in self.channels:
            if channels % GROUPS:
                raise FieldError(
                    f"channels={','.join(map(str, self.channels))}: {channels} is not a "
                    f"multiple of {GROUPS}, the number of groups of group norm; give a multiple"
                )


def _unit(x: Float[Array, "batch embedding"]) -> Float[Array, "batch embedding"]:
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
