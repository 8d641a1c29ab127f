"""Exponential and power-function moving averages of parameters."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import Training
from ddpm_jax.errors import UserError

EMA_WARMUP = 0.05  # the half-life is at most this share of the images seen (Karras et al. 2024)


def ema_decay(step: Any, batch_size: int, half_life: float) -> Any:
    """The share of the old average that a step keeps: 2^(-batch / half-life).

    The half-life, in images, is cut to 5 % of the images seen, so that the average is
    never mostly the first values (Karras et al. 2024, `training_loop.py`).
    """
    seen = jnp.asarray(step, jnp.float32) * batch_size
    images = jnp.maximum(jnp.minimum(half_life, EMA_WARMUP * seen), 1e-8)
    return 0.5 ** (batch_size / images)


def power_decay(step: Any, width: float) -> Any:
    """The share that a power-function average keeps: (1 - 1 / step)^(g + 1).

    Its weights grow as time^g; their standard deviation is `width` of the time that has passed,
    width^2 = (g + 1) / ((g + 2)^2 (g + 3)) (Karras et al. 2024, eq. 121 and 123).
    """
    t = width**-2
    power = float(np.roots([1, 7, 16 - t, 12 - t]).real.max())
    return (1 - 1 / jnp.maximum(jnp.asarray(step, jnp.float32), 1)) ** (power + 1)


def ema_decays(config: Training, step: Any) -> list[Any]:
    """What step `step` keeps of every average: `ema_half_life`'s, `ema_others`', `ema_power`'s.

    None of one that is no average but the parameters themselves.
    """
    lives = (config.ema_half_life, *config.ema_others)
    return [
        *(ema_decay(step, config.batch_size, life) if life else None for life in lives),
        *(power_decay(step, width) for width in config.ema_power),
    ]


def parameters_used(config: Training) -> str:
    """Which parameters `averaged` chooses, for the record: as trained, or which average."""
    lives = (config.ema_half_life, *config.ema_others)
    if config.ema >= len(lives):
        return f"power EMA, width {config.ema_power[config.ema - len(lives)]:g}"
    life = lives[config.ema]
    return f"EMA, half-life {life:g} images" if life else "as trained"


def check_ema(config: Training) -> None:
    """Raises UserError unless there is the average that `config.ema` chooses."""
    count = 1 + len(config.ema_others) + len(config.ema_power)
    if config.ema >= count:
        raise UserError(f"--config.ema={config.ema}: there are {count} averages, from 0 on")
    for width in config.ema_power:
        if width > 0.28:  # beyond 1 / sqrt(12) the weights would fall with time
            raise UserError(f"--config.ema_power={width:g}: must be at most 0.28")
