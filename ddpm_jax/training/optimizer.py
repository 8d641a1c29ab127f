"""The optimizer of a config: Adam, AdamW or Muon, with warm-up, decay and clipping."""

from typing import Any

import jax.numpy as jnp
import optax

from ddpm_jax.config import Training
from ddpm_jax.training.muon import muon


def optimizer(config: Training) -> optax.GradientTransformation:
    """Adam, AdamW or Muon with warm-up, decay and clipping, as the config says."""
    rate: Any = config.learning_rate
    if config.decay == "cosine":
        rate = optax.cosine_decay_schedule(rate, config.steps)
    peak = rate if callable(rate) else lambda count: config.learning_rate

    def schedule(count):
        return peak(count) * jnp.minimum(1.0, (count + 1) / max(config.warmup, 1))

    if config.optimizer == "muon":
        made = muon(schedule, config.beta2, config.weight_decay)
    else:
        made = optax.adamw(schedule, b2=config.beta2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), made) if config.clip else made
