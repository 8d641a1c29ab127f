"""The U-Net of Ho et al. 2020, appendix B, with the options that came after it."""

from typing import Annotated, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.fields import (
    BOUND,
    OR_NONE,
    AtLeast,
    Count,
    FieldError,
    Layers,
    MoreLayers,
    Share,
)  # fmt: skip
from ddpm_jax.nn.layers import (
    Context,
    Conv,
    CrossAttention,
    Dropout,
    attention,
    condition,
    depth_to_space,
    grid_embedding,
    group_norm,
    space_to_depth,
)
from ddpm_jax.nn.text_refiner import refine_text


def _init(scale: float) -> Initializer:
    """DDPM's: variance scaling over the mean fan, uniform; `scale` 0 is (almost) zero."""
    return nn.initializers.variance_scaling(max(scale, 1e-10), "fan_avg", "uniform")


class Conditioning(NamedTuple):
    """What blocks get beside the image: embedding of time and class, dropout keys, caption."""

    emb: Float[Array, "batch e"]
    keys: Key[Array, "batch"] | None
    context: Context | None


class UNet(nn.Module):
    """x_t [B, H, W, C] -> [B, H, W, C] (2 C with a learned variance).

    The defaults are CIFAR-10's of Ho et al.: 35,746,307 parameters.

    Attributes:
      outputs: Channels of the output.
      space_to_depth: Side of the squares of pixels that become channels on the way in, and pixels
        again on the way out: a network for small machines.
      channels: Channels of the first level.
      multipliers: Multiples of the channels, one for each level; every level but the last halves
        the image.
      blocks: Residual blocks of each level on the way down (one more on the way up).
      attention_sizes: Sides of the feature maps at which the blocks are followed by attention.
      head_channels: Channels of an attention head; 0: one head.
      dropout: Dropout rate in training.
      classes: Number of classes; label `classes` is "no class". 0: unconditional.
      text_refiner_blocks: Blocks that read a caption's features anew (`nn.text_refiner`); 0: none.
      scale_shift: Time scales and shifts after the norm (Nichol & Dhariwal 2021) instead of being
        added before it.
      dtype: Type of the computation; norms' statistics, softmax, time embedding and output stay
        float32.
      remat: Compute a block again in the backward pass instead of keeping its activations.
    """

    outputs: Annotated[int, BOUND] = 3
    space_to_depth: Count = 1
    channels: Count = 128
    multipliers: tuple[Count, ...] = (1, 2, 2, 2)
    blocks: Layers = 2
    attention_sizes: Annotated[tuple[Count, ...], OR_NONE] = (16,)
    head_channels: Annotated[int, AtLeast(0)] = 0
    dropout: Share = 0.1
    classes: Annotated[int, BOUND] = 0
    text_refiner_blocks: MoreLayers = 0
    scale_shift: bool = False
    dtype: Annotated[DTypeLike, BOUND] = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        xt: Float[Array, "batch h w c"],
        time: Float[Array, "batch"],
        labels: Int[Array, "batch"] | None = None,
        keys: Key[Array, "batch"] | None = None,
        context: Context | None = None,
    ) -> Float[Array, "batch h w outputs"]:
        """The network's raw output.

        Args:
          time: in [0, 1]; 1 is pure noise.
          labels: classes, or `classes` for none; required by a class-conditional network.
          keys: of the dropout; None outside training.
          context: a caption's features: its tokens are attended to wherever there is attention,
            and what is pooled of them is added to the time.  Of B / n captions, each belongs to n
            images side by side.
        """
        deepest = self.channels * self.multipliers[-1]
        heads = deepest // self.head_channels if self.head_channels else 1
        if context is not None:
            context = refine_text(
                context, len(xt), deepest, self.text_refiner_blocks, heads, self.dtype
            )
        emb = condition(
            time, labels, self.classes, self.channels, 4 * self.channels, _init(1.0), 1.0,
            context and context.pooled,
        )  # fmt: skip
        given = Conditioning(emb, keys, context)

        x = self._conv(space_to_depth(xt, self.space_to_depth), self.channels, "conv_in")
        x, skips = self._down(x, given)
        x = self._block(x, x.shape[-1], "middle_0", given)
        x = self._attend(x, "middle", given)
        x = self._block(x, x.shape[-1], "middle_1", given)
        x = self._up(x, skips, given)

        x = nn.swish(group_norm(x, "norm_out"))
        features = self.outputs * self.space_to_depth**2
        out = Conv(features, (3, 3), kernel_init=_init(0.0), name="conv_out")
        return depth_to_space(out(x.astype(jnp.float32)), self.space_to_depth)

    # The parts of `__call__`, which is the compact method that their submodules belong to.

    def _down(self, x: Array, given: Conditioning) -> tuple[Array, list[Array]]:
        """Return (the smallest feature map, the maps for the way up in the order they arise)."""
        skips = [x]
        for level, multiplier in enumerate(self.multipliers):
            for number in range(self.blocks):
                x = self._level(x, self.channels * multiplier, f"down_{level}_{number}", given)
                skips.append(x)
            if level < len(self.multipliers) - 1:
                x = self._conv(x, x.shape[-1], f"down_{level}", strides=2)
                skips.append(x)
        return x, skips

    def _up(self, x: Array, skips: list[Array], given: Conditioning) -> Array:
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for number in range(self.blocks + 1):
                x = jnp.concatenate([x, skips.pop()], -1)
                x = self._level(x, self.channels * multiplier, f"up_{level}_{number}", given)
            if level > 0:
                x = self._conv(x.repeat(2, 1).repeat(2, 2), x.shape[-1], f"up_{level}")
        return x

    def _level(self, x: Array, features: int, name: str, given: Conditioning) -> Array:
        """A residual block, and attention where the map's side is one of `attention_sizes`."""
        x = self._block(x, features, name, given)
        return self._attend(x, name, given) if x.shape[1] in self.attention_sizes else x

    def _block(self, x: Array, features: int, name: str, given: Conditioning) -> Array:
        block = nn.remat(ResBlock) if self.remat else ResBlock
        layer = block(features, self.dropout, self.scale_shift, self.dtype, name=name)
        out: Array = layer(x, given.emb, given.keys)
        return out

    def _attend(self, x: Array, name: str, given: Conditioning) -> Array:
        layer = AttentionBlock(self.head_channels, self.dtype, name=f"{name}_attention")
        return layer(x, given.context)

    def _conv(self, x: Array, features: int, name: str, strides: int = 1) -> Array:
        layer = Conv(features, (3, 3), strides, kernel_init=_init(1.0), dtype=self.dtype, name=name)
        return layer(x)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Check that the network can be built for images of `shape` [H, W, C].

        Raises:
          FieldError: it cannot.
        """
        halvings, folded = len(self.multipliers) - 1, self.space_to_depth
        (height, width, _), words = shape, ",".join(map(str, self.multipliers))
        least = folded * 2**halvings
        if height % least or width % least:
            first = f"takes squares of {folded}x{folded} pixels together and " * (folded > 1)
            raise FieldError(
                f"multipliers={words}: the U-Net {first}halves images {halvings} times, and "
                f"{height}x{width} does not divide by {least}; give fewer multipliers, or images "
                "of another size",
                "space_to_depth",
            )
        if self.channels % 4:
            raise FieldError(f"channels={self.channels}: must divide by 4")
        for multiplier in self.multipliers:
            if self.head_channels and self.channels * multiplier % self.head_channels:
                raise FieldError(
                    f"head_channels={self.head_channels}: {self.channels * multiplier} channels do "
                    "not divide into heads of that size",
                    "channels",
                    "multipliers",
                )
        sizes = [height // folded // 2**level for level in range(halvings + 1)]
        for size in self.attention_sizes:
            if size not in sizes:
                raise FieldError(
                    f"attention_sizes={','.join(map(str, self.attention_sizes))}: no feature map "
                    f"has the side {size}; of images of {height}x{width} they have "
                    f"{', '.join(map(str, sizes))}; give some of these, or none",
                    "multipliers",
                    "space_to_depth",
                )


class ResBlock(nn.Module):
    """Norm, swish, 3x3 convolution, time; norm, swish, dropout, 3x3 convolution; shortcut."""

    features: int
    dropout: float
    scale_shift: bool
    dtype: DTypeLike | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch h w c"],
        emb: Float[Array, "batch e"],
        keys: Key[Array, "batch"] | None,
    ) -> Float[Array, "batch h w features"]:
        h = nn.swish(group_norm(x, "norm_1"))
        h = Conv(self.features, (3, 3), kernel_init=_init(1.0), dtype=self.dtype, name="conv_1")(h)
        if self.scale_shift:
            emb = nn.Dense(2 * self.features, kernel_init=_init(1.0), name="time")(emb)
            scale, shift = jnp.split(emb.astype(h.dtype)[:, None, None], 2, -1)
            h = group_norm(h, "norm_2") * (1 + scale) + shift
        else:
            emb = nn.Dense(self.features, kernel_init=_init(1.0), name="time")(emb)
            h = group_norm(h + emb.astype(h.dtype)[:, None, None], "norm_2")
        h = Dropout(self.dropout, name="dropout")(nn.swish(h), keys)
        h = Conv(self.features, (3, 3), kernel_init=_init(0.0), dtype=self.dtype, name="conv_2")(h)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, kernel_init=_init(1.0), dtype=self.dtype, name="shortcut")(
                x
            )
        return x + h


class AttentionBlock(nn.Module):
    """Norm, self-attention over all places, residual; and the same over a caption's tokens.

    The queries to a caption's tokens hold a pixel's place: "left" means nothing without it.
    """

    head_channels: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c"], context: Context | None = None
    ) -> Float[Array, "batch h w c"]:
        batch, height, width, channels = x.shape
        heads = channels // self.head_channels if self.head_channels else 1
        h = group_norm(x, "norm")

        def dense(name: str, scale: float = 1.0) -> nn.Dense:
            return nn.Dense(channels, kernel_init=_init(scale), dtype=self.dtype, name=name)

        places = (batch, height * width, heads, channels // heads)
        q, k, v = (dense(name)(h).reshape(places) for name in ("query", "key", "value"))
        h = attention(q, k, v).reshape(x.shape)
        x = x + dense("out", 0.0)(h)
        if context is None:
            return x
        h = group_norm(x, "norm_cross") + grid_embedding(height, width, channels).astype(x.dtype)
        h = h.reshape(batch, height * width, channels)
        return x + CrossAttention(heads, self.dtype, name="cross")(h, context).reshape(x.shape)


DENOISING_NETWORK = UNet
