"""Likelihoods p(x|z) of images, whose parameters are the output of a decoder.

A `Likelihood` contains functions that convert grey values to x (binarised or dequantised pixels),
and the output of a decoder to a loss in nats and to an image.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from ddpm_jax.fields import Positive
from ddpm_jax.variational import vae

# The output of a decoder for one image: (logits or mean, [H, W, C]; log variance of every pixel).
Output = tuple[Float[Array, "..."], Float[Array, ""]]


class Likelihood(NamedTuple):
    """The likelihood p(x|z), where x is a binarised or dequantised image.

    In the list of functions, `out` is the output of the decoder.

    Attributes:
      observe: The function (random key, image with uint8 grey values) -> x.
      nll: The function (out, x) -> -log p(x|z) in nats.
      mean_image: The function out -> mean of p(x|z), as an image with values in [-1, 1].
      to_image: The function x -> image with values in [-1, 1].
      bias: The function (mean of x over the data) -> initial bias of the output of the decoder.
      bits_per_dim: The function (nats, number of dimensions) -> bits per dimension. If None, p(x|z)
        does not bound the probability of the grey values.
    """

    observe: Callable[[Key[Array, ""], UInt8[Array, "h w c"]], Float[Array, "h w c"]]
    nll: Callable[[Output, Float[Array, "h w c"]], Float[Array, ""]]
    mean_image: Callable[[Output], Float[Array, "..."]]
    to_image: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    bias: Callable[[Float[Array, "h w c"]], Float[Array, "h w c"]]
    bits_per_dim: Callable[[Float[Array, "*batch"], int], Float[Array, "*batch"]] | None


def bernoulli(levels: int) -> Likelihood:
    """Return the Bernoulli likelihood of dynamically binarised pixels.

    A pixel of x is 1 with probability grey value / (levels - 1), else 0. Every epoch samples the
    pixels again (Salakhutdinov & Murray 2008; Burda et al. 2016). A pixel uses 16 random bits,
    because sampling one 32-bit word for two pixels is twice as fast.
    """

    def observe(key: Key[Array, ""], image: UInt8[Array, "h w c"]) -> Float[Array, "h w c"]:
        words = jax.random.bits(key, ((image.size + 1) // 2,), jnp.uint32)
        numbers = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[: image.size]
        numbers = numbers.reshape(image.shape).astype(jnp.uint32)
        return (numbers * (levels - 1) < image.astype(jnp.uint32) * 2**16).astype(jnp.float32)

    def bias(mean: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        mean = jnp.clip(mean, 1e-3, 1 - 1e-3)
        return jnp.log(mean) - jnp.log1p(-mean)

    return Likelihood(
        observe=observe,
        nll=lambda out, x: vae.bernoulli_nll(out[0], x),
        mean_image=lambda out: 2 * jax.nn.sigmoid(out[0]) - 1,
        to_image=lambda x: 2 * x - 1,
        bias=bias,
        bits_per_dim=None,  # binarised pixels do not determine the grey values
    )


def gaussian(levels: int, std: float | None) -> Likelihood:
    """Return the Gaussian likelihood of dequantised grey values.

    x is 2 (grey value + u) / levels - 1 in [-1, 1], where u ~ U(0, 1) is sampled for each pixel.

    Args:
      levels: The number of grey values.
      std: The fixed standard deviation of a pixel; -log p is then the squared error / (2 std^2)
        plus a constant. If None, one variance for all pixels is learned; the optimal variance is
        the mean squared error (Rybkin et al. 2021).
    """

    def observe(key: Key[Array, ""], image: UInt8[Array, "h w c"]) -> Float[Array, "h w c"]:
        noisy = image.astype(jnp.float32) + jax.random.uniform(key, image.shape)
        return 2 * noisy / levels - 1

    def nll(out: Output, x: Float[Array, "h w c"]) -> Float[Array, ""]:
        mean, logvar = out
        logvar = logvar if std is None else 2 * jnp.log(jnp.float32(std))
        return vae.gaussian_nll(mean, logvar, x)

    return Likelihood(
        observe=observe,
        nll=nll,
        mean_image=lambda out: jnp.clip(out[0], -1, 1),
        to_image=lambda x: x,
        bias=lambda mean: mean,
        bits_per_dim=lambda nats, dims: vae.density_to_bits_per_dim(nats, dims, levels),
    )


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """The Bernoulli likelihood of pixels that every epoch binarises at random; see `bernoulli`."""

    def make(self, levels: int) -> Likelihood:
        """Return the likelihood of images with `levels` grey values."""
        return bernoulli(levels)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The Gaussian likelihood of grey values to which uniform noise is added; see `gaussian`.

    Attributes:
      std: Standard deviation of a pixel with values in [-1, 1]. If none, one standard deviation of
        all pixels is learned.
    """

    std: Positive | None = None

    def make(self, levels: int) -> Likelihood:
        """Return the likelihood of images with `levels` grey values."""
        return gaussian(levels, self.std)
