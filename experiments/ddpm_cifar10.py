"""Ho et al. 2020 on CIFAR-10, with the settings of their appendix B; for a GPU or a TPU.

    python launch.py --experiment=ddpm_cifar10

The U-Net has 35.7 M parameters and predicts eps under linear betas with T = 1,000. The training
has 800,000 steps of 128 images: Adam with learning rate 2e-4 after 5,000 steps of warm-up, gradient
norms clipped at 1, dropout 0.1, random horizontal flips, and an EMA of decay 0.9999 (a half-life of
887,000 images). Sampling uses the ancestral sampler with variance beta.

Three settings differ from the paper: 5,000 of the 50,000 training images are the validation split
(`--config.data.validation=0` trains on all images); t is stratified over a batch
(`--config.task.times=uniform`); and the half-life of the EMA is at most 5 % of the images seen so
far.

Measured on one NVIDIA H200 in 7 min, after 10,000 steps of 256 images, 2.5 % of the whole training:
3.85 +- 0.08 bits/dim (docs/results/ddpm_cifar10.md has the command, more metrics and samples). On 2
CPU cores (AMD EPYC, jax 0.10.2), a training step takes 39 s: use a GPU.
Published: FID 3.17 against the training set's statistics, at most 3.75 bits/dim.
"""

import math

from ddpm_jax.diffusion.schedules import LinearBetas
from ddpm_jax.experiment.types import Config, Dataset, Experiment
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.unet import UNet
from ddpm_jax.tasks.diffusion import Diffusion
from ddpm_jax.tasks.image_denoiser import SampleEvaluation
from ddpm_jax.tasks.image_sampler import Sampling
from ddpm_jax.training.ema import EMA
from ddpm_jax.training.optimizer import Adam
from ddpm_jax.training.settings import Train

CONFIG = Config(
    data=Dataset("cifar10"),
    task=Diffusion(
        network=UNet(
            space_to_depth=1,
            channels=128,
            multipliers=(1, 2, 2, 2),
            blocks=2,
            attention_sizes=(16,),
            head_channels=0,  # 0 means one attention head
            dropout=0.1,
            scale_shift=False,
        ),
        schedule=LinearBetas(steps=1000, first=1e-4, last=0.02),
        prediction="eps",
        variance="beta",
        times="stratified",
        loss_weight="simple",
        conditional=False,
        flip=True,
        sampling=Sampling(
            "ancestral_beta",
            steps=1000,
            spacing="trailing",
            guidance=1.0,
            x0_thresholding="clip",
        ),
        evaluation=SampleEvaluation(
            batch_size=500,
            times_per_image=4,
            num_samples=50_000,
            num_samples_between=2000,
            features=("classifier_cifar10", "inception"),
        ),
    ),
    optimizer=Adam(
        learning_rate=2e-4,
        warmup_steps=5000,
        lr_schedule="constant",
        beta2=0.999,
        weight_decay=0.0,
        grad_clip_norm=1.0,
    ),
    ema=EMA(half_life_images=128 * math.log(0.5) / math.log(0.9999)),  # decay 0.9999
    train=Train(steps=800_000, batch_size=128, eval_every=20_000, checkpoint_every=5000),
)
EXPERIMENT = Experiment(
    CONFIG,
    debug={
        "train.steps": 6,
        "train.eval_every": 4,
        "train.checkpoint_every": 4,
        "train.log_every": 2,
        "train.batch_size": 16,
        "task.network.channels": 8,
        "task.network.blocks": 1,
        "task.network.multipliers": (1,),
        "task.sampling.steps": 4,
        "task.evaluation.times_per_image": 2,
        "task.evaluation.num_samples": 40,
        "task.evaluation.features": (),
        "task.network.space_to_depth": 4,  # 8x8 feature maps, because attention on 32x32 is slow
        "task.network.attention_sizes": (),
        "task.evaluation.batch_size": 64,
    },
    alternatives={"task.network": (DiT(patch=2, width=128, depth=6, heads=4, dropout=0.1),)},
)
