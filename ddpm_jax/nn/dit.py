"""The diffusion transformer (DiT) of Peebles & Xie 2023, with the interface of the U-Net."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.fields import BOUND, Count, FieldError, Layers, OptionalLayers, Share
from ddpm_jax.nn.layers import (
    Context,
    CrossAttention,
    Dropout,
    attention,
    condition,
    depth_to_space,
    layer_norm,
    space_to_depth,
)
from ddpm_jax.nn.text_refiner import refine_text
from ddpm_jax.nn.transformer import check_width


class DiT(nn.Module):
    """A diffusion transformer: x_t [B, H, W, C] -> [B, H, W, outputs].

    The tokens are patches of the image.  All blocks are one module in a `lax.scan` of length
    `depth`, so that the compile time does not depend on `depth`.

    Attributes:
      outputs: Number of channels of the output: C, or 2 C with a learned variance.
      patch: Side of a patch in pixels.
      width: Number of features of a token.
      depth: Number of transformer blocks.
      heads: Number of attention heads.
      dropout: Dropout rate after attention and after the MLP of each block in training.
      classes: Number of classes; the null label is the integer `classes`. If 0, the network is not
        conditioned on labels.
      text_refiner_blocks: Number of blocks of the text refiner, a small transformer that is trained
        with this network and processes the text features; 0: there is no text refiner.
      dtype: Data type of the computation, except norms, softmax, time embedding and output, which
        are float32.
      remat: Recompute the activations of a block in the backward pass instead of storing them.
    """

    outputs: Annotated[int, BOUND] = 3
    patch: Count = 2
    width: Count = 384
    depth: Layers = 12
    heads: Count = 6
    dropout: Share = 0.0
    classes: Annotated[int, BOUND] = 0
    text_refiner_blocks: OptionalLayers = 0
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
        """Return the output of the last layer; the arguments are those of `UNet.__call__`."""
        size, height, width, _ = xt.shape
        rows, columns = height // self.patch, width // self.patch
        default = nn.initializers.lecun_normal()
        if context is not None:
            context = refine_text(
                context, size, self.width, self.text_refiner_blocks, self.heads, self.dtype
            )
        pooled = context and context.pooled
        emb = condition(time, labels, self.classes, 256, self.width, default, 0.02, pooled)

        x = space_to_depth(xt, self.patch).reshape(size, rows * columns, -1)
        x = nn.Dense(self.width, dtype=self.dtype, name="patches")(x)
        x += self.param("places", nn.initializers.normal(0.02), x.shape[1:]).astype(x.dtype)

        blocks = nn.scan(
            nn.remat(DiTBlock, prevent_cse=False) if self.remat else DiTBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=self.depth,
        )
        block = blocks(self.heads, self.dropout, self.dtype, name="blocks")
        x, _ = block(x, emb, keys, context, jnp.arange(self.depth))

        shift, scale = _modulation(self, emb, 2, "modulation_out")
        x = layer_norm(x) * (1 + scale) + shift
        zeros = nn.initializers.zeros
        x = nn.Dense(self.patch**2 * self.outputs, kernel_init=zeros, name="out")(x)
        return depth_to_space(x.reshape(size, rows, columns, -1), self.patch)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Check that the network can be built for images of `shape` [H, W, C].

        Raises:
          FieldError: If the height or the width is not a multiple of `patch`, or if `width` is
            odd or not a multiple of `heads`.
        """
        if shape[0] % self.patch or shape[1] % self.patch:
            raise FieldError(
                f"patch={self.patch}: images of {shape[0]}x{shape[1]} pixels cannot be cut "
                f"into patches of {self.patch}x{self.patch}; give a divisor of both sides"
            )
        check_width(self.width, self.heads)


class DiTBlock(nn.Module):
    """A DiT block with adaLN-Zero (Peebles & Xie 2023, sec. 3.2).

    The inputs of self-attention and of the MLP are normalised, scaled and shifted, and the outputs
    are multiplied by gates.  Scales, shifts and gates are linear functions of the embedding of the
    time, label and caption.  If there are captions, cross-attention to their tokens precedes the
    MLP.
    """

    heads: int
    dropout: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens d"],
        emb: Float[Array, "batch d"],
        keys: Key[Array, "batch"] | None,
        context: Context | None,
        number: Int[Array, ""],
    ) -> tuple[Float[Array, "batch tokens d"], None]:
        """Return (output tokens, None), as `nn.scan` requires; `number` is the block's index."""
        size, tokens, width = x.shape
        drop = Dropout(self.dropout, name="drop")
        modulation = _modulation(self, emb, 6, "modulation")
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        h = (layer_norm(x) * (1 + scale_1) + shift_1).astype(self.dtype)
        q, k, v = jnp.split(dense(3 * width, "qkv")(h), 3, -1)
        q, k, v = (a.reshape(size, tokens, self.heads, width // self.heads) for a in (q, k, v))
        h = dense(width, "project")(attention(q, k, v).reshape(x.shape))
        x += (gate_1 * drop(h, keys, 2 * number)).astype(x.dtype)
        if context is not None:  # as in PixArt (Chen et al. 2024); initially the branch is 0
            x += CrossAttention(self.heads, self.dtype, name="cross")(x, context).astype(x.dtype)
        h = (layer_norm(x) * (1 + scale_2) + shift_2).astype(self.dtype)
        h = dense(width, "mlp_2")(nn.gelu(dense(4 * width, "mlp_1")(h)))
        x += (gate_2 * drop(h, keys, 2 * number + 1)).astype(x.dtype)
        return x, None


def _modulation(
    module: nn.Module, emb: Float[Array, "batch d"], parts: int, name: str
) -> list[Float[Array, "batch 1 d"]]:
    """Return a list of `parts` linear functions of the embedding, which are initially zero."""
    zeros = nn.initializers.zeros
    dense = nn.Dense(parts * emb.shape[-1], kernel_init=zeros, name=name, parent=module)
    return jnp.split(dense(emb)[:, None], parts, -1)


DENOISING_NETWORK = DiT
