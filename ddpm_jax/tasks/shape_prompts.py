"""The prompts of an evaluation, and the alignment of images with them."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from ddpm_jax.data import shapes
from ddpm_jax.metrics.alignment import check_caption

SETS = ("single", "single held out", "relation", "relation held out")  # names in `shapes.scene`


@runtime_checkable
class Prompts(Protocol):
    """Sets of prompts, and criteria of the alignment of images with them: a hashable value."""

    def sets(self, split: str) -> dict[str, list[str]]:
        """Return the prompts of a split, by the name of the prompt set."""

    def align(
        self, images: Float[np.ndarray, "n h w c"], texts: Sequence[str]
    ) -> dict[str, Bool[np.ndarray, "n"]]:
        """Return true for each image that shows what its text says, by the name of the criterion.

        Args:
          images: Images [N, H, W, C] in [-1, 1].
          texts: The N texts of the images.
        """


@dataclasses.dataclass(frozen=True)
class NoPrompts:
    """An empty set of prompts, for data sets without a criterion of alignment."""

    def sets(self, split: str) -> dict[str, list[str]]:
        """Return no prompt sets."""
        del split
        return {}

    def align(
        self, images: Float[np.ndarray, "n h w c"], texts: Sequence[str]
    ) -> dict[str, Bool[np.ndarray, "n"]]:
        """Return no criteria."""
        del images, texts
        return {}


@dataclasses.dataclass(frozen=True)
class ShapePrompts:
    """Prompts of the data set `shapes`, whose alignment `metrics.alignment` reads from pixels.

    Attributes:
      count: The number of prompts in each prompt set.
    """

    count: int

    def sets(self, split: str) -> dict[str, list[str]]:
        """Return the prompts of a split, by the name of the prompt set."""
        return {
            name.replace(" ", "_"): [
                shapes.scene(f"{split} prompts", number, name).caption
                for number in range(self.count)
            ]
            for name in SETS
        }

    def align(
        self, images: Float[np.ndarray, "n h w c"], texts: Sequence[str]
    ) -> dict[str, Bool[np.ndarray, "n"]]:
        """Return true for each image that its caption describes, by the name of the criterion.

        The second criterion ignores sizes and the background.

        Args:
          images: Images [N, H, W, C] in [-1, 1].
          texts: The N captions of the images, in the form of the data set.
        """
        results = [check_caption(x, text) for x, text in zip(images, texts, strict=True)]
        names = ("aligned", "aligned_except_size_and_background")
        return {name: np.array([getattr(r, name) for r in results], bool) for name in names}


def prompts_of(data: str, count: int) -> Prompts:
    """Return the prompts of a data set by its name, with `count` prompts in each prompt set."""
    return ShapePrompts(count) if shapes.is_shapes(data) else NoPrompts()
