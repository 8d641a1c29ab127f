"""Class-conditional denoising diffusion on Fashion-MNIST: `ddpm_mnist` with other images.

    python launch.py --experiment=ddpm_fashion_mnist

Not trained to its end yet: no figures.
"""

import dataclasses

from experiments import classifier_fashion_mnist, ddpm_digits, ddpm_mnist

DEBUG = ddpm_mnist.DEBUG
prepare, pretrain, build = ddpm_digits.judged_by(classifier_fashion_mnist)


@dataclasses.dataclass(frozen=True)
class Config(ddpm_mnist.Config):
    """See `python launch.py --experiment=ddpm_fashion_mnist --help`."""

    data: str = "fashion_mnist"
