"""The diffusion transformer of Peebles & Xie 2023, with the U-Net's interface."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.errors import UserError
from ddpm_jax.nn.layers import (
    Context,
    CrossAttention,
    Dropout,
    attention,
    condition,
    fold,
    layer_norm,
    unfold,
)
from ddpm_jax.nn.text_refiner import refined
from ddpm_jax.nn.transformer import check_width


class DiT(nn.Module):
    """x_t [B, H, W, C] -> [B, H, W, outputs]: patches, transformer blocks, patches.

    The blocks are one module scanned `depth` times, so that depth costs no compile time.

    Attributes:
      outputs: channels of the output.
      patch: side of a patch, one token each.
      width: of a token.
      depth: blocks.
      heads: of the attention.
      dropout: rate behind each block's two branches, in training.
      classes: how many; label `classes` is "no class". 0: unconditional.
      refine: blocks of its own that read a caption's features (`nn.text_encoder.Refiner`); 0: none.
      dtype: of the computation; norms, softmax, time embedding and output stay float32.
      remat: compute a block's inside again in the backward pass instead of keeping it.
    """

    outputs: int = 3
    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    dropout: float = 0.0
    classes: int = 0
    refine: int = 0
    dtype: Any = jnp.float32
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
        context = refined(context, size, self.width, self.refine, self.heads, self.dtype)
        pooled = context and context.pooled
        emb = condition(time, labels, self.classes, 256, self.width, default, 0.02, pooled)

        x = fold(xt, self.patch).reshape(size, rows * columns, -1)
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
        return unfold(x.reshape(size, rows, columns, -1), self.patch)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises UserError unless the network can be built for images of this shape."""
        if shape[0] % self.patch or shape[1] % self.patch:
            raise UserError(
                f"the DiT cuts images into patches, and {shape[0]}x{shape[1]} does not divide by "
                f"--config.patch={self.patch}"
            )
        check_width(self.width, self.heads)


class DiTBlock(nn.Module):
    """Attention and an MLP, each normed, scaled and shifted by the time, and gated (adaLN-Zero).

    Between them, where there is a caption, attention to its tokens.
    """

    heads: int
    dropout: float
    dtype: Any

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
    """`parts` vectors of the embedding, all zero at first."""
    zeros = nn.initializers.zeros
    dense = nn.Dense(parts * emb.shape[-1], kernel_init=zeros, name=name, parent=module)
    return jnp.split(dense(emb)[:, None], parts, -1)
