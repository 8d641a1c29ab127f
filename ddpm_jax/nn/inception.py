"""The Inception network (Szegedy et al. 2015), on which the metrics FID, KID and IS are based.

It is the TensorFlow graph of 2015-12-05, as ported to PyTorch by pytorch-fid and torch-fidelity:
average pools exclude padding from the mean, and the last block has a max pool.  Convolutions have
the names of the PyTorch ports, such as `Mixed_5b.branch5x5_1`; the batch normalisation after each
convolution is part of the weights of the convolution.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddpm_jax.errors import UserError
from ddpm_jax.nn.layers import Conv

SIDE = 299  # pixels of a side of the resized image
EPSILON = 1e-3  # added to the variances in batch normalisation
PRECISION = jax.lax.Precision.HIGHEST  # products in float32 on every device


class Inception(nn.Module):
    """The Inception network: images [B, H, W, C] -> (features [B, 2048], logits [B, 1008]).

    Pixels are from 0 to 255.  Images are resized to 299x299.  If C = 1, the channel is repeated
    three times.  The logits exclude the bias of the last layer, as in the original code of the
    Inception score.

    Raises:
      UserError: If C is neither 1 nor 3.
    """

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch h w c"]
    ) -> tuple[Float[Array, "batch 2048"], Float[Array, "batch 1008"]]:
        """Return (features, logits)."""
        if images.shape[-1] not in (1, 3):
            raise UserError(f"images of {images.shape[-1]} channels: Inception requires 1 or 3")
        x = (resize(images.astype(jnp.float32)) - 128) / 128
        x = jnp.broadcast_to(x, (*x.shape[:3], 3))
        x = _conv(x, "Conv2d_1a_3x3", 32, (3, 3), "VALID", 2)
        x = _conv(x, "Conv2d_2a_3x3", 32, (3, 3), "VALID")
        x = _conv(x, "Conv2d_2b_3x3", 64, (3, 3))
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = _conv(x, "Conv2d_3b_1x1", 80)
        x = _conv(x, "Conv2d_4a_3x3", 192, (3, 3), "VALID")
        x = nn.max_pool(x, (3, 3), (2, 2))
        for name, pool in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = _block_a(x, f"Mixed_{name}", pool)
        x = _block_b(x, "Mixed_6a")
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = _block_c(x, f"Mixed_{name}", width)
        x = _block_d(x, "Mixed_7a")
        x = _block_e(x, "Mixed_7b", _average_pool(x))
        x = _block_e(x, "Mixed_7c", nn.max_pool(x, (3, 3), (1, 1), "SAME"))
        features = x.mean((1, 2))
        dense = nn.Dense(1008, use_bias=False, precision=PRECISION, name="fc")
        return features, dense(features)


def resize(x: Float[Array, "batch h w c"], side: int = SIDE) -> Float[Array, "batch side side c"]:
    """Return images resized by bilinear interpolation, as TensorFlow 1 with align_corners=False.

    Output pixel i is the input at position i * length / side, interpolated between two pixels.
    There is no offset of half a pixel and no smoothing before downsampling, and the edge pixel is
    repeated beyond the edge.
    """
    for axis in (2, 1):
        length = x.shape[axis]
        position = np.arange(side, dtype=np.float32) * np.float32(length / side)
        low = np.floor(position)
        high = np.minimum(low + 1, length - 1)
        below, above = (jnp.take(x, end.astype(np.int32), axis) for end in (low, high))
        x = below + (above - below) * (position - low).reshape(-1, *(1,) * (3 - axis))
    return x


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Convert the PyTorch weights of torch-fidelity or pytorch-fid to variables of `Inception`.

    The batch normalisation after each convolution is merged into the convolution, in float64:

        kernel = weight gamma / sqrt(variance + 1e-3)
        bias = beta - mean gamma / sqrt(variance + 1e-3)

    Args:
      state: Map from PyTorch names to arrays. Arrays that are not used, such as `fc.bias`, are
        ignored.

    Raises:
      UserError: If an array is missing or has the wrong shape.
    """
    image = jnp.zeros((1, 8, 8, 3), jnp.float32)
    expected = jax.eval_shape(Inception().init, jax.random.key(0), image)

    def read(key: str, *shape: int) -> np.ndarray:
        if key not in state:
            raise UserError(f'not the weights of Inception: the file has no array "{key}"')
        if state[key].shape != shape:
            actual = state[key].shape
            raise UserError(
                f'not the weights of Inception: "{key}" has shape {actual}, not {shape}'
            )
        return np.asarray(state[key], np.float64)

    def convolution(
        name: str, height: int, width: int, inputs: int, outputs: int
    ) -> dict[str, np.ndarray]:
        weight = read(f"{name}.conv.weight", outputs, inputs, height, width)
        gamma, beta, mean, variance = (
            read(f"{name}.bn.{part}", outputs)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / np.sqrt(variance + EPSILON)
        return {"kernel": weight.transpose(2, 3, 1, 0) * scale, "bias": beta - mean * scale}

    params = {
        name: convolution(name, *layer["kernel"].shape)
        for name, layer in expected["params"].items()
        if name != "fc"
    }
    inputs, outputs = expected["params"]["fc"]["kernel"].shape
    params["fc"] = {"kernel": read("fc.weight", outputs, inputs).T}
    return {"params": jax.tree.map(lambda a: np.ascontiguousarray(a, np.float32), params)}


Size = tuple[int, int]


class _Layer(NamedTuple):
    """The arguments of `_conv` after `name`."""

    width: int
    size: Size = (1, 1)
    padding: str = "SAME"
    strides: int = 1


def _conv(
    x: Array, name: str, width: int, size: Size = (1, 1), padding: str = "SAME", strides: int = 1
) -> Array:
    layer = Conv(width, size, strides, padding, precision=PRECISION, name=name)
    return nn.relu(layer(x))


def _sequence(x: Array, name: str, *layers: _Layer) -> Array:
    """Apply convolutions in sequence; convolution i = 1, 2, ... is named f"{name}_{i}"."""
    for index, layer in enumerate(layers, 1):
        x = _conv(x, f"{name}_{index}", *layer)
    return x


def _average_pool(x: Array) -> Array:
    out: Array = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
    return out


def _concatenate(*branches: Array) -> Array:
    return jnp.concatenate(branches, -1)


def _block_a(x: Array, name: str, pool: int) -> Array:
    return _concatenate(
        _conv(x, f"{name}.branch1x1", 64),
        _sequence(x, f"{name}.branch5x5", _Layer(48), _Layer(64, (5, 5))),
        _sequence(x, f"{name}.branch3x3dbl", _Layer(64), _Layer(96, (3, 3)), _Layer(96, (3, 3))),
        _conv(_average_pool(x), f"{name}.branch_pool", pool),
    )


def _block_b(x: Array, name: str) -> Array:
    long = (_Layer(64), _Layer(96, (3, 3)), _Layer(96, (3, 3), "VALID", 2))
    return _concatenate(
        _conv(x, f"{name}.branch3x3", 384, (3, 3), "VALID", 2),
        _sequence(x, f"{name}.branch3x3dbl", *long),
        nn.max_pool(x, (3, 3), (2, 2)),
    )


def _block_c(x: Array, name: str, width: int) -> Array:
    across, down = (1, 7), (7, 1)
    long = (
        _Layer(width, down), _Layer(width, across), _Layer(width, down), _Layer(192, across),
    )  # fmt: skip
    return _concatenate(
        _conv(x, f"{name}.branch1x1", 192),
        _sequence(x, f"{name}.branch7x7", _Layer(width), _Layer(width, across), _Layer(192, down)),
        _sequence(x, f"{name}.branch7x7dbl", _Layer(width), *long),
        _conv(_average_pool(x), f"{name}.branch_pool", 192),
    )


def _block_d(x: Array, name: str) -> Array:
    last = _Layer(192, (3, 3), "VALID", 2)
    return _concatenate(
        _sequence(x, f"{name}.branch3x3", _Layer(192), last._replace(width=320)),
        _sequence(
            x, f"{name}.branch7x7x3", _Layer(192), _Layer(192, (1, 7)), _Layer(192, (7, 1)), last
        ),
        nn.max_pool(x, (3, 3), (2, 2)),
    )


def _block_e(x: Array, name: str, pooled: Array) -> Array:
    def fork(x: Array, name: str) -> Array:
        return _concatenate(_conv(x, f"{name}a", 384, (1, 3)), _conv(x, f"{name}b", 384, (3, 1)))

    short = _sequence(x, f"{name}.branch3x3", _Layer(384))
    long = _sequence(x, f"{name}.branch3x3dbl", _Layer(448), _Layer(384, (3, 3)))
    return _concatenate(
        _conv(x, f"{name}.branch1x1", 320),
        fork(short, f"{name}.branch3x3_2"),
        fork(long, f"{name}.branch3x3dbl_3"),
        _conv(pooled, f"{name}.branch_pool", 192),
    )
