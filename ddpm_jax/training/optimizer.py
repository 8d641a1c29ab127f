"""The optimizers: Adam, AdamW and Muon, with learning rate schedules and gradient clipping."""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array

from ddpm_jax.fields import AtLeast, NonNegative, Positive, Share
from ddpm_jax.training.muon import muon


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015), or AdamW (Loshchilov & Hutter 2019) if the weight decay is not 0.

    Attributes:
      learning_rate: Largest learning rate, more than 0.
      warmup_steps: Number of steps of a linear warm-up of the learning rate, at least 0.
      lr_schedule: Learning rate after the warm-up: constant, or a cosine decay to 0 at the last
        step.
      beta2: Decay rate of the second-moment average, from 0 to 0.99999.
      weight_decay: Decoupled weight decay, at least 0, which is multiplied by the learning rate.
      grad_clip_norm: Largest global L2 norm of the gradient, to which larger gradients are scaled;
        0 disables clipping.
    """

    learning_rate: Positive = 1e-3
    warmup_steps: Annotated[int, AtLeast(0)] = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    beta2: Share = 0.999
    weight_decay: NonNegative = 0.0
    grad_clip_norm: NonNegative = 0.0


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al. 2024) for matrices, and Adam for all other parameters.

    Attributes:
      learning_rate: Largest learning rate, more than 0.
      warmup_steps: Number of steps of a linear warm-up of the learning rate, at least 0.
      lr_schedule: Learning rate after the warm-up: constant, or a cosine decay to 0 at the last
        step.
      beta2: Decay rate of Adam's second-moment average, from 0 to 0.99999.
      weight_decay: Decoupled weight decay, at least 0, which is multiplied by the learning rate.
      grad_clip_norm: Largest global L2 norm of the gradient, to which larger gradients are scaled;
        0 disables clipping.
    """

    learning_rate: Positive = 1e-3
    warmup_steps: Annotated[int, AtLeast(0)] = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    beta2: Share = 0.999
    weight_decay: NonNegative = 0.0
    grad_clip_norm: NonNegative = 0.0


def make_optimizer(optimizer: Adam | Muon, steps: int) -> optax.GradientTransformation:
    """Return the optax transformation that clips gradients and applies Adam, AdamW or Muon.

    Args:
      optimizer: The section `optimizer` of the config.
      steps: Number of training steps, at the end of which a cosine schedule reaches 0.
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
