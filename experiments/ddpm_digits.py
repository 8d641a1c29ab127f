"""Class-conditional denoising diffusion on the 8x8 digits that scikit-learn carries.

    python launch.py --experiment=ddpm_digits

A U-Net of 1.0 M parameters that predicts v under cosine betas; 800 steps of 64 images; DPM-
Solver++(2M) in 20 steps with guidance 1.2.  Measured on 2 CPU cores (AMD EPYC, jax 0.10.2),
seed 0, trained on 1,294 digits (143 more are the validation split); 1,437 samples against the 360
test digits, in the features of a classifier that is trained once (22 s of some 3 minutes in all on
an idle machine; 8 min 45 s beside three other heavy programs):

    recognised by classifier_digits                                  97.8 +- 0.4 %
    Frechet distance, classifier_digits                              6.0 +- 1.5
    the same of 1,294 training images                                5.7 +- 2.1 (ratio 1.13 +- 0.30)
    precision, recall                                                0.880 +- 0.009, 0.808 +- 0.021
    median distance to the nearest training image, over that of
    test images                                                      1.069 +- 0.017

Guidance trades one for another.  It was chosen on the validation split (`--mode=eval
--split=validation --config.guidance=1.5`), one run:

    guidance            1.0             1.2             1.5             2.0
    recognised          95.4 +- 0.6     97.8 +- 0.4     99.7 +- 0.1     100 %
    ratio of distances  1.22 +- 0.23    1.09 +- 0.20    1.15 +- 0.23    1.49 +- 0.36
    nearest             1.08 +- 0.03    1.03 +- 0.03    0.99 +- 0.03    0.96 +- 0.03

1.2 has the smallest ratio and does not lie nearer to training images than validation images do.

The figures below were measured before there was a validation split, at commit 4aefa19: trained on
1,437 digits, on the test split.

Another run may guide (`ddpm_jax/experiment/guidance_models.py`).  1,437 images, seed 0, one run
each, measured on 2 CPU cores (AMD EPYC, jax 0.10.2), with other work on them (so no times):

                                      scale   recognised   ratio   nearest
    by its labels                     1.0     94.8 %       1.00    1.13     (no guidance)
                                      1.2     98.4         0.98    1.07     (the default)
    by a worse run: autoguidance      1.5     98.0         1.05    1.06
                                      2.0     99.0         1.57    1.05
                                      3.0     99.2         2.47    1.09
    unconditional                     0.0      9.8         2.30    1.25     (no guidance)
    unconditional, by a classifier    1.0     44.7         4.74    1.40
                                      2.0     74.9         3.38    1.40
                                      4.0     92.8         2.62    1.40
                                      8.0     98.2         2.89    1.42

Scale 1, Bayes' rule if both networks were exact, is too little for a trained classifier, as
Dhariwal & Nichol saw on ImageNet (sec. 4.3); 60 or 250 steps, DDIM, the ancestral sampler and
intervals from logsnr -8 or -5 on leave it at 43 to 54 % and ratios of 4.4 to 4.9 (500 images).
The worse run has 16 channels and 200 steps: 66.9 % recognised and a ratio of 10.5 by itself.  The
commands, each scale in its turn:

    python launch.py --experiment=ddpm_digits --config.channels=16 --config.steps=200
        --config.guidance=1 --workdir=runs/worse
    python launch.py --mode=eval --workdir=runs/ddpm_digits --config.guide=runs/worse
        --config.guidance=1.5
    python launch.py --experiment=classifier_digits --config.noise=cosine --workdir=runs/noisy
    python launch.py --experiment=ddpm_digits --config.conditional=false
        --config.guide=runs/noisy --config.guidance=1 --workdir=runs/unconditional
    python launch.py --mode=eval --workdir=runs/unconditional --config.guidance=4
"""

import dataclasses
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax.numpy as jnp

