"""The prompts of an evaluation, and checks that images show what the prompts say."""

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
    """Prompts, and a check of whether images show what they say; subclasses are hashable."""

    def sets(self, split: str) -> dict[str, list[str]]:
        """Return the prompts of a split ("validation" or "test"), by the name of the prompt set."""

    def align(
        self, images: Float[np.ndarray, "n h w c"], texts: Sequence[str]
    ) -> dict[str, Bool[np.ndarray, "n"]]:
        """Return, by the name of a criterion, True for each image that shows what its text says.

        Args:
          images: Images [N, H, W, C] in [-1, 1].
          texts: The N texts of the images.
        """


@dataclasses.dataclass(frozen=True)
class NoPrompts:
    """No prompts and no criteria, for data sets whose images cannot be checked."""

    def sets(self, split: str) -> dict[str, list[str]]:
        """Return an empty dictionary: there are no prompt sets."""
        del split
        return {}

    def align(
        self, images: Float[np.ndarray, "n h w c"], texts: Sequence[str]
    ) -> dict[str, Bool[np.ndarray, "n"]]:
        """Return an empty dictionary: there are no criteria."""
        del images, texts
        return {}


@dataclasses.dataclass(frozen=True)
class ShapePrompts:
    """Prompts of the data set `shapes`, whose images `metrics.alignment` checks by their pixels.

    Attributes:
      count: The number of prompts in each prompt set.
    """

    count: int

    def sets(self, split: str) -> dict[str, list[str]]:
        """Return the prompts of a split ("validation" or "test"), by the name of the prompt set."""
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
        """Return whether each image shows what its caption states, bool [N], by two criteria.

        The dictionary has the keys "aligned", and "aligned_except_size_and_background", which
        ignores the sizes of shapes and the background.

        Args:
          images: Images [N, H, W, C] in [-1, 1].
          texts: The N captions of the images, in the form of the data set.
        """
        results = [check_caption(x, text) for x, text in zip(images, texts, strict=True)]
        names = ("aligned", "aligned_except_size_and_background")
        return {name: np.array([getattr(r, name) for r in results], bool) for name in names}


def prompts_of(data: str, count: int) -> Prompts:
    """Return the prompts of the data set with the name `data`, `count` in each prompt set."""
    return ShapePrompts(count) if shapes.is_shapes(data) else NoPrompts()
