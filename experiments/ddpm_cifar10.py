"""Ho et al. 2020 on CIFAR-10, to the letter of their appendix B; for a GPU or a TPU.

    python launch.py --experiment=ddpm_cifar10

The 35.7 M-parameter U-Net; linear betas, T = 1,000; eps; Adam 2e-4 after 5,000 steps of
warm-up, gradients clipped at 1; batch 128; EMA of decay 0.9999 (a half-life of 887,000
images); dropout 0.1; half of the images mirrored; 800,000 steps; the ancestral sampler of
variance beta.

Not trained by us: no GPU was at hand.  Published: FID 3.17 against the training set's
statistics, at most 3.75 bits/dim.
"""

import dataclasses
import math
from typing import Annotated, Literal

from ddpm_jax.diffusion.schedules import Spacing
from ddpm_jax.fields import (
    MAY_CHANGE,
    AtLeast,
    Count,
    EvalTimes,
    Interval,
    Length,
    NonNegative,
    Positive,
    SampleSteps,
)
from experiments import classifier_cifar10, ddpm_digits

DEBUG = ddpm_digits.DEBUG | dict(fold=4, eval_batch=64)  # 8x8 inside: attention over 32x32 is slow
prepare, pretrain, build = ddpm_digits.judged_by(classifier_cifar10)


@dataclasses.dataclass(frozen=True)
class Config(ddpm_digits.Config):
    """See `python launch.py --experiment=ddpm_cifar10 --help`."""

    data: str = "cifar10"
    steps: Length = 800_000
    batch_size: Count = 128
    learning_rate: Positive = 2e-4
    warmup: Annotated[int, AtLeast(0)] = 5000
    decay: Literal["none", "cosine"] = "none"
    ema_half_life: NonNegative = 128 * math.log(0.5) / math.log(0.9999)
    eval_every: Interval = 20_000
    checkpoint_every: Interval = 5000
    channels: Count = 128
    multipliers: tuple[Count, ...] = (1, 2, 2, 2)
    attention_sizes: tuple[Count, ...] = (16,)
    conditional: bool = False
    noise: ddpm_digits.Noise = "linear_betas"
    prediction: Literal["eps", "x0", "v"] = "eps"
    flip: bool = True
    sampler: Annotated[str, MAY_CHANGE] = "ancestral_beta"
    sample_steps: SampleSteps = 1000
    spacing: Annotated[Spacing, MAY_CHANGE] = "trailing"
    guidance: Annotated[float, MAY_CHANGE] = 1.0
    eval_batch: Count = 500
    eval_times: EvalTimes = 4
    draw: Length = 50_000
    draw_between: Interval = 2000
    fid: Annotated[bool, MAY_CHANGE] = True
