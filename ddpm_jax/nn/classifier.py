"""A small convolutional classifier, which also serves as a feature network."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from ddpm_jax.fields import BOUND, Count, Share
from ddpm_jax.nn.layers import Conv, Dropout, condition

SMALLEST = 8  # a convolution has stride 2 if the sides are longer than this
SINES = 64  # width of the sinusoidal time embedding


class ClassifierNetwork(nn.Module):
    """A classifier: images [B, H, W, C] in [-1, 1] -> (logits [B, classes], features).

    Attributes:
      classes: Number of classes.
      channels: Number of channels of each 3x3 convolution. A convolution halves the sides if they
        are longer than 8.
      features: Number of features, which are the outputs of the layer before the logits.
      dropout: Dropout rate on the features in training.
      noisy: Classify noisy images x_t; an embedding of t is added after every convolution.
      dtype: Data type of the computation, except the logits, which are float32. If None, the type
        of the images.
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
        """Return (logits, features); both have at least the precision of float32.

        Args:
          x: Images in [-1, 1].
          keys: Keys of dropout, one for each image. If None, dropout is off.
          time: Times t in [0, 1], where 1 is pure noise; only used if `noisy`. If None, t = 0.
        """
        emb = None
        if self.noisy:
            time = jnp.zeros(len(x)) if time is None else time
            init = nn.initializers.lecun_normal()
            emb = condition(time, None, 0, SINES, 2 * SINES, init, 0.0)
        for index, width in enumerate(self.channels):
            strides = 2 if x.shape[1] > SMALLEST else 1
            x = Conv(width, (3, 3), strides, dtype=self.dtype, name=f"conv_{index}")(x)
            if emb is not None:
                shift = nn.Dense(width, dtype=self.dtype, name=f"told_{index}")(emb)
                x += shift[:, None, None]
            x = nn.gelu(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.gelu(nn.Dense(self.features, dtype=self.dtype, name="features")(x))
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return nn.Dense(self.classes, name="logits")(Dropout(self.dropout, name="drop")(x, keys)), x
