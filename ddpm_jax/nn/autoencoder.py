"""The autoencoder of latent diffusion.  It divides the sides of images by f = 2^levels.

The architecture follows Rombach et al. 2022, app. E: residual blocks at each level, and sides that
are halved or doubled between levels.  The first level moves squares of 2x2 pixels into channels, so
that no convolution runs at the full image size.  Group norm is not used, because it removes values
that are constant across an image, and images of uniform areas consist mostly of such values.
Without any norm, training on the data set `shapes` diverged at a learning rate of 3e-3.  An RMS
norm over the channels of each pixel, before each block, prevents this.
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
    """A residual block x + f(x), where f is norm, swish, convolution, swish, convolution."""

    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        """Return x + f(x), of the shape of x; with the initial parameters, f(x) = 0."""

        def conv(h: Array, name: str, init: Initializer) -> Array:
            layer = Conv(x.shape[-1], (3, 3), kernel_init=init, dtype=self.dtype, name=name)
            return layer(nn.swish(h))

        h = nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name="norm")(x).astype(x.dtype)
        h = conv(h, "conv_1", nn.initializers.lecun_normal())
        return x + conv(h, "conv_2", nn.initializers.zeros)


class Autoencoder(nn.Module):
    """An autoencoder of images x [B, H, W, C] with latents z [B, H / f, W / f, latent_channels].

    Attributes:
      shape: Height, width and number of channels of an image.
      channels: Number of channels at each level, starting with the level next to the image. Each
        level halves the sides, so f = 2^levels.
      latent_channels: Number of channels of z.
      blocks: Number of residual blocks at each level of the encoder and of the decoder.
      dtype: Data type of the computation, except norms, z and the decoded image, which are float32.
        If None, everything is computed in the type of the images.
    """

    shape: Annotated[tuple[int, int, int], BOUND] = (0, 0, 0)
    channels: tuple[Count, ...] = (32, 64)
    latent_channels: Count = 4
    blocks: Layers = 1
    dtype: Annotated[DTypeLike | None, BOUND] = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape of z for one image: rows, columns, channels."""
        factor = 2 ** len(self.channels)
        return self.shape[0] // factor, self.shape[1] // factor, self.latent_channels

    def setup(self) -> None:
        """Create the encoder and the decoder."""
        self.encoder = Encoder(self.channels, 2 * self.latent_channels, self.blocks, self.dtype)
        self.decoder = Decoder(self.channels, self.shape[2], self.blocks, self.dtype)

    def encode(
        self, x: Float[Array, "batch h w c"]
    ) -> tuple[Float[Array, "batch rows columns d"], Float[Array, "batch rows columns d"]]:
        """Return (mean, logvar) of q(z|x), where the variance is a sigmoid, which is at most 1.

        The prior has variance 1; a larger variance of q(z|x) increases the KL divergence and
        carries less information, so the limit has no cost.  Without a limit, the variance is
        exp(output of the encoder); one large output then adds so much noise to z that a single
        training step ruins the decoder.
        """
        mean, logit = jnp.split(self.encoder(x), 2, -1)
        return mean, jnp.maximum(nn.log_sigmoid(logit), -20.0)

    def decode(self, z: Float[Array, "batch rows columns d"]) -> Float[Array, "batch h w c"]:
        """Return the images that are decoded from the latents z."""
        return self.decoder(z)

    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        """Return the images that are decoded from the mean of q(z|x)."""
        return self.decode(self.encode(x)[0])

    def check(self) -> None:
        """Check that the network can be built for images of the size in its field `shape`.

        Raises:
          FieldError: If the height or the width is not a multiple of f, the downsampling factor.
        """
        factor, (height, width, _) = 2 ** len(self.channels), self.shape
        if height % factor or width % factor:
            raise FieldError(
                f"channels={','.join(map(str, self.channels))}: the autoencoder divides the sides "
                f"of images by {factor}, and {height}x{width} is not divisible by {factor}; give "
                "a shorter list, or use images of another size"
            )


class Encoder(nn.Module):
    """The encoder; level 0 halves the sides by `space_to_depth`, other levels by stride 2."""

    channels: tuple[int, ...]
    outputs: int
    blocks: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch rows columns d"]:
        """Return the mean of q(z|x) and the logits of the variance, concatenated as channels."""
        x = space_to_depth(x, 2)
        for level, width in enumerate(self.channels):
            strides = 2 if level else 1
            x = Conv(width, (3, 3), strides, dtype=self.dtype, name=f"conv_{level}")(x)
            for index in range(self.blocks):
                x = Residual(self.dtype, name=f"block_{level}_{index}")(x)
        x = nn.swish(x).astype(jnp.float32)
        return Conv(self.outputs, (3, 3), name="out")(x)


class Decoder(nn.Module):
    """The convolutional decoder; each level doubles the sides by `depth_to_space`.

    A convolution computes each square of 2x2 pixels as the channels of one pixel, and
    `depth_to_space` moves them to their positions (Shi et al. 2016).
    """

    channels: tuple[int, ...]
    outputs: int
    blocks: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, z: Float[Array, "batch rows columns d"]) -> Float[Array, "batch h w c"]:
        """Return the images that are decoded from the latents z."""
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
