"""What images are compared in: the features of a trained network."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class FeatureNetwork(NamedTuple):
    """A trained network in whose features images are compared.

    Attributes:
      name: What a distance in its features is called after.
      extract: Maps images [N, H, W, C] in [-1, 1] to features [N, D] and log p(y|x) [N, classes].
      about: Which network it is.
    """

    name: str
    extract: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    about: str = ""
