"""The networks of the VAE: the encoder of q(z|x) and the decoder of p(x|z)."""

import math
from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from ddpm_jax.fields import BOUND, Count, FieldError
from ddpm_jax.nn.layers import Conv


class MLP(nn.Module):
    """A multilayer perceptron with GELU activations: [B, *event] -> [B, outputs]."""

    hidden: tuple[int, ...]
    outputs: int
    bias_init: Initializer = nn.initializers.zeros
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch *event"]) -> Float[Array, "batch outputs"]:
        """Return the output of the last layer, which is linear."""
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.gelu(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(self.outputs, bias_init=self.bias_init, name="out")(x)


class ConvEncoder(nn.Module):
    """A convolutional encoder: [B, H, W, C] -> [B, outputs]; each convolution halves the sides."""

    channels: tuple[int, ...]
    outputs: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch outputs"]:
        """Return the output of the last layer, which is linear."""
        for width in self.channels:
            x = nn.gelu(Conv(width, (3, 3), strides=2, dtype=self.dtype)(x))
        return nn.Dense(self.outputs, name="out")(x.reshape(x.shape[0], -1))


class ConvDecoder(nn.Module):
    """A convolutional decoder: [B, Z] -> [B, H, W, C]; each convolution doubles the sides.

    A convolution computes each square of 2x2 pixels as the channels of one pixel of the smaller
    image; `_double` then moves the channels to their positions (Shi et al. 2016).
    """

    channels: tuple[int, ...]
    shape: tuple[int, int, int]
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, z: Float[Array, "batch latent"]) -> Float[Array, "batch h w c"]:
        """Return the logits (Bernoulli) or the means (Gaussian) of all pixels under p(x|z)."""
        scale = 2 ** len(self.channels)
        height, width = self.shape[0] // scale, self.shape[1] // scale
        x = nn.gelu(nn.Dense(height * width * self.channels[-1], dtype=self.dtype)(z))
        x = x.reshape(z.shape[0], height, width, self.channels[-1])
        for features in (*self.channels[-2::-1], -(-self.channels[0] // 2)):
            x = nn.gelu(_double(Conv(4 * features, (3, 3), dtype=self.dtype)(x)))
        bias = self.param("bias", nn.initializers.zeros, self.shape)
        return Conv(self.shape[2], (3, 3), use_bias=False, name="out")(x) + bias


def _double(x: Float[Array, "batch h w four_c"]) -> Float[Array, "batch two_h two_w c"]:
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4)
    return x.swapaxes(2, 3).reshape(batch, 2 * height, 2 * width, channels // 4)


class VAENetwork(nn.Module):
    """An encoder of q(z|x), a decoder of p(x|z), and a scalar log variance for a Gaussian p(x|z).

    Attributes:
      shape: Height, width and number of channels of an image.
      latents: Dimension of z.
      hidden: Widths of the hidden layers of the encoder; the decoder has the reverse order. If
        `conv`, numbers of channels of the convolutions, each of which halves the sides.
      conv: Use convolutional networks instead of MLPs.
      dtype: Data type of the computation in the hidden layers. If None, the type of the images.
    """

    shape: Annotated[tuple[int, int, int], BOUND] = (0, 0, 0)
    latents: Count = 40
    hidden: tuple[Count, ...] = (500, 500)
    conv: bool = False
    dtype: Annotated[DTypeLike | None, BOUND] = None

    def setup(self) -> None:
        """Create the encoder, the decoder and the log variance."""
        pixels = math.prod(self.shape)
        self.encoder: nn.Module = (
            ConvEncoder(self.hidden, 2 * self.latents, self.dtype)
            if self.conv
            else MLP(self.hidden, 2 * self.latents, dtype=self.dtype)
        )
        self.decoder: nn.Module = (
            ConvDecoder(self.hidden, self.shape, self.dtype)
            if self.conv
            else MLP(self.hidden[::-1], pixels, dtype=self.dtype)
        )
        self.logvar = self.param("logvar", nn.initializers.zeros, ())

    def encode(
        self, x: Float[Array, "batch h w c"]
    ) -> tuple[Float[Array, "batch latent"], Float[Array, "batch latent"]]:
        """Return (mean, logvar) of the Gaussian q(z|x), each [B, Z]."""
        mean, logvar = jnp.split(self.encoder(x), 2, axis=-1)
        return mean, logvar

    def decode(
        self, z: Float[Array, "batch latent"]
    ) -> tuple[Float[Array, "batch h w c"], Float[Array, ""]]:
        """Return (logits or means, logvar) of p(x|z); only a Gaussian p(x|z) uses `logvar`."""
        return self.decoder(z).reshape(z.shape[0], *self.shape), self.logvar

    def __call__(
        self, x: Float[Array, "batch h w c"]
    ) -> tuple[Float[Array, "batch h w c"], Float[Array, ""]]:
        """Return the result of `decode` where z is the mean of q(z|x)."""
        return self.decode(self.encode(x)[0])


def check_shape(net: VAENetwork) -> None:
    """Check that the networks can be built for images of `net.shape`.

    Raises:
      FieldError: If the networks are convolutional, and a side is not divisible by 2^layers.
    """
    height, width, _ = net.shape
    scale = 2 ** len(net.hidden)
    if net.conv and (height % scale or width % scale):
        raise FieldError(
            f"hidden={','.join(map(str, net.hidden))}: the convolutional VAE halves images "
            f"{len(net.hidden)} times, and {height}x{width} is not divisible by {scale}; give "
            "fewer hidden layers, or images of another size",
            "conv",
        )


def with_data_moments(
    params: PyTree, bias: Float[Array, "h w c"], logvar: Float[Array, ""]
) -> PyTree:
    """Return `params`, changed so that p(x|z) initially has the mean and variance of the data.

    Args:
      params: Parameters of a `VAENetwork`.
      bias: New bias of the last layer of the decoder: the logits or means of the mean image.
      logvar: Log of the variance around the mean image, averaged over pixels.
    """
    decoder = dict(params["params"]["decoder"])
    if "bias" in decoder:
        decoder["bias"] = bias
    else:
        decoder["out"] = {**decoder["out"], "bias": bias.reshape(-1)}
    return {"params": {**params["params"], "decoder": decoder, "logvar": logvar}}
