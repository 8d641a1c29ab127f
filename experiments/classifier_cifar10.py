"""A small convolutional classifier of CIFAR-10: it judges what other models draw.

    python launch.py --experiment=classifier_cifar10

Not trained to its end yet: no figures.
"""

import dataclasses
from typing import Annotated

from ddpm_jax.fields import AtLeast, Count, Length
from experiments import classifier_mnist

DEBUG = classifier_mnist.DEBUG
network, dress, build = classifier_mnist.network, classifier_mnist.dress, classifier_mnist.build


@dataclasses.dataclass(frozen=True)
class Config(classifier_mnist.Config):
    """See `python launch.py --experiment=classifier_cifar10 --help`."""

    data: str = "cifar10"
    steps: Length = 8000
    channels: tuple[Count, ...] = (64, 128, 128, 128)
    features: Count = 128
    shift: Annotated[int, AtLeast(0)] = 4
