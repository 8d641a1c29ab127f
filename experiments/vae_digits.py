"""A VAE with a two-dimensional latent on the 8x8 digits that scikit-learn carries: seconds.

    python launch.py --experiment=vae_digits

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2) in 24 s, on the 360 held-out digits: -ELBO
24.46 +- 1.09 nats (a density on [-1, 1]^64), 3.64 bits/dim of 17 grey levels (log2 17 =
4.09), importance-weighted bound (k = 1,000) 21.07 +- 0.84, both latents active.  1,437
images are few: from 2,000 steps on it overfits (4,000 steps: -ELBO 29.5).
"""

import dataclasses
from typing import Literal

from ddpm_jax.config import Count, Interval, Length, NonNegative
from experiments import vae_mnist

DEBUG = vae_mnist.DEBUG


@dataclasses.dataclass(frozen=True)
class Config(vae_mnist.Config):
    """See `python launch.py --experiment=vae_digits --help`."""

    data: str = "digits"
    steps: Length = 2000
    batch_size: Count = 128
    ema_half_life: NonNegative = 20_000.0
    eval_every: Interval = 500
    checkpoint_every: Interval = 1000
    latents: Count = 2  # so that the plane can be drawn
    hidden: tuple[Count, ...] = (256, 256)
    likelihood: Literal["bernoulli", "gaussian", "gaussian_learned"] = "gaussian_learned"


build = vae_mnist.build