from ddpm_jax.config import Training
from ddpm_jax.data.types import Loaded
from ddpm_jax.diffusion import losses, schedules
from ddpm_jax.diffusion.schedules import Spacing
from ddpm_jax.errors import UserError
from ddpm_jax.experiment.feature_networks import check_judge, judges_of, with_judge
from ddpm_jax.experiment.guidance_models import guide_of, with_guide
from ddpm_jax.experiment.inputs import Options
from ddpm_jax.fields import (  # fmt: skip
    MAY_CHANGE,
    AtLeast,
    AtMost,
    Classes,
    Count,
    EvalTimes,
    Interval,
    Layers,
    Length,
    NoiseSteps,
    NonNegative,
    Positive,
    RunPath,
    SampleSteps,
    Share,
)
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.unet import UNet
from ddpm_jax.task import Guide, Task
from ddpm_jax.tasks.diffusion import Times, diffusion_task
from ddpm_jax.tasks.image_sampler import Limit, Sampling
from ddpm_jax.tasks.sample_figures import Judging
from experiments import classifier_digits

DEBUG = dict(
    steps=6, eval_every=4, checkpoint_every=4, log_every=2, channels=8, blocks=1, multipliers=(1,),
    sample_steps=4, batch_size=16, eval_times=2, draw=40, judge="none",
)  # fmt: skip


Noise = Literal["linear_betas", "cosine_betas", "linear", "cosine", "sigmoid", "edm"]
Weight = Literal["simple", "v", "min_snr", "sigmoid", "edm"]


@dataclasses.dataclass(frozen=True)
class Denoiser(Training):
    """Fields of every experiment that trains a denoiser: its network, sampling and evaluation."""

    data: str = "digits"
    steps: Length = 800
    batch_size: Count = 64
    learning_rate: Positive = 2e-3
    warmup: Annotated[int, AtLeast(0)] = 100
    decay: Literal["none", "cosine"] = "cosine"
    clip: NonNegative = 1.0
    ema_half_life: NonNegative = 20_000.0
    eval_every: Interval = 400
    checkpoint_every: Interval = 250
    classes: Classes = 10
    network: Literal["unet", "dit"] = "unet"
    # The U-Net.
    fold: Count = 1
    channels: Count = 32
    multipliers: tuple[Count, ...] = (1, 2)
    blocks: Layers = 2
    attention_sizes: tuple[Count, ...] = (4,)
    head_channels: Annotated[int, AtLeast(0)] = 0
    scale_shift: bool = False
    # The DiT.
    patch: Count = 2
    width: Count = 128
    depth: Layers = 6
    heads: Count = 4
    # Either.
    dropout: Share = 0.1
    remat: bool = False  # blocks are computed again in the backward pass
    conditional: bool = True
    # Sampling and evaluation, which may change from one evaluation to the next.
    sampler: Annotated[str, MAY_CHANGE] = "dpmpp_2m"
    sample_steps: SampleSteps = 20
    spacing: Annotated[Spacing, MAY_CHANGE] = "logsnr"
    guidance: Annotated[float, MAY_CHANGE] = 1.2
    guide: RunPath = "labels"  # or a run's directory; see `ddpm_jax/experiment/guidance_models.py`
    guidance_interval: Annotated[tuple[float, float], MAY_CHANGE] = Sampling().interval
    guidance_rescale: Annotated[float, AtLeast(0.0), AtMost(1.0), MAY_CHANGE] = 0.0
    limit: Annotated[Limit, MAY_CHANGE] = "clip"  # of x0
    eval_batch: Count = 120
    eval_times: EvalTimes = 16
    draw: Length = 1437  # images that the final figures are of
    draw_between: Interval = 0  # the same of every evaluation before; 0: none
    judge: RunPath = "auto"  # a trained classifier's run; auto, none
    fid: Annotated[bool, MAY_CHANGE] = False  # in Inception's features, whose file the user has


@dataclasses.dataclass(frozen=True)
class Config(Denoiser):
    """See `python launch.py --experiment=ddpm_digits --help`."""

    # The process.
    noise: Noise = "cosine_betas"
    noise_steps: NoiseSteps = 1000  # T of a table of betas; linear ones need 21
    prediction: Literal["eps", "x0", "v"] = "v"
    variance: Literal["posterior", "beta", "learned"] = "beta"  # of p(x_s | x_t); in the bound
    bound_scale: NonNegative = 1e-3  # of L_vlb beside L_simple, with a learned variance
    times: Times = "stratified"
    weight: Weight = "simple"
    label_dropout: Annotated[float, AtLeast(0.0), AtMost(1.0)] = 0.1
    flip: bool = False


