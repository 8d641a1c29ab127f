"""The type of a trained network in whose features sets of images are compared."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class FeatureNetwork(NamedTuple):
    """A trained network in whose features sets of images are compared.

    Attributes:
      name: The part of a metric's name that stands for the network, as in `fd_NAME`.
      extract: Maps images [N, H, W, C] in [-1, 1] to features [N, D] and log p(y|x) [N, classes].
      about: A description of the network for the records of a run.
    """

    name: str
    extract: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    about: str = ""
