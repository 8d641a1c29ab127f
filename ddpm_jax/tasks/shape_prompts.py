"""Prompts of the set `shapes`, and whether images show what they say, by the exact judge."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpm_jax.data import shapes
from ddpm_jax.metrics.alignment import judge
from ddpm_jax.tasks.text_to_image import Prompts

KINDS = ("single", "single held out", "relation", "relation held out")  # of `shapes.scene`


def aligned(images: Any, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Return whether each image shows what its caption says, and but for size and background.

    Args:
      images: [N, H, W, C] in [-1, 1].
      captions: N captions.

    Returns:
      By the name of the criterion, a verdict [N] of bool.
    """
    verdicts = [judge(x, text) for x, text in zip(images, captions, strict=True)]
    names = ("aligned", "aligned_except_size_and_background")
    return {name: np.array([getattr(v, name) for v in verdicts]) for name in names}


def prompt_sets(count: int, split: str) -> dict[str, list[str]]:
    """Return `count` prompts of each kind for a split."""
    return {
        kind.replace(" ", "_"): [
            shapes.scene(f"{split} prompts", i, kind).caption for i in range(count)
        ]
        for kind in KINDS
    }


def prompts_of(data: str, num_prompts: int, scales: tuple[float, ...], num_samples: int) -> Prompts:
    """Return the prompts of an evaluation; those of `shapes` alone have an exact judge.

    Args:
      data: name of the data set.
      num_prompts: prompts of each kind.
      scales: of guidance, all of which are tried.
      num_samples: samples of the test split's captions.
    """
    if not shapes.is_named(data):
        return Prompts(scales=scales, draw=num_samples)
    return Prompts(functools.partial(prompt_sets, num_prompts), aligned, scales, num_samples)
