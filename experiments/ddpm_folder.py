"""Denoising diffusion on a folder of your images, which all have one size.

    python launch.py --experiment=ddpm_folder --config.data=folder:PATH

The names of sub-folders are class labels (README, "Own data"); a folder without sub-folders gives
an unconditional model. With labels, samples are compared with images in the features of a
classifier that is trained once on the same folder. Its name is part of the metrics' names, such as
`fd_classifier_folder_birds` for a folder `birds`. The height and the width of the images must be
multiples of 4. The size of the network suits images of 32x32 pixels. 2,000 steps are what two CPU
cores do in less than an hour; give more on a GPU.

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2), seed 0, with 3,438 emoji of 32x32 pixels in ten
classes, in 43 min while other programs used the cores: 4.4 +- 0.5 bits/dim. Faces and people are
recognisable, images of the other classes are not. Samples and metrics: docs/results/ddpm_folder.md
"""

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
    data=Dataset("folder:images"),
    task=Diffusion(
        network=UNet(
            space_to_depth=2,
            channels=48,
            multipliers=(1, 2),
            blocks=2,
            attention_sizes=(),
            head_channels=0,
            dropout=0.1,
            scale_shift=False,
        ),
        schedule=CosineBetas(steps=1000),
        prediction="v",
        variance="beta",
        times="stratified",
        loss_weight="v",
        conditional=True,
        label_dropout=0.1,
        flip=True,
        sampling=Sampling(
            "dpmpp_2m",
            steps=20,
            spacing="logsnr",
            guidance=1.2,
            x0_thresholding="clip",
        ),
        evaluation=SampleEvaluation(
            batch_size=200,
            times_per_image=4,
            num_samples=1000,
            num_samples_between=0,
            features=("classifier_mnist",),
        ),
    ),
    optimizer=Adam(
        learning_rate=2e-3,
        warmup_steps=100,
        lr_schedule="cosine",
        grad_clip_norm=1.0,
    ),
    ema=EMA(half_life_images=50_000.0),
    train=Train(steps=2000, batch_size=64, eval_every=1000, checkpoint_every=500),
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
    },
    alternatives={"task.network": (DiT(patch=2, width=128, depth=6, heads=4, dropout=0.1),)},
)
