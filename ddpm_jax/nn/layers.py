"""Layers that Flax lacks or implements differently, such as convolution, dropout and attention."""

import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key


class Context(NamedTuple):
    """Text features of captions, on which a network is conditioned.

    Attributes:
      tokens: Features of each token.
      mask: True for tokens that are text, False for padding.
      pooled: One feature vector for each caption, such as the mean over the tokens.
    """

    tokens: Float[Array, "batch length width"]
    mask: Bool[Array, "batch length"]
    pooled: Float[Array, "batch width"]


def convolution(
    x: Float[Array, "batch *in_sides inputs"],
    kernel: Float[Array, "*window fan outputs"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: jax.lax.ConvDimensionNumbers | None = None,
    feature_group_count: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "batch *out_sides outputs"]:
    """Convolve as `jax.lax.conv_general_dilated`, with gradients that are fast in loops on CPUs.

    XLA's fast convolutions on CPUs require arrays ordered as (batch, space, channels).  Outside of
    loops, XLA reorders arrays (its pass ConvCanonicalization); within loops it does not, and the
    gradients that jax derives are 20 to 50 times slower.  So on CPUs both gradients are computed by
    convolutions of arrays in the fast order, with the same values:

        dL/dx = conv(dL/dy, kernel), with the kernel reversed in space and its channels exchanged
        dL/dkernel = conv(x, dL/dy), with the batch as the channels that are summed over

    Reverse-mode derivatives of any order are supported; forward-mode derivatives are not.

    Args:
      x: Input, batch first and channels last.
      kernel: Weights, with fan = inputs / feature_group_count.
      strides: Stride of the window in each spatial dimension.
      padding: "SAME", "VALID", or (low, high) for each spatial dimension.
      lhs_dilation: Dilation of the input in each spatial dimension. If None, 1.
      rhs_dilation: Dilation of the kernel in each spatial dimension. If None, 1.
      dimension_numbers: Order of the dimensions, as Flax passes it: batch first, channels last.
      feature_group_count: Number of groups of channels. If it is not 1, jax derives the gradients.
      precision: Precision of the products.

    Returns:
      The output, batch first and channels last.
    """
    ones = (1,) * (x.ndim - 2)
    input_dilation, kernel_dilation = tuple(lhs_dilation or ones), tuple(rhs_dilation or ones)
    numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
    if isinstance(padding, str):
        kernel_sides = _dilated(kernel.shape[:-2], kernel_dilation)
        padding = jax.lax.padtype_to_pads(
            _dilated(x.shape[1:-1], input_dilation), kernel_sides, strides, padding
        )
    pads = tuple((int(low), int(high)) for low, high in padding)
    window = _Window(tuple(strides), pads, input_dilation, kernel_dilation, numbers, precision)
    if feature_group_count != 1:
        return _convolved(x, kernel, window, feature_group_count)
    return _convolution(window, x, kernel)


def _dilated(sizes: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [(size - 1) * step + 1 for size, step in zip(sizes, dilation, strict=True)]


class _Window(NamedTuple):
    """The arguments of `convolution` that are not arrays."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    numbers: jax.lax.ConvDimensionNumbers
    precision: jax.lax.PrecisionLike


def _convolved(x: Array, kernel: Array, window: _Window, groups: int = 1) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, *window[:5], groups, precision=window.precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolution(window: _Window, x: Array, kernel: Array) -> Array:
    return _convolved(x, kernel, window)


def _convolution_forward(
    window: _Window, x: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _convolved(x, kernel, window), (x, kernel)


def _convolution_backward(
    window: _Window, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    def native(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        (dx,) = jax.linear_transpose(lambda x: _convolved(x, kernel, window), x)(dy)
        (dkernel,) = jax.linear_transpose(lambda k: _convolved(x, k, window), kernel)(dy)
        return dx, dkernel

    def ordered(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        """Return (dL/dx, dL/dkernel), by convolutions in the order (batch, space, channels)."""
        x_sides = _dilated(x.shape[1:-1], window.lhs_dilation)
        kernel_sides = _dilated(kernel.shape[:-2], window.rhs_dilation)
        dy_sides = _dilated(dy.shape[1:-1], window.strides)
        low = [pad[0] for pad in window.pads]
        sides = list(zip(x_sides, kernel_sides, dy_sides, low, strict=True))
        dx_window = window._replace(
            strides=window.lhs_dilation,
            lhs_dilation=window.strides,
            pads=tuple((k - 1 - p, n + p - o) for n, k, o, p in sides),
        )
        dkernel_window = window._replace(
            strides=window.rhs_dilation,
            rhs_dilation=window.strides,
            pads=tuple((p, k + o - 1 - n - p) for n, k, o, p in sides),
        )
        reverse = jax.lax.rev(kernel, tuple(range(kernel.ndim - 2))).swapaxes(-1, -2)
        dkernel = _convolved(x.swapaxes(0, -1), jnp.moveaxis(dy, 0, -2), dkernel_window)
        return _convolved(dy, reverse, dx_window), jnp.moveaxis(dkernel, 0, -2)

    dx, dkernel = jax.lax.platform_dependent(*residuals, dy, cpu=ordered, default=native)
    return dx, dkernel


_convolution.defvjp(_convolution_forward, _convolution_backward)

Conv = functools.partial(nn.Conv, conv_general_dilated=convolution)


class Dropout(nn.Module):
    """Dropout with a key for each example.  The mask of an example is the same in any batch.

    The path of the layer in the network is folded into the keys, so that the masks of two layers
    are independent.  Without keys (outside training), the layer is the identity.

    Attributes:
      rate: Probability that a unit is set to 0.
    """

    rate: float

    def __call__(
        self,
        x: Float[Array, "batch *event"],
        keys: Key[Array, "batch"] | None,
        number: Int[Array, ""] | int = 0,
    ) -> Float[Array, "batch *event"]:
        """Return x with random units set to 0 and the others divided by (1 - rate).

        Args:
          x: Activations.
          keys: One key for each example. If None, dropout is off.
          number: Index of the call, if a layer is called several times, such as in a scan.
        """
        if keys is None or self.rate == 0.0:
            return x
        path = zlib.crc32("/".join(self.path).encode())

        def drop(key: Key[Array, ""], x: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(key, path), number)
            keep = jax.random.bernoulli(key, 1 - self.rate, x.shape)
            return jnp.where(keep, x / (1 - self.rate), 0)

        dropped: Array = jax.vmap(drop)(keys, x)
        return dropped


def time_embedding(time: Float[Array, "batch"], width: int) -> Float[Array, "batch width"]:
    """Return the sinusoidal embeddings of times t in [0, 1], as in the code of Ho et al. 2020.

    An embedding is the concatenation of sin(1000 t f_k) and cos(1000 t f_k) for n = width / 2
    frequencies f_k = 10,000^(-k / (n - 1)).  1000 t is the step of a noise schedule with T = 1000.
    """
    half = width // 2
    rates = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / max(half - 1, 1))
    angles = 1000.0 * time.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def grid_embedding(height: int, width: int, channels: int) -> Float[Array, "height width channels"]:
    """Return 2-D position embeddings; half of the channels embed the row, half the column."""
    half = channels // 2
    rows, columns = (time_embedding(jnp.arange(side) / 1000, half) for side in (height, width))
    both = (rows[:, None], columns[None])
    return jnp.concatenate([jnp.broadcast_to(a, (height, width, half)) for a in both], -1)


def condition(
    time: Float[Array, "batch"],
    labels: Int[Array, "batch"] | None,
    classes: int,
    sines: int,
    width: int,
    kernel_init: Initializer,
    label_std: float,
    pooled: Float[Array, "batch d"] | None = None,
) -> Float[Array, "batch width"]:
    """Return swish(time embedding + label embedding + caption embedding) of each image.

    Call this function in a compact method of a Flax module; it creates the submodules time_1,
    time_2, label and pooled of that module.

    Args:
      time: Times in [0, 1], where 1 is pure noise.
      labels: Class labels, or `classes` for the null label. Unused if `classes` is 0.
      classes: Number of classes. If 0, there is no label embedding.
      sines: Width of the sinusoidal time embedding.
      width: Width of the result.
      kernel_init: Initializer of the weights of the dense layers.
      label_std: Standard deviation of the initial label embeddings.
      pooled: One feature vector for each caption. If None, there is no caption embedding.

    Raises:
      ValueError: If `classes` is not 0 and `labels` is None.
    """
    emb = nn.Dense(width, kernel_init=kernel_init, name="time_1")(time_embedding(time, sines))
    emb = nn.Dense(width, kernel_init=kernel_init, name="time_2")(nn.swish(emb))
    if classes:
        if labels is None:
            raise ValueError("labels=None: a class-conditional network requires labels")
        normal = nn.initializers.normal(label_std)
        emb += nn.Embed(classes + 1, width, embedding_init=normal, name="label")(labels)
    if pooled is not None:
        emb += nn.Dense(width, kernel_init=kernel_init, name="pooled")(pooled)
    return nn.swish(emb)


def attention(
    query: Float[Array, "batch q heads d"],
    key: Float[Array, "batch k heads d"],
    value: Float[Array, "batch k heads d"],
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "batch q heads d"]:
    """Return softmax(q k^T / sqrt(d)) v for each head (Vaswani et al. 2017, eq. 1).

    Logits, softmax and sums are computed in float32, also if the inputs have lower precision.

    Args:
      query: The queries q.
      key: The keys k.
      value: The values v, one for each key.
      mask: True where a query attends to a key, broadcast to [batch, heads, q, k]; each query
        must attend to at least one key. If None, every query attends to all keys.
    """
    scale = query.shape[-1] ** -0.5
    float32 = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=float32) * scale
    if mask is not None:
        logits = jnp.where(mask, logits, -1e30)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value.astype(float32))
    return out.astype(value.dtype)


class CrossAttention(nn.Module):
    """Attention from x [B, L, width] to the tokens of captions and to a learned null token.

    The null token makes attention to an empty caption possible.  The output is initially 0.

    Attributes:
      heads: Number of attention heads.
      dtype: Data type of the computation. If None, the type of the inputs.
    """

    heads: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], context: Context
    ) -> Float[Array, "batch length width"]:
        """Return the output of the attention, of the shape of x."""
        size, _, width = x.shape
        tokens = context.tokens
        normal = nn.initializers.normal(0.02)
        null = self.param("null", normal, (tokens.shape[-1],)).astype(tokens.dtype)
        tokens = jnp.concatenate([tokens, jnp.broadcast_to(null, (size, 1, len(null)))], 1)
        mask = jnp.pad(context.mask, ((0, 0), (0, 1)), constant_values=True)

        def heads(a: Array, name: str) -> Array:
            projected = nn.Dense(width, dtype=self.dtype, name=name)(a)
            return projected.reshape(size, a.shape[1], self.heads, width // self.heads)

        attended = attention(
            heads(x, "query"), heads(tokens, "key"), heads(tokens, "value"), mask[:, None, None]
        )
        zeros = nn.initializers.zeros
        out = nn.Dense(width, kernel_init=zeros, dtype=self.dtype, name="out")
        return out(attended.reshape(x.shape))


def group_norm(x: Float[Array, "batch h w c"], name: str) -> Float[Array, "batch h w c"]:
    """Apply group norm with at most 32 groups of at least 4 channels, with float32 statistics."""
    groups = min(32, x.shape[-1] // 4)
    while x.shape[-1] % groups:
        groups -= 1
    out: Array = nn.GroupNorm(groups, epsilon=1e-6, dtype=jnp.float32, name=name)(x)
    return out.astype(x.dtype)


def layer_norm(x: Float[Array, "batch tokens d"]) -> Float[Array, "batch tokens d"]:
    """Return the layer norm of x without scale and bias, in float32."""
    norm = nn.LayerNorm(use_bias=False, use_scale=False, epsilon=1e-6)
    out: Array = norm(x.astype(jnp.float32))
    return out


def space_to_depth(
    x: Float[Array, "batch h w c"], side: int
) -> Float[Array, "batch rows columns d"]:
    """Move each square of side x side pixels to channels; this divides the sides by `side`."""
    size, height, width, channels = x.shape
    x = x.reshape(size, height // side, side, width // side, side, channels).swapaxes(2, 3)
    return x.reshape(size, height // side, width // side, side * side * channels)


def depth_to_space(
    x: Float[Array, "batch rows columns d"], side: int
) -> Float[Array, "batch h w c"]:
    """Move the channels of each pixel to side x side pixels; the inverse of `space_to_depth`."""
    size, rows, columns, features = x.shape
    x = x.reshape(size, rows, columns, side, side, features // side**2).swapaxes(2, 3)
    return x.reshape(size, rows * side, columns * side, features // side**2)


def inner_dtype(precision: str) -> str | None:
    """Return the `dtype` field of a network: None if `precision` is "float32", or `precision`."""
    return None if precision == "float32" else precision
