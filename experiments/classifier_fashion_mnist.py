"""A small convolutional classifier of Fashion-MNIST: it judges what other models draw.

    python launch.py --experiment=classifier_fashion_mnist

Not trained to its end yet: no figures.
"""

import dataclasses

from experiments import classifier_mnist

DEBUG = classifier_mnist.DEBUG
network, dress, build = classifier_mnist.network, classifier_mnist.dress, classifier_mnist.build


@dataclasses.dataclass(frozen=True)
class Config(classifier_mnist.Config):
    """See `python launch.py --experiment=classifier_fashion_mnist --help`."""

    data: str = "fashion_mnist"
