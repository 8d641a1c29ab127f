"""The type of a feature network, with which metrics compare sets of images."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class FeatureNetwork(NamedTuple):
    """A trained network, such as Inception, whose features of two sets of images are compared.

    Attributes:
      name: Name of the network in the names of metrics, as in "fd_NAME".
      extract: Maps images [N, H, W, C] in [-1, 1] to features [N, D] and log p(y|x) [N, classes].
      about: Description of the network that is written to the run directory.
    """

    name: str
    extract: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    about: str = ""
