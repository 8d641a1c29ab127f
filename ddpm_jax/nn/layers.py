"""Layers that Flax lacks or does otherwise: convolution, dropout, time embedding, attention."""

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
    """A caption's features, to condition on: of its tokens, which of them are text, and pooled."""

    tokens: Float[Array, "batch length width"]
    mask: Bool[Array, "batch length"]
    pooled: Float[Array, "batch width"]


def convolution(
    x: Float[Array, "batch *places inputs"],
    kernel: Float[Array, "*window fan outputs"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: jax.lax.ConvDimensionNumbers | None = None,
    feature_group_count: int = 1,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "batch *sides outputs"]:
    """Convolve channels-last arrays, with fast gradients in CPU loops (`conv_general_dilated`).

    XLA for CPUs puts the dimensions of a convolution into the order that its fast kernels need
    (its pass ConvCanonicalization), but only outside of loops; within a loop it computes the
    gradients that jax derives 20 to 50 times slower.  So on CPUs both gradients are convolutions
    whose dimensions have that order already; the values are the same:

        dL/dx = conv(dL/dy, the kernel reversed in space, its channels exchanged)
        dL/dkernel = conv(x, dL/dy), the batch being the channels that are summed over

    It has reverse-mode derivatives of any order, and no forward mode.

    Args:
      x: the input.
      kernel: the weights; fan = inputs / feature_group_count.
      strides: of the window, a number for each dimension in space.
      padding: "SAME", "VALID" or (low, high) for each dimension in space.
      lhs_dilation, rhs_dilation: of the input and of the kernel.
      dimension_numbers: as flax states them: batch first, channels last.
      feature_group_count: groups of channels; with more than one, the gradients are jax's own.
      precision: of the products.

    Returns:
      The output.
    """
    ones = (1,) * (x.ndim - 2)
    at, across = tuple(lhs_dilation or ones), tuple(rhs_dilation or ones)
    numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
    if isinstance(padding, str):
        wide = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:-2], across, strict=True)]
        sides = [(n - 1) * d + 1 for n, d in zip(x.shape[1:-1], at, strict=True)]
        padding = jax.lax.padtype_to_pads(sides, wide, strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    window = _Window(tuple(strides), pads, at, across, numbers, precision)
    if feature_group_count != 1:
        return _convolved(x, kernel, window, feature_group_count)
    return _convolution(window, x, kernel)


class _Window(NamedTuple):
    """How a convolution's window moves: the arguments of `convolution` other than arrays."""

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
    window: _Window, kept: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    def native(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        (dx,) = jax.linear_transpose(lambda x: _convolved(x, kernel, window), x)(dy)
        (dkernel,) = jax.linear_transpose(lambda k: _convolved(x, k, window), kernel)(dy)
        return dx, dkernel

    def ordered(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        """Return both gradients as convolutions of batch, space and channels in that order."""
        low = [pad[0] for pad in window.pads]
        sizes = (x.shape[1:-1], kernel.shape[:-2], dy.shape[1:-1])
        dilations = (window.lhs_dilation, window.rhs_dilation, window.strides)
        sides, wide, out = (
            [(n - 1) * d + 1 for n, d in zip(size, dilation, strict=True)]
            for size, dilation in zip(sizes, dilations, strict=True)
        )
        of_input = window._replace(
            strides=window.lhs_dilation,
            lhs_dilation=window.strides,
            pads=tuple(
                (k - 1 - p, n + p - o) for n, k, o, p in zip(sides, wide, out, low, strict=True)
            ),
        )
        of_kernel = window._replace(
            strides=window.rhs_dilation,
            rhs_dilation=window.strides,
            pads=tuple(
                (p, k + o - 1 - n - p) for n, k, o, p in zip(sides, wide, out, low, strict=True)
            ),
        )
        reverse = jax.lax.rev(kernel, tuple(range(kernel.ndim - 2))).swapaxes(-1, -2)
        dkernel = _convolved(x.swapaxes(0, -1), jnp.moveaxis(dy, 0, -2), of_kernel)
        return _convolved(dy, reverse, of_input), jnp.moveaxis(dkernel, 0, -2)

    dx, dkernel = jax.lax.platform_dependent(*kept, dy, cpu=ordered, default=native)
    return dx, dkernel


_convolution.defvjp(_convolution_forward, _convolution_backward)

Conv = functools.partial(nn.Conv, conv_general_dilated=convolution)


class Dropout(nn.Module):
    """Dropout with a key for each example, so that a draw does not depend on the batch.

    The layer's path is folded into the keys, so that no two layers drop the same units.
    Without keys (outside training) it does nothing.
    """

    rate: float

    def __call__(
        self,
        x: Float[Array, "batch *event"],
        keys: Key[Array, "batch"] | None,
        number: Int[Array, ""] | int = 0,
    ) -> Float[Array, "batch *event"]:
        """`number` distinguishes the calls of one layer, as those of a scan."""
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
    """Sines, then cosines, of 1000 t at frequencies from 1 down to 1 / 10,000.

    Ho et al. 2020's (from tensor2tensor): its step i of T = 1000 is 1000 t here.
    """
    half = width // 2
    rates = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / max(half - 1, 1))
    angles = 1000.0 * time.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def grid_embedding(height: int, width: int, channels: int) -> Float[Array, "height width channels"]:
    """Embed a pixel's row in half of the channels, its column in the others."""
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
    """Return what a network is conditioned on: an MLP of the time, the label's vector, a caption's.

    Called within a module's compact method, whose parameters time_1, time_2, label and pooled it
    makes.

    Args:
      labels: label `classes` is "no class"; not read where `classes` is 0.
      sines: width of the time embedding; `width`: of the rest.

    Raises:
      ValueError: there are classes, and no labels.
    """
    emb = nn.Dense(width, kernel_init=kernel_init, name="time_1")(time_embedding(time, sines))
    emb = nn.Dense(width, kernel_init=kernel_init, name="time_2")(nn.swish(emb))
    if classes:
        if labels is None:
            raise ValueError("a class-conditional network needs labels")
        normal = nn.initializers.normal(label_std)
        emb += nn.Embed(classes + 1, width, embedding_init=normal, name="label")(labels)
    if pooled is not None:
        emb += nn.Dense(width, kernel_init=kernel_init, name="pooled")(pooled)
    return nn.swish(emb)


def attention(
    query: Float[Array, "batch q heads d"],
    key: Float[Array, "batch k heads d"],
    value: Float[Array, "batch k heads d"],
    seen: Bool[Array, "..."] | None = None,
) -> Float[Array, "batch q heads d"]:
    """softmax(q k^T / sqrt(d)) v; logits, softmax and sums in float32, whatever the inputs' type.

    Args:
      query, key, value: of every head.
      seen: which key a query may look at, broadcast to [batch, heads, q, k]; at least one key each.
    """
    scale = query.shape[-1] ** -0.5
    float32 = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=float32) * scale
    if seen is not None:
        logits = jnp.where(seen, logits, -1e30)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value.astype(float32))
    return out.astype(value.dtype)


