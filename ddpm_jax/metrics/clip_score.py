"""The CLIP score: similarity of a caption and an image (Hessel et al. 2021)."""

from typing import cast

import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from ddpm_jax.nn.dual_encoder import DualEncoder


def clip_scores(cosines: Float[np.ndarray, "pairs"]) -> Float[np.ndarray, "pairs"]:
    """Return CLIP scores max(0, 100 cos), [pairs] (Hessel et al. 2021, eq. 1, with w = 100)."""
    return np.maximum(100 * np.asarray(cosines, np.float64), 0.0)


def cosines(
    network: DualEncoder,
    params: PyTree,
    tokens: UInt8[Array, "pairs length"] | UInt8[np.ndarray, "pairs length"],
    images: Float[Array, "pairs h w c"] | Float[np.ndarray, "pairs h w c"],
) -> Float[Array, "pairs"]:
    """Return the cosine similarity of the embeddings of caption i and image i, [pairs].

    Args:
      network: The dual encoder of text and images. Its embeddings have length 1.
      params: Parameters of the dual encoder.
      tokens: Bytes of the captions, [pairs, length].
      images: Images [pairs, H, W, C] in [-1, 1].
    """
    text, image, _ = cast(tuple[Array, Array, Array], network.apply(params, tokens, images))
    return (text * image).sum(-1)
