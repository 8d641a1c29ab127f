"""A VAE on binarised MNIST: one stochastic layer, an MLP on either side.

python launch.py --experiment=vae_mnist
"""

import dataclasses
from typing import Annotated, Literal

from ddpm_jax.config import AtLeast, Count, Interval, Length, NonNegative, Positive, Training
from ddpm_jax.nn import likelihood
from ddpm_jax.nn.vae import VAE
from ddpm_jax.tasks import Task, vae_task

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
    beta2: float = 0.99
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
        VAE(config.shape, config.latents, config.hidden, conv=config.network == "conv"),
        p_x,
        beta=config.beta,
        eval_batch=config.eval_batch,
        iwae_images=config.iwae_images,
    )
