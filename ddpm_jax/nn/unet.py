"""The U-Net of Ho et al. 2020, appendix B, with options of later papers."""

from typing import Annotated, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.fields import (
    BOUND,
    EMPTY_ALLOWED,
    AtLeast,
    Count,
    FieldError,
    Layers,
    OptionalLayers,
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
    """Return the uniform initializer of variance max(scale, 1e-10) / mean(fan in, fan out)."""
    return nn.initializers.variance_scaling(max(scale, 1e-10), "fan_avg", "uniform")


class Conditioning(NamedTuple):
    """The inputs of a block in addition to the feature map.

    Attributes:
      emb: Sum of the embeddings of time, class label and caption (`layers.condition`).
      keys: Keys of dropout, one for each image. If None, dropout is off.
      context: Text features. If None, there is no cross-attention.
    """

    emb: Float[Array, "batch e"]
    keys: Key[Array, "batch"] | None
    context: Context | None


class UNet(nn.Module):
    """A U-Net: x_t [B, H, W, C] -> [B, H, W, outputs].

    The default fields give the network of Ho et al. for CIFAR-10, with 35,746,307 parameters.

    Attributes:
      outputs: Number of channels of the output: C, or 2 C with a learned variance.
      space_to_depth: Side of the squares of pixels that are moved into channels at the input, and
        back at the output. If 1, pixels are not moved. Larger sides make the network faster.
      channels: Number of channels of the first level.
      multipliers: Number of channels of each level, divided by `channels`. Every level except the
        last one halves the sides.
      blocks: Number of residual blocks of each level of the downward path. Each level of the
        upward path has one more.
      attention_sizes: Heights of the feature maps at which every block is followed by attention.
      head_channels: Number of channels of an attention head. If 0, there is one head.
      dropout: Dropout rate in training.
      classes: Number of classes; the null label is the integer `classes`. If 0, the network is not
        conditioned on labels.
      text_refiner_blocks: Number of blocks of the text refiner, a small transformer that is trained
        with this network and processes the text features; 0: there is no text refiner.
      scale_shift: Scale and shift the output of the second norm of a block by functions of the
        embedding (Nichol & Dhariwal 2021), instead of adding the embedding before the norm.
      dtype: Data type of the computation, except statistics of norms, softmax, time embedding and
        output, which are float32.
      remat: Recompute the activations of a block in the backward pass instead of storing them.
    """

    outputs: Annotated[int, BOUND] = 3
    space_to_depth: Count = 1
    channels: Count = 128
    multipliers: tuple[Count, ...] = (1, 2, 2, 2)
    blocks: Layers = 2
    attention_sizes: Annotated[tuple[Count, ...], EMPTY_ALLOWED] = (16,)
    head_channels: Annotated[int, AtLeast(0)] = 0
    dropout: Share = 0.1
    classes: Annotated[int, BOUND] = 0
    text_refiner_blocks: OptionalLayers = 0
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
        """Return the output of the last layer, which is float32.

        Args:
          xt: Noisy images x_t.
          time: Times in [0, 1], where 1 is pure noise.
          labels: Class labels, or `classes` for the null label; required if `classes` is not 0.
          keys: Keys of dropout, one for each image. If None, dropout is off.
          context: Text features of B / n captions; image i has the caption i // n. Every attention
            block attends to the tokens, and an embedding of the pooled features is added to the
            time embedding. If None, there are no captions.
        """
        deepest_channels = self.channels * self.multipliers[-1]
        heads = deepest_channels // self.head_channels if self.head_channels else 1
        if context is not None:
            context = refine_text(
                context, len(xt), deepest_channels, self.text_refiner_blocks, heads, self.dtype
            )
        emb = condition(
            time, labels, self.classes, self.channels, 4 * self.channels, _init(1.0), 1.0,
            context and context.pooled,
        )  # fmt: skip
        conditioning = Conditioning(emb, keys, context)

        x = self._conv(space_to_depth(xt, self.space_to_depth), self.channels, "conv_in")
        x, skips = self._down(x, conditioning)
        x = self._block(x, x.shape[-1], "middle_0", conditioning)
        x = self._attend(x, "middle", conditioning)
        x = self._block(x, x.shape[-1], "middle_1", conditioning)
        x = self._up(x, skips, conditioning)

        x = nn.swish(group_norm(x, "norm_out"))
        features = self.outputs * self.space_to_depth**2
        out = Conv(features, (3, 3), kernel_init=_init(0.0), name="conv_out")
        return depth_to_space(out(x.astype(jnp.float32)), self.space_to_depth)

    # The following methods are called by the compact method `__call__`.

    def _down(self, x: Array, conditioning: Conditioning) -> tuple[Array, list[Array]]:
        """Return (the smallest feature map, the list of feature maps for the skip connections)."""
        skips = [x]
        for level, multiplier in enumerate(self.multipliers):
            for index in range(self.blocks):
                x = self._level(
                    x, self.channels * multiplier, f"down_{level}_{index}", conditioning
                )
                skips.append(x)
            if level < len(self.multipliers) - 1:
                x = self._conv(x, x.shape[-1], f"down_{level}", strides=2)
                skips.append(x)
        return x, skips

    def _up(self, x: Array, skips: list[Array], conditioning: Conditioning) -> Array:
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for index in range(self.blocks + 1):
                x = jnp.concatenate([x, skips.pop()], -1)
                x = self._level(x, self.channels * multiplier, f"up_{level}_{index}", conditioning)
            if level > 0:
                x = self._conv(x.repeat(2, 1).repeat(2, 2), x.shape[-1], f"up_{level}")
        return x

    def _level(self, x: Array, features: int, name: str, conditioning: Conditioning) -> Array:
        """Apply a residual block, and attention if the height of x is one of `attention_sizes`."""
        x = self._block(x, features, name, conditioning)
        return self._attend(x, name, conditioning) if x.shape[1] in self.attention_sizes else x

    def _block(self, x: Array, features: int, name: str, conditioning: Conditioning) -> Array:
        block = nn.remat(ResBlock) if self.remat else ResBlock
        layer = block(features, self.dropout, self.scale_shift, self.dtype, name=name)
        out: Array = layer(x, conditioning.emb, conditioning.keys)
        return out

    def _attend(self, x: Array, name: str, conditioning: Conditioning) -> Array:
        layer = AttentionBlock(self.head_channels, self.dtype, name=f"{name}_attention")
        return layer(x, conditioning.context)

    def _conv(self, x: Array, features: int, name: str, strides: int = 1) -> Array:
        layer = Conv(features, (3, 3), strides, kernel_init=_init(1.0), dtype=self.dtype, name=name)
        return layer(x)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Check that the network can be built for images of `shape` [H, W, C].

        Raises:
          FieldError: If the height or the width is not divisible by the total downsampling factor,
            a number of channels is not a multiple of 4 or of `head_channels`, or an entry of
            `attention_sizes` is not the height of a feature map.
        """
        halvings, side = len(self.multipliers) - 1, self.space_to_depth
        (height, width, _), multipliers = shape, ",".join(map(str, self.multipliers))
        reduction = side * 2**halvings
        if height % reduction or width % reduction:
            squares = f"moves squares of {side}x{side} pixels into channels and " * (side > 1)
            raise FieldError(
                f"multipliers={multipliers}: the U-Net {squares}halves images {halvings} times, "
                f"and {height}x{width} is not divisible by {reduction}; give fewer multipliers, or "
                "images of another size",
                "space_to_depth",
            )
        if self.channels % 4:
            raise FieldError(f"channels={self.channels}: must be a multiple of 4")
        for multiplier in self.multipliers:
            if self.head_channels and self.channels * multiplier % self.head_channels:
                raise FieldError(
                    f"head_channels={self.head_channels}: must divide the number of channels of "
                    f"each level, and a level has {self.channels * multiplier}",
                    "channels",
                    "multipliers",
                )
        sizes = [height // side // 2**level for level in range(halvings + 1)]
        for size in self.attention_sizes:
            if size not in sizes:
                raise FieldError(
                    f"attention_sizes={','.join(map(str, self.attention_sizes))}: no feature map "
                    f"has the side {size}; for images of {height}x{width} the sides are "
                    f"{', '.join(map(str, sizes))}; give sides of this list, or an empty value",
                    "multipliers",
                    "space_to_depth",
                )


class ResBlock(nn.Module):
    """A residual block of two 3x3 convolutions, conditioned on the time (Ho et al. 2020, app. B).

    The layers are norm, swish, convolution, addition of the time embedding, norm, swish, dropout
    and convolution.  The result is added to x, or to a linear map of x if the channels change.
    """

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
        """Return the new feature map, with `features` channels."""
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
    """Residual self-attention over all pixels, and cross-attention to the tokens of a caption.

    A 2-D position embedding is added to the input of the cross-attention, because words such as
    "left" refer to positions.
    """

    head_channels: int
    dtype: DTypeLike | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c"], context: Context | None = None
    ) -> Float[Array, "batch h w c"]:
        """Return the new feature map, of the shape of x."""
        batch, height, width, channels = x.shape
        heads = channels // self.head_channels if self.head_channels else 1
        h = group_norm(x, "norm")

        def dense(name: str, scale: float = 1.0) -> nn.Dense:
            return nn.Dense(channels, kernel_init=_init(scale), dtype=self.dtype, name=name)

        shape = (batch, height * width, heads, channels // heads)
        q, k, v = (dense(name)(h).reshape(shape) for name in ("query", "key", "value"))
        h = attention(q, k, v).reshape(x.shape)
        x = x + dense("out", 0.0)(h)
        if context is None:
            return x
        h = group_norm(x, "norm_cross") + grid_embedding(height, width, channels).astype(x.dtype)
        h = h.reshape(batch, height * width, channels)
        return x + CrossAttention(heads, self.dtype, name="cross")(h, context).reshape(x.shape)


DENOISING_NETWORK = UNet
