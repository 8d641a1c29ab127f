"""The autoencoder of `text_to_image_shapes`; the latents have a quarter of the image's side.

    python launch.py --experiment=autoencoder_shapes
    python launch.py --experiment=autoencoder_shapes --config.task.codes=256     # codebook of 256

Measured on one CPU core (AMD EPYC, jax 0.10.2; another training ran on the second core), seed 0,
with the settings of `text_to_image_shapes`: 4,000 steps of 16 images took 6 min 48 s. On the 2,048
test images: PSNR 32.02 +- 0.05 dB, SSIM 0.9508 +- 0.0006, KL 725.9 +- 0.7 nats, Frechet distance
0.00025 +- 0.00002 in the features of the text encoder's run.

Results for other numbers of steps, KL weights and codebook sizes, and for 64x64 images:
docs/results/autoencoder_shapes.md
"""

from ddpm_jax.experiment.types import Config, Dataset, Experiment
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.tasks.autoencoder import LatentAutoencoder
from ddpm_jax.training.ema import EMA
from ddpm_jax.training.optimizer import Adam
from ddpm_jax.training.settings import Train

CONFIG = Config(
    data=Dataset("shapes"),
    task=LatentAutoencoder(
        network=Autoencoder(channels=(32, 128), latent_channels=4, blocks=1),
        kl_weight=2e-2,
        codes=0,
        commitment_weight=0.25,
        eval_batch_size=128,
    ),
    optimizer=Adam(
        learning_rate=3e-3,
        warmup_steps=100,
        lr_schedule="cosine",
        grad_clip_norm=1.0,
    ),
    ema=EMA(half_life_images=5_000.0),
    train=Train(steps=6000, batch_size=16, eval_every=3000, checkpoint_every=1000),
)
EXPERIMENT = Experiment(
    CONFIG,
    debug={
        "train.steps": 6,
        "train.eval_every": 4,
        "train.checkpoint_every": 4,
        "train.log_every": 2,
        "train.batch_size": 16,
        "task.network.channels": (8, 8),
        "task.network.blocks": 1,
    },
)
