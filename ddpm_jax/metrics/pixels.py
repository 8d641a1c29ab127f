"""Conversion of the grey levels of a data set to pixel values in [-1, 1]."""

import jax
import numpy as np

from ddpm_jax.data.types import Leaf


def to_images(images: Leaf, levels: int) -> Leaf:
    """Map grey levels 0 ... levels - 1 to float32 values in [-1, 1].

    Args:
      images: An array of JAX or NumPy, [..., H, W, C], or an object like an array whose images are
        read or rendered when they are indexed.
      levels: Number of grey levels, such as 256.
    """
    if not isinstance(images, jax.Array):
        images = np.asarray(images)
    return 2 * images.astype(np.float32) / np.float32(levels - 1) - 1
