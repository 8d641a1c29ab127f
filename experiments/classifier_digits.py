"""A small convolutional classifier of the 8x8 digits: it judges what other models draw.

    python launch.py --experiment=classifier_digits

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2): 99.4 +- 0.4 % of the 360 test digits, trained on
1,294 (143 more are the validation split), in 22 s on an idle machine.

    python launch.py --experiment=classifier_digits --config.noise=cosine --workdir=runs/noisy

trains on x_t and t under a cosine schedule, to guide diffusion models (`ddpm_digits` has the
figures).  Accuracy, seed 0, of t from 0 to 0.1, 0.1 to 0.2, ... (measured at commit 4aefa19,
trained on 1,437 digits): 98.1, 97.2, 95.3, 91.4, 75.3, 57.5, 43.9, 30.8, 18.1, 8.9 %.
"""

import dataclasses
from typing import Annotated, Literal

from ddpm_jax.config import Training, inside
from ddpm_jax.data.types import Data
from ddpm_jax.diffusion.schedules import cosine
from ddpm_jax.fields import AtLeast, Classes, Count, Interval, Length, NonNegative, Share
from ddpm_jax.nn.classifier import Classifier
from ddpm_jax.task import Task
from ddpm_jax.tasks.classifier import classifier_task, labelled

DEBUG = dict(steps=6, eval_every=4, checkpoint_every=4, log_every=2, batch_size=16, channels=(8,))


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """See `python launch.py --experiment=classifier_digits --help`."""

    steps: Length = 600
    batch_size: Count = 128
    decay: Literal["none", "cosine"] = "cosine"
    weight_decay: NonNegative = 0.01
    ema_half_life: NonNegative = 10_000.0
    eval_every: Interval = 200
    checkpoint_every: Interval = 200
    classes: Classes = 10
    channels: tuple[Count, ...] = (32, 64, 64)
    features: Count = 64
    dropout: Share = 0.3
    shift: Annotated[int, AtLeast(0)] = 1  # pixels that training images are moved by
    noise: Literal["none", "cosine"] = "none"  # that images get: of a diffusion model's guide
    eval_batch: Count = 360


def network(config: Config) -> Classifier:
    """The network alone, as a judge uses it."""
    noisy = config.noise != "none"
    return Classifier(
        config.classes,
        config.channels,
        config.features,
        config.dropout,
        noisy,
        inside(config.precision),
    )


def dress(config: Config, data: Data) -> Data:
    """The data without the images that have no class."""
    del config
    return labelled(data)


def build(config: Config) -> Task:
    """The task that this experiment trains."""
    return classifier_task(
        network(config),
        config.shape,
        config.levels,
        shift=config.shift,
        schedule=cosine() if config.noise == "cosine" else None,
        eval_batch=config.eval_batch,
    )
