"""Class-conditional denoising diffusion on MNIST, with guidance, for two CPU cores.

python launch.py --experiment=ddpm_mnist
"""

import dataclasses

from ddpm_jax.config import Count, Interval, Length, NonNegative, Positive, Share
from ddpm_jax.judge import load_judge, with_judge
from ddpm_jax.run import Loaded, Options
from ddpm_jax.tasks import Task
from experiments import classifier_mnist as classifier
from experiments import ddpm_digits

FALLBACK = "digits:28"  # where MNIST cannot be had
DEBUG = ddpm_digits.DEBUG


@dataclasses.dataclass(frozen=True)
class Config(ddpm_digits.Config):
    """See `python launch.py --experiment=ddpm_mnist --help`."""

    data: str = "mnist"
    steps: Length = 5000
    batch_size: Count = 64
    learning_rate: Positive = 2e-3
    ema_half_life: NonNegative = 50_000.0
    checkpoint_every: Interval = 500
    fold: Count = 2
    attention_sizes: tuple[Count, ...] = (7,)
    dropout: Share = 0.0
    eval_batch: Count = 200
    eval_times: Count = 4
    draw: Length = 2000


def prepare(config: Config, loaded: Loaded, options: Options) -> Config | None:
    """A classifier of the same data, trained once, judges what is drawn."""
    return with_judge(classifier, config, loaded, options)


def build(config: Config) -> Task:
    """The task that this experiment trains."""
    return ddpm_digits.task(config, lambda: load_judge(classifier, config.judge))
