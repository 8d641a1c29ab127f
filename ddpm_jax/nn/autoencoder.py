"""The autoencoder whose latents are images of their own, f times smaller either way.

The shape of latent diffusion's (Rombach et al. 2022, app. E): residual blocks, halved or doubled
between levels.  The first two pixels either way are folded into channels, so that nothing runs at
an image's full size.  There is no group norm, which takes away what is the same all over an image,
and of flat images that is most.  With no norm at all, training on `shapes` broke down at a learning
rate of 3e-3; the root mean square of each place, before a block, keeps it on its way.
"""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ddpm_jax.fields import BOUND, Count, FieldError, Layers
from ddpm_jax.nn.layers import Conv, depth_to_space, space_to_depth


class Residual(nn.Module):
    """x + two 3x3 convolutions, each behind a swish, of x over its size; at first x."""

    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        def conv(h: Array, name: str, init: Initializer) -> Array:
            layer = Conv(x.shape[-1], (3, 3), kernel_init=init, dtype=self.dtype, name=name)
            return layer(nn.swish(h))

        h = nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name="norm")(x).astype(x.dtype)
        h = conv(h, "conv_1", nn.initializers.lecun_normal())
        return x + conv(h, "conv_2", nn.initializers.zeros)


class Autoencoder(nn.Module):
    """x [B, H, W, C] -> (mean, logvar) of z [B, H / f, W / f, latent] -> x.

    Attributes:
      shape: (height, width, channels) of an image.
      channels: Channels of each level, from the image on; each halves the image, so f = 2^levels.
      latent_channels: Channels of z.
      blocks: Residual blocks of each level, either way.
      dtype: Type of the computation, but for norms, z and the image.
    """

    shape: Annotated[tuple[int, int, int], BOUND] = (0, 0, 0)
    channels: tuple[Count, ...] = (32, 64)
    latent_channels: Count = 4
    blocks: Layers = 1
    dtype: Annotated[DTypeLike | None, BOUND] = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(rows, columns, channels) of z."""
        factor = 2 ** len(self.channels)
        return self.shape[0] // factor, self.shape[1] // factor, self.latent_channels

    def setup(self) -> None:
        """Make the encoder and the decoder."""
        self.encoder = Encoder(self.channels, 2 * self.latent_channels, self.blocks, self.dtype)
        self.decoder = Decoder(self.channels, self.shape[2], self.blocks, self.dtype)

    def encode(
        self, x: Float[Array, "batch h w c"]
    ) -> tuple[Float[Array, "batch rows columns d"], Float[Array, "batch rows columns d"]]:
        """q(z|x): (mean, logvar); the variance, a sigmoid, is never larger than the prior's.

        A wider q(z|x) costs more nats than that of variance 1 and carries less information, so
        that nothing is lost.  Without a bound, one large output of the encoder gives that image a
        variance of its exponential, and noise as large as that ruins the decoder in one step.
        """
        mean, logit = jnp.split(self.encoder(x), 2, -1)
        return mean, jnp.maximum(nn.log_sigmoid(logit), -20.0)

    def decode(self, z: Float[Array, "batch rows columns d"]) -> Float[Array, "batch h w c"]:
        """Return the image of z."""
        return self.decoder(z)

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        return self.decode(self.encode(x)[0])

    def check(self) -> None:
        """Check that the network can be built for images of this size.

        Raises:
          FieldError: it cannot.
        """
        factor, (height, width, _) = 2 ** len(self.channels), self.shape
        if height % factor or width % factor:
            raise FieldError(
                f"channels={','.join(map(str, self.channels))}: the autoencoder makes images "
                f"{factor} times smaller, and {height}x{width} does not divide; give fewer "
                "channels, or images of another size"
            )


class Encoder(nn.Module):
    """Down: every level but the first halves."""

    channels: tuple[int, ...]
    outputs: int
    blocks: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch rows columns d"]:
        x = space_to_depth(x, 2)
        for level, width in enumerate(self.channels):
            strides = 2 if level else 1
            x = Conv(width, (3, 3), strides, dtype=self.dtype, name=f"conv_{level}")(x)
            for number in range(self.blocks):
                x = Residual(self.dtype, name=f"block_{level}_{number}")(x)
        x = nn.swish(x).astype(jnp.float32)
        return Conv(self.outputs, (3, 3), name="out")(x)


class Decoder(nn.Module):
    """The way back; a doubling writes a pixel's four children as channels (Shi et al. 2016)."""

    channels: tuple[int, ...]
    outputs: int
    blocks: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, z: Float[Array, "batch rows columns d"]) -> Float[Array, "batch h w c"]:
        width = self.channels[-1]
        x = Conv(width, (3, 3), dtype=self.dtype, name="conv_in")(z)
        for level in reversed(range(len(self.channels))):
            for number in range(self.blocks):
                x = Residual(self.dtype, name=f"block_{level}_{number}")(x)
            if level:
                width = self.channels[level - 1]
                x = Conv(4 * width, (3, 3), dtype=self.dtype, name=f"conv_{level}")(x)
                x = depth_to_space(x, 2)
        x = nn.swish(x).astype(jnp.float32)
        return depth_to_space(Conv(4 * self.outputs, (3, 3), name="out")(x), 2)
