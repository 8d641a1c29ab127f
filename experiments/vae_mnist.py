"""A VAE on binarised MNIST: one stochastic layer, an MLP on either side.

    python launch.py --experiment=vae_mnist

Measured on 2 CPU cores (AMD EPYC, float32, jax 0.10.2), MNIST's 10,000 test images,
dynamically binarised, in nats; the importance-weighted bounds on the first 1,000 of them with
1,000 samples each, +- a standard error; parameters averaged (EMA), seed 0.

                     -ELBO           k = 1           k = 64          k = 1,000       gap
    the default      91.45 +- 0.24   91.59 +- 0.76   88.21 +- 0.73   87.61 +- 0.73   3.98 +- 0.05
    the long run     88.80 +- 0.24   88.82 +- 0.74   86.04 +- 0.71   85.59 +- 0.71   3.23 +- 0.05

The default (7,500 steps) took 2 min 23 s from command to table on one day and 3 min 54 s on
another, with the same figures (the machine is shared).  The long run took 15 min 30 s on one of the
cores, with another training on the other one:

    python launch.py --experiment=vae_mnist --workdir=runs/vae_mnist_long --config.steps=40000
        --config.hidden=400,400 --config.weight_decay=0.05 --config.ema_half_life=400000

For comparison, Burda et al. (2016) report a negative log-likelihood of 86.8 (k = 5,000) for
a VAE with one stochastic layer, on the same dynamically binarised set.
"""

import dataclasses
from typing import Annotated, Literal

from ddpm_jax.config import Training, inside
from ddpm_jax.fields import AtLeast, Count, Interval, Length, NonNegative, Positive, Share
from ddpm_jax.nn.vae import VAE
from ddpm_jax.task import Task
from ddpm_jax.tasks.vae import vae_task
from ddpm_jax.variational import likelihoods as likelihood

FALLBACK = "digits:28"  # where MNIST cannot be had
DEBUG = dict(
    steps=20, eval_every=10, checkpoint_every=10, log_every=5, steps_per_call=5,
    hidden=(32,), iwae_images=20,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(Training):
    """See `python launch.py --experiment=vae_mnist --help`."""

    data: str = "mnist"
    steps: Length = 7500
    batch_size: Count = 256
    learning_rate: Positive = 3e-3
    warmup: Annotated[int, AtLeast(0)] = 500
    decay: Literal["none", "cosine"] = "cosine"
    beta2: Share = 0.99
    weight_decay: NonNegative = 0.02
    ema_half_life: NonNegative = 90_000.0
    eval_every: Interval = 2500
    checkpoint_every: Interval = 500
    steps_per_call: Count = 50
    latents: Count = 40
    hidden: tuple[Count, ...] = (500, 500)
    network: Literal["mlp", "conv"] = "mlp"
    likelihood: Literal["bernoulli", "gaussian", "gaussian_learned"] = "bernoulli"
    std: Positive = 0.5  # of likelihood=gaussian
    beta: NonNegative = 1.0
    eval_batch: Count = 500
    iwae_images: Length = 1000


def build(config: Config) -> Task:
    """The task that this experiment trains."""
    p_x = {
        "bernoulli": lambda: likelihood.bernoulli(config.levels),
        "gaussian": lambda: likelihood.gaussian(config.levels, config.std),
        "gaussian_learned": lambda: likelihood.gaussian(config.levels, None),
    }[config.likelihood]()
    return vae_task(
        VAE(
            config.shape,
            config.latents,
            config.hidden,
            conv=config.network == "conv",
            dtype=inside(config.precision),
        ),
        p_x,
        beta=config.beta,
        eval_batch=config.eval_batch,
        iwae_images=config.iwae_images,
    )
