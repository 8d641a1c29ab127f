"""Improved DDPM on CIFAR-10 (Nichol & Dhariwal 2021): cosine betas, learned variances.

    python launch.py --experiment=iddpm_cifar10

T = 4,000, L_hybrid (0.001 L_vlb beside L_simple), Adam 1e-4, 500,000 steps, dropout 0.3, time
as scale and shift, heads of 64 channels at 16x16 and 8x8.  With `--config.times=importance
--config.bound_scale=1000` the bound itself is what is trained, nearly.

Not trained by us: no GPU was at hand.  Published: 3.17 bits/dim and FID 3.19 of L_hybrid.
"""

import dataclasses
from typing import Annotated, Literal

from ddpm_jax.fields import MAY_CHANGE, AtLeast, Count, Layers, Length, NoiseSteps, Positive, Share
from experiments import ddpm_cifar10, ddpm_digits

DEBUG = ddpm_cifar10.DEBUG | dict(noise_steps=50, head_channels=4)
prepare, pretrain, build = ddpm_cifar10.prepare, ddpm_cifar10.pretrain, ddpm_cifar10.build


@dataclasses.dataclass(frozen=True)
class Config(ddpm_cifar10.Config):
    """See `python launch.py --experiment=iddpm_cifar10 --help`."""

    steps: Length = 500_000
    learning_rate: Positive = 1e-4
    warmup: Annotated[int, AtLeast(0)] = 0
    blocks: Layers = 3
    attention_sizes: tuple[Count, ...] = (16, 8)
    head_channels: Annotated[int, AtLeast(0)] = 64
    scale_shift: bool = True
    dropout: Share = 0.3
    noise: ddpm_digits.Noise = "cosine_betas"
    noise_steps: NoiseSteps = 4000
    variance: Literal["posterior", "beta", "learned"] = "learned"
    sampler: Annotated[str, MAY_CHANGE] = "ancestral_learned"
