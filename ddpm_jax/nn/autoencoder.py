"""The autoencoder of latent diffusion; its latents are images with f times shorter sides.

The architecture follows Rombach et al. 2022, app. E: residual blocks, with the sides halved or
doubled between levels.  The first level moves squares of 2x2 pixels into channels, so that no
convolution runs at the full image size.  Group norm is not used: it removes what is constant across
an image, which is most of the content of an image of uniform areas.  Without any norm, training on
`shapes` diverged at a learning rate of 3e-3; an RMS norm over the channels of each pixel, before
each block, prevents this.
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
    """A residual block x + f(x): f is an RMS norm, then twice swish and a 3x3 convolution."""

    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        """Return x + f(x), which is initially x."""

        def conv(h: Array, name: str, init: Initializer) -> Array:
            layer = Conv(x.shape[-1], (3, 3), kernel_init=init, dtype=self.dtype, name=name)
            return layer(nn.swish(h))

        h = nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name="norm")(x).astype(x.dtype)
        h = conv(h, "conv_1", nn.initializers.lecun_normal())
        return x + conv(h, "conv_2", nn.initializers.zeros)


class Autoencoder(nn.Module):
    """An autoencoder of images x [B, H, W, C], with latents z [B, H / f, W / f, latent_channels].

    Attributes:
      shape: Height, width and channels of an image.
      channels: Channels of each level, starting at the image; each level halves the sides, so
        f = 2^levels.
      latent_channels: Channels of z.
      blocks: Residual blocks of each level, in the encoder and in the decoder.
      dtype: Type of the computation; norms, z and the decoded image stay float32.
    """

    shape: Annotated[tuple[int, int, int], BOUND] = (0, 0, 0)
    channels: tuple[Count, ...] = (32, 64)
    latent_channels: Count = 4
    blocks: Layers = 1
    dtype: Annotated[DTypeLike | None, BOUND] = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The number of rows, columns and channels of z."""
        factor = 2 ** len(self.channels)
        return self.shape[0] // factor, self.shape[1] // factor, self.latent_channels

    def setup(self) -> None:
        """Create the encoder and the decoder."""
        self.encoder = Encoder(self.channels, 2 * self.latent_channels, self.blocks, self.dtype)
        self.decoder = Decoder(self.channels, self.shape[2], self.blocks, self.dtype)

    def encode(
        self, x: Float[Array, "batch h w c"]
    ) -> tuple[Float[Array, "batch rows columns d"], Float[Array, "batch rows columns d"]]:
        """Return (mean, logvar) of q(z|x); the variance is a sigmoid, at most the prior's (1).

        A variance above 1 has a larger KL divergence and carries less information, so the bound
        costs nothing.  Without it, one large encoder output gives an image a variance of
        exp(output), and noise of that size ruins the decoder in one step.
        """
        mean, logit = jnp.split(self.encoder(x), 2, -1)
        return mean, jnp.maximum(nn.log_sigmoid(logit), -20.0)

    def decode(self, z: Float[Array, "batch rows columns d"]) -> Float[Array, "batch h w c"]:
        """Return the images that the latents z decode to."""
        return self.decoder(z)

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        """Return the reconstruction of x from the mean of q(z|x)."""
        return self.decode(self.encode(x)[0])

    def check(self) -> None:
        """Check that the network can be built for images of this size.

        Raises:
          FieldError: If the height or the width is not a multiple of f.
        """
        factor, (height, width, _) = 2 ** len(self.channels), self.shape
        if height % factor or width % factor:
            raise FieldError(
                f"channels={','.join(map(str, self.channels))}: the autoencoder divides the "
                f"sides of images by {factor}, and {height}x{width} does not divide by {factor}; "
                "give fewer channels, or images of another size"
            )


class Encoder(nn.Module):
    """The convolutional encoder; each level halves the sides, the first by `space_to_depth`."""

    channels: tuple[int, ...]
    outputs: int
    blocks: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch rows columns d"]:
        """Return the mean of q(z|x), and the logits of its variance, as channels."""
        x = space_to_depth(x, 2)
        for level, width in enumerate(self.channels):
            strides = 2 if level else 1
            x = Conv(width, (3, 3), strides, dtype=self.dtype, name=f"conv_{level}")(x)
            for index in range(self.blocks):
                x = Residual(self.dtype, name=f"block_{level}_{index}")(x)
        x = nn.swish(x).astype(jnp.float32)
        return Conv(self.outputs, (3, 3), name="out")(x)


class Decoder(nn.Module):
    """The convolutional decoder; each level doubles the sides, by `depth_to_space`.

    A convolution computes four pixels as channels of one (Shi et al. 2016).
    """

    channels: tuple[int, ...]
    outputs: int
    blocks: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, z: Float[Array, "batch rows columns d"]) -> Float[Array, "batch h w c"]:
        """Return the images that the latents z decode to."""
        width = self.channels[-1]
        x = Conv(width, (3, 3), dtype=self.dtype, name="conv_in")(z)
        for level in reversed(range(len(self.channels))):
            for index in range(self.blocks):
                x = Residual(self.dtype, name=f"block_{level}_{index}")(x)
            if level:
                width = self.channels[level - 1]
                x = Conv(4 * width, (3, 3), dtype=self.dtype, name=f"conv_{level}")(x)
                x = depth_to_space(x, 2)
        x = nn.swish(x).astype(jnp.float32)
        return depth_to_space(Conv(4 * self.outputs, (3, 3), name="out")(x), 2)
