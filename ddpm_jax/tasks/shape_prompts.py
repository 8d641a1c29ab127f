"""The prompts of an evaluation, and whether images show what they say."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from ddpm_jax.data import shapes
from ddpm_jax.metrics.alignment import check_caption

KINDS = ("single", "single held out", "relation", "relation held out")  # of `shapes.scene`


@runtime_checkable
class Prompts(Protocol):
    """Sets of prompts, and what says whether images show them: a hashable value."""

    def sets(self, split: str) -> dict[str, list[str]]:
        """Return the prompts of a split by the names of their sets."""

    def align(
        self, images: Float[np.ndarray, "n h w c"], texts: Sequence[str]
    ) -> dict[str, Bool[np.ndarray, "n"]]:
        """Return whether each image shows what its text says, by the names of the criteria.

        Args:
          images: in [-1, 1].
          texts: one for every image.
        """


@dataclasses.dataclass(frozen=True)
class NoPrompts:
    """No prompts, of a data set whose images no criterion compares with a text."""

    def sets(self, split: str) -> dict[str, list[str]]:
        """Return no sets."""
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
    """Prompts of the data set `shapes`, whose images are read exactly (`metrics.alignment`).

    Attributes:
      count: Prompts of each kind.
    """

    count: int

    def sets(self, split: str) -> dict[str, list[str]]:
        """Return prompts of each kind for a split."""
        return {
            kind.replace(" ", "_"): [
                shapes.scene(f"{split} prompts", number, kind).caption
                for number in range(self.count)
            ]
            for kind in KINDS
        }

    def align(
        self, images: Float[np.ndarray, "n h w c"], texts: Sequence[str]
    ) -> dict[str, Bool[np.ndarray, "n"]]:
        """Return whether each image shows what its caption says, and but for size and background.

        Args:
          images: in [-1, 1].
          texts: captions of the data set, one for every image.
        """
        verdicts = [check_caption(x, text) for x, text in zip(images, texts, strict=True)]
        names = ("aligned", "aligned_except_size_and_background")
        return {name: np.array([getattr(v, name) for v in verdicts], bool) for name in names}


def prompts_of(data: str, count: int) -> Prompts:
    """Return the prompts of a data set by its name, `count` of each kind."""
    return ShapePrompts(count) if shapes.is_named(data) else NoPrompts()
