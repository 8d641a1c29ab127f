"""A VAE with a two-dimensional latent on the 8x8 digits that scikit-learn carries: seconds.

    python launch.py --experiment=vae_digits

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2) in 16 s, on the 360 test digits: -ELBO
25.55 +- 0.91 nats (a density on [-1, 1]^64), 3.66 bits/dim of 17 grey levels (log2 17 =
4.09), importance-weighted bound (k = 1,000) 22.25 +- 0.70, both latents active.

The number of steps was chosen on the 143 validation digits, which training leaves out of its
1,437 (the other 1,294 are trained on).  -ELBO, validation: 38.3, 34.0, 28.9, 25.7, 24.9 and 25.8
after 300, 500, 750, 1,000, 1,500 and 2,000 steps, the last three +- 1.3, 2.1 and 2.5: from 1,000
steps on it does not change by more than its error.
"""

import dataclasses
from typing import Literal

from ddpm_jax.fields import Count, Interval, Length, NonNegative
from experiments import vae_mnist

DEBUG = vae_mnist.DEBUG


@dataclasses.dataclass(frozen=True)
class Config(vae_mnist.Config):
    """See `python launch.py --experiment=vae_digits --help`."""

    data: str = "digits"
    steps: Length = 1000
    batch_size: Count = 128
    ema_half_life: NonNegative = 20_000.0
    eval_every: Interval = 250
    checkpoint_every: Interval = 250
    latents: Count = 2  # so that the plane can be drawn
    hidden: tuple[Count, ...] = (256, 256)
    likelihood: Literal["bernoulli", "gaussian", "gaussian_learned"] = "gaussian_learned"


build = vae_mnist.build
