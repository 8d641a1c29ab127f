"""Class-conditional denoising diffusion on Fashion-MNIST: `ddpm_mnist` with other images.

    python launch.py --experiment=ddpm_fashion_mnist

Not trained to its end yet: no figures.
"""

import dataclasses

from ddpm_jax.judge import load_judge, with_judge
from ddpm_jax.run import Loaded, Options
from ddpm_jax.tasks import Task
from experiments import classifier_fashion_mnist as classifier
from experiments import ddpm_digits, ddpm_mnist

DEBUG = ddpm_mnist.DEBUG


@dataclasses.dataclass(frozen=True)
class Config(ddpm_mnist.Config):
    """See `python launch.py --experiment=ddpm_fashion_mnist --help`."""

    data: str = "fashion_mnist"


def prepare(config: Config, loaded: Loaded, options: Options) -> Config | None:
    """A classifier of the same data, trained once, judges what is drawn."""
    return with_judge(classifier, config, loaded, options)


def build(config: Config) -> Task:
    """The task that this experiment trains."""
    return ddpm_digits.task(config, lambda: load_judge(classifier, config.judge))
