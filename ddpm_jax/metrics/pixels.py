"""Pixel values: from the levels of a data set to [-1, 1]."""

import jax
import numpy as np

from ddpm_jax.data.types import Leaf


def to_images(images: Leaf, levels: int) -> Leaf:
    """Map grey values 0 ... levels - 1, of jax or numpy, to float32 in [-1, 1]."""
    if not isinstance(images, jax.Array):
        images = np.asarray(images)  # rows that a file or a drawing makes when they are asked for
    return 2 * images.astype(np.float32) / np.float32(levels - 1) - 1
