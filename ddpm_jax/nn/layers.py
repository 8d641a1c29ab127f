"""Layers that Flax lacks or does otherwise: per-example dropout, time embedding, attention."""

import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


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
    rates = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / (half - 1))
    angles = 1000.0 * time.astype(jnp.float32)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def condition(
    time: Float[Array, "batch"],
    labels: Int[Array, "batch"] | None,
    classes: int,
    sines: int,
    width: int,
    kernel_init: Callable[..., Any],
    label_std: float,
) -> Float[Array, "batch width"]:
    """What a network is told beside x_t: an MLP of the time, and the label's vector, added.

    Called within a module's compact method, whose parameters time_1, time_2 and label it makes.

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
    return nn.swish(emb)


def attention(
    query: Float[Array, "batch q heads d"],
    key: Float[Array, "batch k heads d"],
    value: Float[Array, "batch k heads d"],
) -> Float[Array, "batch q heads d"]:
    """softmax(q k^T / sqrt(d)) v, the softmax in float32."""
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32) * scale
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits).astype(value.dtype), value)


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
