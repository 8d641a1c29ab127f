"""Class-conditional denoising diffusion on MNIST, with guidance, for two CPU cores.

    python launch.py --experiment=ddpm_mnist

The network is the U-Net of `ddpm_digits` (1.0 M parameters); `space_to_depth=2` turns squares of
2x2 pixels into channels. The loss is the squared error of v, for 5,000 steps of 64 images.

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2), seed 0, on MNIST's 10,000 test images. The 2,000
samples use DPM-Solver++(2M) with 20 steps and guidance 1.2; +- is one standard error.

    classified as their class by classifier_mnist                    98.15 +- 0.30 %
    Frechet distance to the test images (classifier_mnist)           1.87 +- 0.33
    this distance divided by that of 2,000 training images,
    which is 1.03 +- 0.30                                            1.82 +- 0.63
    median distance to the nearest training image, divided by
    that of test images                                              1.073 +- 0.007
    precision, recall                                                0.80 +- 0.01, 0.83 +- 0.01
    bits/dim (256 levels, variance beta)                             2.156 +- 0.049

The training took 88 min on one of the two cores, while another training ran on the other core. On
both cores without other programs, an earlier commit took 32 min 53 s.

Other loss weights, samplers and times: docs/results/ddpm_mnist.md
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
    data=Dataset("mnist"),
    task=Diffusion(
        network=UNet(
            space_to_depth=2,
            channels=32,
            multipliers=(1, 2),
            blocks=2,
            attention_sizes=(7,),
            head_channels=0,
            dropout=0.0,
            scale_shift=False,
        ),
        schedule=CosineBetas(steps=1000),
        prediction="v",
        variance="beta",
        times="stratified",
        loss_weight="v",
        conditional=True,
        label_dropout=0.1,
        flip=False,
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
            num_samples=2000,
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
    train=Train(steps=5000, batch_size=64, eval_every=1000, checkpoint_every=500),
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
        "task.network.attention_sizes": (),
    },
    alternatives={"task.network": (DiT(patch=2, width=128, depth=6, heads=4, dropout=0.0),)},
    fallback="digits:28",  # used if MNIST is not available
)
