"""A VAE with a two-dimensional latent on the 8x8 digits that scikit-learn carries: seconds.

    python launch.py --experiment=vae_digits

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2) in 16 s, on the 360 held-out digits: -ELBO
24.83 +- 0.78 nats (a density on [-1, 1]^64), 3.65 bits/dim of 17 grey levels (log2 17 =
4.09), importance-weighted bound (k = 1,000) 21.82 +- 0.62, both latents active.  1,437
images are few: after about 1,000 steps it overfits (2,000 steps: -ELBO 25.5).
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
    steps: Length = 1000
    batch_size: Count = 128
    ema_half_life: NonNegative = 20_000.0
    eval_every: Interval = 250
    checkpoint_every: Interval = 250
    latents: Count = 2  # so that the plane can be drawn
    hidden: tuple[Count, ...] = (256, 256)
    likelihood: Literal["bernoulli", "gaussian", "gaussian_learned"] = "gaussian_learned"


build = vae_mnist.build