class CrossAttention(nn.Module):
    """Attention of [B, L, width] to a context's tokens and one of its own, "nothing".

    So an empty caption can be attended to.  The last projection starts at 0.
    """

    heads: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], context: Context
    ) -> Float[Array, "batch length width"]:
        size, _, width = x.shape
        tokens = context.tokens
        normal = nn.initializers.normal(0.02)
        nothing = self.param("nothing", normal, (tokens.shape[-1],)).astype(tokens.dtype)
        tokens = jnp.concatenate([tokens, jnp.broadcast_to(nothing, (size, 1, len(nothing)))], 1)
        seen = jnp.pad(context.mask, ((0, 0), (0, 1)), constant_values=True)

        def heads(a: Array, name: str) -> Array:
            projected = nn.Dense(width, dtype=self.dtype, name=name)(a)
            return projected.reshape(size, a.shape[1], self.heads, width // self.heads)

        attended = attention(
            heads(x, "query"), heads(tokens, "key"), heads(tokens, "value"), seen[:, None, None]
        )
        zeros = nn.initializers.zeros
        out = nn.Dense(width, kernel_init=zeros, dtype=self.dtype, name="out")
        return out(attended.reshape(x.shape))


def group_norm(x: Float[Array, "batch h w c"], name: str) -> Float[Array, "batch h w c"]:
    """Group norm of 32 groups (of fewer where there are few channels), statistics in float32."""
    groups = min(32, x.shape[-1] // 4)
    while x.shape[-1] % groups:
        groups -= 1
    out: Array = nn.GroupNorm(groups, epsilon=1e-6, dtype=jnp.float32, name=name)(x)
    return out.astype(x.dtype)


def layer_norm(x: Float[Array, "batch tokens d"]) -> Float[Array, "batch tokens d"]:
    """Layer norm without parameters, in float32."""
    norm = nn.LayerNorm(use_bias=False, use_scale=False, epsilon=1e-6)
    out: Array = norm(x.astype(jnp.float32))
    return out


def space_to_depth(
    x: Float[Array, "batch h w c"], side: int
) -> Float[Array, "batch rows columns d"]:
    """Move side x side pixels into the channels of one."""
    size, height, width, channels = x.shape
    x = x.reshape(size, height // side, side, width // side, side, channels).swapaxes(2, 3)
    return x.reshape(size, height // side, width // side, side * side * channels)


def depth_to_space(
    x: Float[Array, "batch rows columns d"], side: int
) -> Float[Array, "batch h w c"]:
    """Return the inverse of `space_to_depth`."""
    size, rows, columns, features = x.shape
    x = x.reshape(size, rows, columns, side, side, features // side**2).swapaxes(2, 3)
    return x.reshape(size, rows * side, columns * side, features // side**2)


def inner_dtype(precision: str) -> str | None:
    """Return the type that a network computes in; None: that of its inputs."""
    return None if precision == "float32" else precision
