"""The optimizer of a config: Adam, AdamW or Muon, with warm-up, decay and clipping."""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array

from ddpm_jax.fields import AtLeast, NonNegative, Positive, Share
from ddpm_jax.training.muon import muon


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015); AdamW (Loshchilov & Hutter 2019) with a weight decay.

    Attributes:
      learning_rate: Largest learning rate.
      warmup_steps: Steps of linear warm-up.
      lr_schedule: The learning rate after the warm-up: constant, or a cosine to 0 at the last step.
      beta2: Decay of the second moment.
      weight_decay: Decoupled weight decay, times the learning rate; 0 is Adam.
      grad_clip_norm: Largest global norm of the gradient; 0: no clipping.
    """

    learning_rate: Positive = 1e-3
    warmup_steps: Annotated[int, AtLeast(0)] = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    beta2: Share = 0.999
    weight_decay: NonNegative = 0.0
    grad_clip_norm: NonNegative = 0.0


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al. 2024) of matrices, and Adam of all other parameters.

    Attributes:
      learning_rate: Largest learning rate.
      warmup_steps: Steps of linear warm-up.
      lr_schedule: The learning rate after the warm-up: constant, or a cosine to 0 at the last step.
      beta2: Decay of Adam's second moment.
      weight_decay: Decoupled weight decay, times the learning rate.
      grad_clip_norm: Largest global norm of the gradient; 0: no clipping.
    """

    learning_rate: Positive = 1e-3
    warmup_steps: Annotated[int, AtLeast(0)] = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    beta2: Share = 0.999
    weight_decay: NonNegative = 0.0
    grad_clip_norm: NonNegative = 0.0


def make_optimizer(optimizer: Adam | Muon, steps: int) -> optax.GradientTransformation:
    """Return the optax transformation of a config's optimizer.

    Args:
      optimizer: the section of the config.
      steps: of the training, at the end of which a cosine reaches 0.
    """
    peak = optax.constant_schedule(optimizer.learning_rate)
    if optimizer.lr_schedule == "cosine":
        peak = optax.cosine_decay_schedule(optimizer.learning_rate, steps)

    def schedule(count: Array | int) -> Array:
        warmup: Array = jnp.minimum(1.0, (count + 1) / max(optimizer.warmup_steps, 1))
        rate: Array = peak(count) * warmup
        return rate

    if isinstance(optimizer, Muon):
        transformation = muon(schedule, optimizer.beta2, optimizer.weight_decay)
    else:
        transformation = optax.adamw(
            schedule, b2=optimizer.beta2, weight_decay=optimizer.weight_decay
        )
    clip = optimizer.grad_clip_norm
    return optax.chain(optax.clip_by_global_norm(clip), transformation) if clip else transformation
