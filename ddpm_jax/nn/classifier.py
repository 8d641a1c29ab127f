"""A small convolutional classifier, whose last layer but one serves as features."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from ddpm_jax.fields import BOUND, Count, Share
from ddpm_jax.nn.layers import Conv, Dropout, condition

SMALLEST = 8  # a side that is not halved any more
SINES = 64  # width of the time embedding


class ClassifierNetwork(nn.Module):
    """Images [B, H, W, C] in [-1, 1] -> (logits [B, classes], features [B, features]).

    Attributes:
      classes: Number of classes.
      channels: Channels of the 3x3 convolutions, each of which halves a side longer than 8.
      features: Width of the layer before the logits.
      dropout: Dropout rate on the features, in training.
      noisy: Images are x_t, and t is an input behind every convolution.
      dtype: Type of the computation, but for the logits; None: the images'.
    """

    classes: Annotated[int, BOUND] = 0
    channels: tuple[Count, ...] = (32, 64, 64)
    features: Count = 64
    dropout: Share = 0.3
    noisy: Annotated[bool, BOUND] = False
    dtype: Annotated[DTypeLike | None, BOUND] = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch h w c"],
        keys: Key[Array, "batch"] | None = None,
        time: Float[Array, "batch"] | None = None,
    ) -> tuple[Float[Array, "batch classes"], Float[Array, "batch features"]]:
        """A noisy classifier is conditioned on `time` in [0, 1] (1 is pure noise; None: 0)."""
        emb = None
        if self.noisy:
            time = jnp.zeros(len(x)) if time is None else time
            init = nn.initializers.lecun_normal()
            emb = condition(time, None, 0, SINES, 2 * SINES, init, 0.0)
        for number, width in enumerate(self.channels):
            strides = 2 if x.shape[1] > SMALLEST else 1
            x = Conv(width, (3, 3), strides, dtype=self.dtype, name=f"conv_{number}")(x)
            if emb is not None:
                shift = nn.Dense(width, dtype=self.dtype, name=f"told_{number}")(emb)
                x += shift[:, None, None]
            x = nn.gelu(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.gelu(nn.Dense(self.features, dtype=self.dtype, name="features")(x))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return nn.Dense(self.classes, name="logits")(Dropout(self.dropout, name="drop")(x, keys)), x
