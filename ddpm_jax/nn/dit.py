"""The diffusion transformer of Peebles & Xie 2023, with the U-Net's interface."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.fields import BOUND, Count, FieldError, Layers, MoreLayers, Share
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
    """x_t [B, H, W, C] -> [B, H, W, outputs]: patches, transformer blocks, patches.

    The blocks are one module scanned `depth` times, so that depth costs no compile time.

    Attributes:
      outputs: Channels of the output.
      patch: Side of a patch in pixels; a patch is a token.
      width: Width of a token.
      depth: Number of blocks.
      heads: Number of attention heads.
      dropout: Dropout rate behind each block's two branches, in training.
      classes: Number of classes; label `classes` is "no class". 0: unconditional.
      text_refiner_blocks: Blocks that read a caption's features anew (`nn.text_refiner`); 0: none.
      dtype: Type of the computation; norms, softmax, time embedding and output stay float32.
      remat: Compute a block again in the backward pass instead of keeping its activations.
    """

    outputs: Annotated[int, BOUND] = 3
    patch: Count = 2
    width: Count = 384
    depth: Layers = 12
    heads: Count = 6
    dropout: Share = 0.0
    classes: Annotated[int, BOUND] = 0
    text_refiner_blocks: MoreLayers = 0
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
        """The network's raw output; arguments as the U-Net's."""
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
          FieldError: it cannot.
        """
        if shape[0] % self.patch or shape[1] % self.patch:
            raise FieldError(
                f"patch={self.patch}: the DiT cuts images into patches, and {shape[0]}x{shape[1]} "
                "does not divide by it"
            )
        check_width(self.width, self.heads)


class DiTBlock(nn.Module):
    """Attention and an MLP, each normed, scaled and shifted by the time, and gated (adaLN-Zero).

    Between them, where there is a caption, attention to its tokens.
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
        if (
            context is not None
        ):  # as in PixArt (Chen et al. 2024), whose last projection starts at 0
            x += CrossAttention(self.heads, self.dtype, name="cross")(x, context).astype(x.dtype)
        h = (layer_norm(x) * (1 + scale_2) + shift_2).astype(self.dtype)
        h = dense(width, "mlp_2")(nn.gelu(dense(4 * width, "mlp_1")(h)))
        x += (gate_2 * drop(h, keys, 2 * number + 1)).astype(x.dtype)
        return x, None


def _modulation(
    module: nn.Module, emb: Float[Array, "batch d"], parts: int, name: str
) -> list[Float[Array, "batch 1 d"]]:
    """Return `parts` vectors of the embedding, all zero at first."""
    zeros = nn.initializers.zeros
    dense = nn.Dense(parts * emb.shape[-1], kernel_init=zeros, name=name, parent=module)
    return jnp.split(dense(emb)[:, None], parts, -1)


DENOISING_NETWORK = DiT
