"""Variational diffusion on the 8x8 digits: continuous time, a learned schedule, exact bits.

python launch.py --experiment=vdm_digits
"""

import dataclasses

from ddpm_jax.config import Count, Length, NonNegative, Positive
from ddpm_jax.drawing import Sampling
from ddpm_jax.judge import load_judge
from ddpm_jax.tasks import Task
from ddpm_jax.vdm import vdm_task
from experiments import classifier_digits as classifier
from experiments import ddpm_digits

DEBUG = ddpm_digits.DEBUG | dict(ode_images=8, eval_batch=8, sample_steps=2)


@dataclasses.dataclass(frozen=True)
class Config(ddpm_digits.Config):
    """See `--help`; `noise`, `prediction`, `weight` and `label_dropout` are not used."""

    steps: Length = 1000
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 0.01
    conditional: bool = False
    highest: float = 8.0  # logsnr at t = 0 and 1 that the schedule starts from
    lowest: float = -6.0
    guidance: float = 1.0
    eval_times: Count = 32
    ode_images: Length = 120


prepare = ddpm_digits.prepare


def build(config: Config) -> Task:
    """The task that this experiment trains."""
    return vdm_task(
        ddpm_digits.network(config),
        config.shape,
        config.levels,
        ends=(config.highest, config.lowest),
        sampling=Sampling(config.sampler, config.sample_steps, config.spacing, config.guidance),
        batch_size=config.batch_size,
        eval_batch=config.eval_batch,
        eval_times=config.eval_times,
        ode_images=config.ode_images,
        judge=None
        if config.judge in ("auto", "none")
        else lambda: load_judge(classifier, config.judge),
        judged=config.draw,
    )
