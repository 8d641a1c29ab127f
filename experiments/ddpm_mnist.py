"""Class-conditional denoising diffusion on MNIST, with guidance, for two CPU cores.

    python launch.py --experiment=ddpm_mnist

`ddpm_digits`'s U-Net (1.0 M parameters) behind a folding of 2x2 pixels, trained on the error of v,
5,000 steps of 64 images.  Measured on 2 CPU cores (AMD EPYC, jax 0.10.2), seed 0, with 5,000
validation images; figures of MNIST's 10,000 test images, +- one standard error.  2,000 images,
DPM-Solver++(2M) in 20 steps, guidance 1.2:

    recognised by classifier_mnist                                   98.15 +- 0.30 %
    Frechet distance to the test images, of its features             1.87 +- 0.33
    over that of as many training images, 1.03 +- 0.30               1.82 +- 0.63
    median distance to the nearest training image, over that of
    test images                                                      1.073 +- 0.007
    precision, recall                                                0.80 +- 0.01, 0.83 +- 0.01
    bits/dim (256 levels, variance beta)                             2.156 +- 0.049

The training took 88 min on one of the two cores, beside another training on the other one.  From
nothing and alone on both cores it took 32 min 53 s at commit 4aefa19, which trained on all 60,000
images: 3.2 steps/s, the classifier 67 s of it and the evaluation 3 minutes.  Figures of that
commit, for which every choice was made on the test split, of the error of v and, of an earlier run,
of eps (`--config.weight=simple`):

                                                                     v       eps
    recognised by classifier_mnist                                   98.5    97.0 %
    Frechet distance                                                 1.71    1.70
    over that of as many training images, 1.30                       1.31    1.31
    nearest training image                                           1.07    1.13
    bits/dim (+- 0.05)                                               2.17    2.12

One run each; v was chosen on the digits, guidance 1.2 is `ddpm_digits`'s.  Few evaluations beside
many, at that commit, too: 1,000 images each of the same run trained again on one core (61 min;
98.6 % recognised and a ratio of 1.26: sums in another order), against the test images (as many
training images: 2.67, more because 1,000 are fewer):

    DPM-Solver++(2M), 15 steps, trailing spacing    1.96    98.5 % recognised
    DPM-Solver++(2M), 15 steps, logsnr spacing      2.26    98.8 %
    ancestral, 250 steps, trailing spacing          2.09    98.0 %

(one draw of each; the bootstrap's deviation over images is some 0.5, so that 15 evaluations are
within 10 %, in either spacing, and not shown to be better).

    python launch.py --mode=eval --workdir=runs/ddpm_mnist --config.draw=1000
        --config.sampler=ancestral --config.sample_steps=250 --config.spacing=trailing
"""

import dataclasses

from ddpm_jax.fields import Count, EvalTimes, Interval, Length, NonNegative, Positive, Share
from experiments import classifier_mnist, ddpm_digits

FALLBACK = "digits:28"  # where MNIST cannot be had
DEBUG = ddpm_digits.DEBUG
prepare, pretrain, build = ddpm_digits.judged_by(classifier_mnist)


@dataclasses.dataclass(frozen=True)
class Config(ddpm_digits.Config):
    """See `python launch.py --experiment=ddpm_mnist --help`."""

    data: str = "mnist"
    steps: Length = 5000
    batch_size: Count = 64
    learning_rate: Positive = 2e-3
    ema_half_life: NonNegative = 50_000.0
    eval_every: Interval = 1000
    checkpoint_every: Interval = 500
    weight: ddpm_digits.Weight = "v"
    fold: Count = 2
    attention_sizes: tuple[Count, ...] = (7,)
    dropout: Share = 0.0
    eval_batch: Count = 200
    eval_times: EvalTimes = 4
    draw: Length = 2000
