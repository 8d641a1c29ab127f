"""Improved DDPM on CIFAR-10 (Nichol & Dhariwal 2021), with cosine betas and learned variances.

    python launch.py --experiment=iddpm_cifar10

The settings are T = 4,000, the loss L_hybrid = L_simple + 0.001 L_vlb, Adam with learning rate
1e-4, 500,000 steps, dropout 0.3, a time embedding that scales and shifts the features, and
attention with 64 channels per head at 16x16 and 8x8. With `--config.task.times=importance
--config.task.vlb_weight=1000`, the loss is nearly L_vlb alone.

Measured on one NVIDIA H200 in 4 min, after 2,500 steps: 3.61 +- 0.18 bits/dim
(docs/results/ddpm_cifar10.md). On 2 CPU cores (AMD EPYC, jax 0.10.2), a training step takes
59 s: use a GPU.
Published: 3.17 bits/dim and FID 3.19 of L_hybrid.
"""

import math

from ddpm_jax.diffusion.schedules import CosineBetas
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
            blocks=3,
            attention_sizes=(16, 8),
            head_channels=64,
            dropout=0.3,
            scale_shift=True,
        ),
        schedule=CosineBetas(steps=4000),
        prediction="eps",
        variance="learned",
        times="stratified",
        loss_weight="simple",
        conditional=False,
        label_dropout=0.1,
        flip=True,
        sampling=Sampling(
            "ancestral_learned",
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
        learning_rate=1e-4,
        warmup_steps=0,
        lr_schedule="constant",
        grad_clip_norm=1.0,
    ),
    ema=EMA(half_life_images=128 * math.log(0.5) / math.log(0.9999)),
    train=Train(steps=500_000, batch_size=128, eval_every=20_000, checkpoint_every=5000),
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
        "task.network.attention_sizes": (8,),
        "task.network.head_channels": 4,
        "task.schedule.steps": 50,
        "task.evaluation.batch_size": 64,
    },
    alternatives={"task.network": (DiT(patch=2, width=128, depth=6, heads=4, dropout=0.3),)},
)
