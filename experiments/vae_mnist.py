r"""A VAE on binarised MNIST with one stochastic layer; the encoder and the decoder are MLPs.

    python launch.py --experiment=vae_mnist

Measured on 2 CPU cores (AMD EPYC, float32, jax 0.10.2), seed 0, with averaged parameters (EMA), on
MNIST's 10,000 test images, dynamically binarised. Values are in nats, +- one standard error. The
importance-weighted bounds (k samples) are means over the first 1,000 test images; the gap is the
difference between k = 1 and k = 1,000.

                     -ELBO           k = 1           k = 64          k = 1,000       gap
    the default      91.45 +- 0.24   91.59 +- 0.76   88.21 +- 0.73   87.61 +- 0.73   3.98 +- 0.05
    the long run     88.80 +- 0.24   88.82 +- 0.74   86.04 +- 0.71   85.59 +- 0.71   3.23 +- 0.05

The default (7,500 steps) took between 2 min 23 s and 3 min 54 s in total, because the machine is
shared. The long run took 15 min 30 s on one core, while another training ran on the other core:

    python launch.py --experiment=vae_mnist --workdir=runs/vae_mnist_long \
        --config.train.steps=40000 --config.task.network.hidden=400,400 \
        --config.optimizer.weight_decay=0.05 --config.ema.half_life_images=400000

For comparison, Burda et al. (2016) report a negative log-likelihood of 86.8 nats (k = 5,000) for a
VAE with one stochastic layer, on the same dynamically binarised data set.
"""

from ddpm_jax.experiment.types import Config, Dataset, Experiment
from ddpm_jax.nn.vae import VAENetwork
from ddpm_jax.tasks.vae import VAE
from ddpm_jax.training.ema import EMA
from ddpm_jax.training.optimizer import Adam
from ddpm_jax.training.settings import Train
from ddpm_jax.variational.likelihoods import Bernoulli, Gaussian

CONFIG = Config(
    data=Dataset("mnist"),
    task=VAE(
        network=VAENetwork(latents=40, hidden=(500, 500)),
        likelihood=Bernoulli(),
        beta=1.0,
        eval_batch_size=500,
        iwae_images=1000,
    ),
    optimizer=Adam(
        learning_rate=3e-3,
        warmup_steps=500,
        lr_schedule="cosine",
        beta2=0.99,
        weight_decay=0.02,
    ),
    ema=EMA(half_life_images=90_000.0),
    train=Train(
        steps=7500, batch_size=256, eval_every=2500, checkpoint_every=500, steps_per_call=50
    ),
)
EXPERIMENT = Experiment(
    CONFIG,
    debug={
        "train.steps": 20,
        "train.eval_every": 10,
        "train.checkpoint_every": 10,
        "train.log_every": 5,
        "train.steps_per_call": 5,
        "task.network.hidden": (32,),
        "task.iwae_images": 20,
    },
    alternatives={"task.likelihood": (Gaussian(std=0.5),)},
    fallback="digits:28",  # used if MNIST is not available
)
