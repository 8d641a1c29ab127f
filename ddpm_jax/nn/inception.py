"""The Inception network of 2015, whose features FID, KID and IS use (Szegedy et al. 2015).

The TensorFlow graph of 2015-12-05 as pytorch-fid and torch-fidelity carry it over: average
pools that leave padding out of the mean, and a max-pool in the last block.  Convolutions are
called as theirs, `Mixed_5b.branch5x5_1`, and hold their batch normalisation folded in.
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

SIDE = 299
EPSILON = 1e-3  # of the batch normalisation
PRECISION = jax.lax.Precision.HIGHEST  # float32 on every device


class Inception(nn.Module):
    """Images [B, H, W, C] in 0 ... 255 -> (features [B, 2048], logits [B, 1008]).

    Any H and W, resized; C is 3, or 1 and repeated.  The logits are without the last layer's
    bias, as the original Inception score has them.

    Raises:
      UserError: C is neither.
    """

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch h w c"]
    ) -> tuple[Float[Array, "batch 2048"], Float[Array, "batch 1008"]]:
        if images.shape[-1] not in (1, 3):
            raise UserError(f"Inception sees images of 1 or 3 channels, not {images.shape[-1]}")
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
        x = _block_e(x, "Mixed_7b", _average(x))
        x = _block_e(x, "Mixed_7c", nn.max_pool(x, (3, 3), (1, 1), "SAME"))
        features = x.mean((1, 2))
        dense = nn.Dense(1008, use_bias=False, precision=PRECISION, name="fc")
        return features, dense(features)


def resize(x: Float[Array, "batch h w c"], side: int = SIDE) -> Float[Array, "batch side side c"]:
    """Resize bilinearly, as TensorFlow 1 with align_corners=False: pixel i is at i * length / side.

    No half pixels, no smoothing, and the last pixel goes on beyond the edge.
    """
    for axis in (2, 1):
        length = x.shape[axis]
        place = np.arange(side, dtype=np.float32) * np.float32(length / side)
        low = np.floor(place)
        high = np.minimum(low + 1, length - 1)
        below, above = (jnp.take(x, end.astype(np.int32), axis) for end in (low, high))
        x = below + (above - below) * (place - low).reshape(-1, *(1,) * (3 - axis))
    return x


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Return the variables of `Inception`, from the state dict of torch-fidelity or pytorch-fid.

    kernel = weight gamma / sqrt(variance + 1e-3), bias = beta - mean gamma / sqrt(...); float64
    until the end.  Keys that are not needed, as `fc.bias` is not, are not looked at.

    Raises:
      UserError: a key is missing, or an array has another shape.
    """
    image = jnp.zeros((1, 8, 8, 3), jnp.float32)
    expected = jax.eval_shape(Inception().init, jax.random.key(0), image)

    def read(key: str, *shape: int) -> np.ndarray:
        if key not in state:
            raise UserError(f'these are not weights of Inception: there is no "{key}"')
        if state[key].shape != shape:
            actual = state[key].shape
            raise UserError(f'these are not weights of Inception: "{key}" is {actual}, not {shape}')
        return np.asarray(state[key], np.float64)

    def convolution(
        name: str, high: int, wide: int, inputs: int, outputs: int
    ) -> dict[str, np.ndarray]:
        weight = read(f"{name}.conv.weight", outputs, inputs, high, wide)
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
    """A convolution's settings, the arguments of `_conv`."""

    width: int
    size: Size = (1, 1)
    padding: str = "SAME"
    strides: int = 1


def _conv(
    x: Array, name: str, width: int, size: Size = (1, 1), padding: str = "SAME", strides: int = 1
) -> Array:
    layer = Conv(width, size, strides, padding, precision=PRECISION, name=name)
    return nn.relu(layer(x))


def _row(x: Array, name: str, *layers: _Layer) -> Array:
    """Apply convolutions one after the other, numbered from 1."""
    for number, layer in enumerate(layers, 1):
        x = _conv(x, f"{name}_{number}", *layer)
    return x


def _average(x: Array) -> Array:
    out: Array = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
    return out


def _joined(*branches: Array) -> Array:
    return jnp.concatenate(branches, -1)


def _block_a(x: Array, name: str, pool: int) -> Array:
    return _joined(
        _conv(x, f"{name}.branch1x1", 64),
        _row(x, f"{name}.branch5x5", _Layer(48), _Layer(64, (5, 5))),
        _row(x, f"{name}.branch3x3dbl", _Layer(64), _Layer(96, (3, 3)), _Layer(96, (3, 3))),
        _conv(_average(x), f"{name}.branch_pool", pool),
    )


def _block_b(x: Array, name: str) -> Array:
    long = (_Layer(64), _Layer(96, (3, 3)), _Layer(96, (3, 3), "VALID", 2))
    return _joined(
        _conv(x, f"{name}.branch3x3", 384, (3, 3), "VALID", 2),
        _row(x, f"{name}.branch3x3dbl", *long),
        nn.max_pool(x, (3, 3), (2, 2)),
    )


def _block_c(x: Array, name: str, width: int) -> Array:
    across, down = (1, 7), (7, 1)
    long = (
        _Layer(width, down), _Layer(width, across), _Layer(width, down), _Layer(192, across),
    )  # fmt: skip
    return _joined(
        _conv(x, f"{name}.branch1x1", 192),
        _row(x, f"{name}.branch7x7", _Layer(width), _Layer(width, across), _Layer(192, down)),
        _row(x, f"{name}.branch7x7dbl", _Layer(width), *long),
        _conv(_average(x), f"{name}.branch_pool", 192),
    )


def _block_d(x: Array, name: str) -> Array:
    last = _Layer(192, (3, 3), "VALID", 2)
    return _joined(
        _row(x, f"{name}.branch3x3", _Layer(192), last._replace(width=320)),
        _row(x, f"{name}.branch7x7x3", _Layer(192), _Layer(192, (1, 7)), _Layer(192, (7, 1)), last),
        nn.max_pool(x, (3, 3), (2, 2)),
    )


def _block_e(x: Array, name: str, pooled: Array) -> Array:
    def forked(x: Array, name: str) -> Array:
        return _joined(_conv(x, f"{name}a", 384, (1, 3)), _conv(x, f"{name}b", 384, (3, 1)))

    short = _row(x, f"{name}.branch3x3", _Layer(384))
    long = _row(x, f"{name}.branch3x3dbl", _Layer(448), _Layer(384, (3, 3)))
    return _joined(
        _conv(x, f"{name}.branch1x1", 320),
        forked(short, f"{name}.branch3x3_2"),
        forked(long, f"{name}.branch3x3dbl_3"),
        _conv(pooled, f"{name}.branch_pool", 192),
    )
