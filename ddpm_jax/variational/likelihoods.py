"""What a decoder's output means: the likelihoods p(x|z) of images.

A `Likelihood` turns grey values into what is modelled, and a decoder's output into nats
and into a picture.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from ddpm_jax.fields import Positive
from ddpm_jax.variational import vae

# A decoder's output of one image, or of a batch: (logits or mean, one logvar for all pixels).
Output = tuple[Float[Array, "..."], Float[Array, ""]]


class Likelihood(NamedTuple):
    """p(x|z) of one image; `out` is a decoder's (array, logvar).

    observe(key, image) -> x, from uint8 grey values in 0 ... levels - 1
    nll(out, x) -> nats
    mean_image(out) -> the mean in [-1, 1]
    show(x) -> x in [-1, 1]
    bias(mean of x) -> what a decoder that knows nothing yet puts out
    bits_per_dim(nats, dims), or None where bits have no meaning
    """

    observe: Callable[[Key[Array, ""], UInt8[Array, "h w c"]], Float[Array, "h w c"]]
    nll: Callable[[Output, Float[Array, "h w c"]], Float[Array, ""]]
    mean_image: Callable[[Output], Float[Array, "..."]]
    show: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    bias: Callable[[Float[Array, "h w c"]], Float[Array, "h w c"]]
    bits_per_dim: Callable[[Float[Array, "*batch"], int], Float[Array, "*batch"]] | None


def bernoulli(levels: int) -> Likelihood:
    """Dynamically binarised pixels: 1 with the probability of the grey value.

    Every epoch sees other bits (Salakhutdinov & Murray 2008; Burda et al. 2016).  Each pixel's
    draw has 16 bits, two to a word, which is twice as fast; black and white are never wrong.
    """

    def observe(key: Key[Array, ""], image: UInt8[Array, "h w c"]) -> Float[Array, "h w c"]:
        words = jax.random.bits(key, ((image.size + 1) // 2,), jnp.uint32)
        draws = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[: image.size]
        draws = draws.reshape(image.shape).astype(jnp.uint32)
        return (draws * (levels - 1) < image.astype(jnp.uint32) * 2**16).astype(jnp.float32)

    def bias(mean: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        mean = jnp.clip(mean, 1e-3, 1 - 1e-3)
        return jnp.log(mean) - jnp.log1p(-mean)

    return Likelihood(
        observe=observe,
        nll=lambda out, x: vae.bernoulli_nll(out[0], x),
        mean_image=lambda out: 2 * jax.nn.sigmoid(out[0]) - 1,
        show=lambda x: 2 * x - 1,
        bias=bias,
        bits_per_dim=None,  # the bits are drawn, so nothing about the grey values is bounded
    )


def gaussian(levels: int, std: float | None) -> Likelihood:
    """Grey values on [-1, 1], dequantised by uniform noise of a bin's width.

    Args:
      std: the fixed standard deviation (the squared error, over 2 std^2); None: one variance
        for all pixels is learned, which becomes the mean squared error itself (Rybkin et
        al. 2021).
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
        show=lambda x: x,
        bias=lambda mean: mean,
        bits_per_dim=lambda nats, dims: vae.density_to_bits_per_dim(nats, dims, levels),
    )


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Dynamically binarised pixels; see `bernoulli`."""

    def make(self, levels: int) -> Likelihood:
        """Return the likelihood of images of so many grey levels."""
        return bernoulli(levels)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Dequantised grey values; see `gaussian`.

    Attributes:
      std: Standard deviation of a pixel, of values in [-1, 1]; none: one is learned.
    """

    std: Positive | None = None

    def make(self, levels: int) -> Likelihood:
        """Return the likelihood of images of so many grey levels."""
        return gaussian(levels, self.std)