SCHEDULES = {
    "linear_betas": lambda steps: schedules.from_betas(schedules.linear_betas(steps)),
    "cosine_betas": lambda steps: schedules.from_betas(schedules.cosine_betas(steps)),
    "linear": lambda steps: schedules.linear(),
    "cosine": lambda steps: schedules.cosine(),
    "sigmoid": lambda steps: schedules.sigmoid(),
    "edm": lambda steps: schedules.edm(),
}


def noise_schedule(config: Any) -> schedules.Schedule:
    """The noise schedule that the config chooses.

    Raises:
      UserError: it cannot have that many steps.
    """
    try:
        return SCHEDULES[config.noise](config.noise_steps)
    except ValueError as error:
        raise UserError(f"--config.noise_steps={config.noise_steps}: {error}") from None


WEIGHTS = {
    "simple": losses.one,
    "v": losses.v_weight,
    "min_snr": losses.min_snr,
    "sigmoid": losses.sigmoid_weight,
    "edm": losses.edm_weight,
}


def network(config: Denoiser, learned_variance: bool = False) -> UNet | DiT:
    """The network that the config chooses, with twice the outputs for a learned variance."""
    common: dict[str, Any] = dict(
        outputs=config.shape[-1] * (2 if learned_variance else 1),
        dropout=config.dropout,
        dtype=jnp.dtype(config.precision),
        classes=config.classes if config.conditional else 0,
        remat=config.remat,
    )
    if config.network == "dit":
        return DiT(
            patch=config.patch,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            **common,
        )
    return UNet(
        fold=config.fold,
        channels=config.channels,
        multipliers=config.multipliers,
        blocks=config.blocks,
        attention_sizes=config.attention_sizes,
        head_channels=config.head_channels,
        scale_shift=config.scale_shift,
        **common,
    )


def sampling(config: Denoiser) -> Sampling:
    """How the config draws."""
    return Sampling(
        config.sampler,
        config.sample_steps,
        config.spacing,
        config.guidance,
        config.guidance_interval,
        config.guidance_rescale,
        config.limit,
    )


def task(config: Config, judging: Judging, guide: Callable[[], Guide | None]) -> Task:
    """The task of a config."""
    return diffusion_task(
        network(config, config.variance == "learned"),
        noise_schedule(config),
        config.shape,
        config.levels,
        kind=config.prediction,
        weight=WEIGHTS[config.weight],
        label_dropout=config.label_dropout,
        flip=config.flip,
        variance=config.variance,
        bound_scale=config.bound_scale,
        times=config.times,
        sampling=sampling(config),
        batch_size=config.batch_size,
        eval_batch=config.eval_batch,
        eval_times=config.eval_times,
        judging=judging,
        guide=guide,
    )


def judging(classifier: types.ModuleType, config: Denoiser) -> Judging:
    """What judges the images that the config draws."""
    return Judging(judges_of(classifier, config), config.draw, config.draw_between)


def judged_by(classifier: types.ModuleType) -> tuple[Callable, Callable, Callable]:
    """An experiment's `prepare`, `pretrain` and `build`; a classifier's judges its images.

    The classifier is trained on the same data, once, by `pretrain`.  What guides, if it is a run,
    is of an experiment beside the classifier's.
    """

    def prepare(config: Config, loaded: Loaded, options: Options) -> Config:
        return check_judge(classifier, with_guide(classifier, config, loaded), loaded)

    def pretrain(config: Config, loaded: Loaded, options: Options) -> Config | None:
        return with_judge(classifier, config, loaded, options)

    def build(config: Config) -> Task:
        return task(config, judging(classifier, config), guide_of(classifier, config))

    return prepare, pretrain, build


prepare, pretrain, build = judged_by(classifier_digits)
