"""A convolutional VAE on the grey values of Fashion-MNIST, with one learned variance.

    python launch.py --experiment=vae_fashion_mnist

Measured on 2 CPU cores (AMD EPYC, jax 0.10.2) in 8 minutes beside other programs, trained on 55,000
images. On Fashion-MNIST's 10,000 test images: 6.930 +- 0.002 bits/dim for 256 grey levels (-ELBO
-38.0 +- 1.3 nats, of a density on [-1, 1]^784); all 50 latents are active. On 100 test images, the
importance-weighted bound (k = 1,000) is -50 +- 15 nats, and its gap to k = 1 is 19.9 +- 0.7 nats.
The reconstructions are blurred, because all pixels share one variance.
"""

from ddpm_jax.experiment.types import Config, Dataset, Experiment
from ddpm_jax.nn.vae import VAENetwork
from ddpm_jax.tasks.vae import VAE
from ddpm_jax.training.ema import EMA
from ddpm_jax.training.optimizer import Adam
from ddpm_jax.training.settings import Train
from ddpm_jax.variational.likelihoods import Gaussian

CONFIG = Config(
    data=Dataset("fashion_mnist"),
    task=VAE(
        network=VAENetwork(latents=50, hidden=(32, 64), conv=True),
        likelihood=Gaussian(std=None),
        beta=1.0,
        eval_batch_size=500,
        iwae_images=100,
    ),
    optimizer=Adam(
        learning_rate=2e-3,
        warmup_steps=500,
        lr_schedule="cosine",
        beta2=0.99,
        weight_decay=0.02,
    ),
    ema=EMA(half_life_images=20_000.0),
    train=Train(steps=2000, batch_size=128, eval_every=500, checkpoint_every=500),
)
EXPERIMENT = Experiment(
    CONFIG,
    debug={
        "train.steps": 20,
        "train.eval_every": 10,
        "train.checkpoint_every": 10,
        "train.log_every": 5,
        "task.network.hidden": (4, 4),
        "task.iwae_images": 20,
    },
)
