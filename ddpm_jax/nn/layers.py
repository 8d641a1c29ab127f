"""Layers that Flax lacks or does otherwise: per-example dropout, time embedding, attention."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class Context(NamedTuple):
    """What a network is told by a caption: features of its tokens, which are text, and pooled."""

    tokens: Float[Array, "batch length width"]
    mask: Bool[Array, "batch length"]
    pooled: Float[Array, "batch width"]


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
        """`number` tells apart the calls of one layer, as those of a scan."""
        if keys is None or self.rate == 0.0:
            return x
        path = zlib.crc32("/".join(self.path).encode())

        def one(key, x):
            key = jax.random.fold_in(jax.random.fold_in(key, path), number)
            keep = jax.random.bernoulli(key, 1 - self.rate, x.shape)
            return jnp.where(keep, x / (1 - self.rate), 0)

        return jax.vmap(one)(keys, x)


def time_embedding(time: Float[Array, "batch"], width: int) -> Float[Array, "batch width"]:
    """Sines, then cosines, of 1000 t at frequencies from 1 down to 1 / 10,000.

    Ho et al. 2020's (from tensor2tensor): its step i of T = 1000 is 1000 t here.
    """
    half = width // 2
    rates = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / max(half - 1, 1))
    angles = 1000.0 * time.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def grid_embedding(height: int, width: int, channels: int) -> Float[Array, "height width channels"]:
    """`time_embedding` of a pixel's row in half of the channels, of its column in the others."""
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
    kernel_init: Callable[..., Any],
    label_std: float,
    pooled: Float[Array, "batch d"] | None = None,
) -> Float[Array, "batch width"]:
    """What a network is told beside x_t: an MLP of the time, the label's vector, a caption's.

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

    `seen` (broadcast to [batch, heads, q, k]): which key a query may look at; it must see one.
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
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], context: Context
    ) -> Float[Array, "batch length width"]:
        size, _, width = x.shape
        told = context.tokens
        normal = nn.initializers.normal(0.02)
        nothing = self.param("nothing", normal, (told.shape[-1],)).astype(told.dtype)
        told = jnp.concatenate([told, jnp.broadcast_to(nothing, (size, 1, len(nothing)))], 1)
        seen = jnp.pad(context.mask, ((0, 0), (0, 1)), constant_values=True)

        def heads(a: Array, name: str) -> Array:
            made = nn.Dense(width, dtype=self.dtype, name=name)(a)
            return made.reshape(size, a.shape[1], self.heads, width // self.heads)

        found = attention(
            heads(x, "query"), heads(told, "key"), heads(told, "value"), seen[:, None, None]
        )
        zeros = nn.initializers.zeros
        out = nn.Dense(width, kernel_init=zeros, dtype=self.dtype, name="out")
        return out(found.reshape(x.shape))


def group_norm(x: Float[Array, "batch h w c"], name: str) -> Float[Array, "batch h w c"]:
    """Group norm of 32 groups (of fewer where there are few channels), statistics in float32."""
    groups = min(32, x.shape[-1] // 4)
    while x.shape[-1] % groups:
        groups -= 1
    made = nn.GroupNorm(groups, epsilon=1e-6, dtype=jnp.float32, name=name)
    return made(x).astype(x.dtype)


def layer_norm(x: Float[Array, "batch tokens d"]) -> Float[Array, "batch tokens d"]:
    """Layer norm without parameters, in float32."""
    return nn.LayerNorm(use_bias=False, use_scale=False, epsilon=1e-6)(x.astype(jnp.float32))


def fold(x: Float[Array, "batch h w c"], side: int) -> Float[Array, "batch rows columns d"]:
    """side x side pixels -> the channels of one."""
    size, height, width, channels = x.shape
    x = x.reshape(size, height // side, side, width // side, side, channels).swapaxes(2, 3)
    return x.reshape(size, height // side, width // side, side * side * channels)


def unfold(x: Float[Array, "batch rows columns d"], side: int) -> Float[Array, "batch h w c"]:
    """The inverse of `fold`."""
    size, rows, columns, features = x.shape
    x = x.reshape(size, rows, columns, side, side, features // side**2).swapaxes(2, 3)
    return x.reshape(size, rows * side, columns * side, features // side**2)
