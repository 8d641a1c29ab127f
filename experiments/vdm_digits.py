"""Variational diffusion on the 8x8 digits: continuous time, a learned schedule, exact bits.

    python launch.py --experiment=vdm_digits

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2), seed 0: 1,000 steps on 1,294 digits (143 more are
the validation split), 13 min with its evaluation beside two other heavy programs (6 min on an idle
machine, with a fifth of the solver's evaluations).  Bits per dimension of the 360 test digits (17
grey levels, log2 17 = 4.09), by three routes that share prior and decoder:

    continuous bound     2.183 +- 0.014
    discrete, T = 1,000  2.195 +- 0.014
    ODE (of 120 digits)  2.191 +- 0.027   dequantised by q(z_0 | x_0); 582 evaluations a batch

The solver's error, the mean change from ten times its tolerance of 1e-5, is at most 0.005.

`ddpm_digits`, which is trained on another weight, is at 3.25 +- 0.20, and `vae_digits` at
3.66 +- 0.02.  What the bound buys in bits it costs in looks: sampled without classes, the Frechet
distance (classifier_digits) is 20.1 +- 2.3, 3.6 +- 1.3 times that of training images.
"""

import dataclasses
from typing import Annotated

from ddpm_jax.experiment.guidance_models import guide_of
from ddpm_jax.fields import MAY_CHANGE, EvalTimes, Length, NonNegative, Positive
from ddpm_jax.task import Task
from ddpm_jax.tasks.vdm import vdm_task
from experiments import classifier_digits, ddpm_digits

DEBUG = ddpm_digits.DEBUG | dict(
    ode_images=4,
    eval_batch=4,
    sample_steps=2,
    network="dit",
    patch=4,
    width=32,
    depth=2,
)  # the solver calls the network in many places, and a DiT compiles sooner


@dataclasses.dataclass(frozen=True)
class Config(ddpm_digits.Denoiser):
    """See `python launch.py --experiment=vdm_digits --help`."""

    steps: Length = 1000
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 0.01
    conditional: bool = False
    highest: float = 8.0  # logsnr at t = 0 and 1 that the schedule starts from
    lowest: float = -6.0
    guidance: Annotated[float, MAY_CHANGE] = 1.0
    eval_times: EvalTimes = 32
    ode_images: Length = 120


prepare, pretrain = ddpm_digits.prepare, ddpm_digits.pretrain


def build(config: Config) -> Task:
    """The task that this experiment trains."""
    return vdm_task(
        ddpm_digits.network(config),
        config.shape,
        config.levels,
        ends=(config.highest, config.lowest),
        sampling=ddpm_digits.sampling(config),
        batch_size=config.batch_size,
        eval_batch=config.eval_batch,
        eval_times=config.eval_times,
        ode_images=config.ode_images,
        judging=ddpm_digits.judging(classifier_digits, config),
        guide=guide_of(classifier_digits, config),
    )
