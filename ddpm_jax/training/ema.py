"""Exponential and power-function moving averages of parameters."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ddpm_jax.fields import MAY_CHANGE, OR_NONE, AtMost, MoreThan, NonNegative

EMA_WARMUP = 0.05  # the half-life is at most this share of the images seen (Karras et al. 2024)
# Beyond a width of 1 / sqrt(12) the weights of a power-function average would fall with time.
Width = Annotated[float, MoreThan(0.0), AtMost(0.28)]


@dataclasses.dataclass(frozen=True)
class EMA:
    """Moving averages of the parameters, one of which is evaluated and sampled from.

    Attributes:
      half_life_images: Half-life of the average, in training images; 0: no averaging.
      more_half_lives_images: Half-lives of further averages, in training images.
      power_widths: Relative widths of power-function averages (Karras et al. 2024), such as 0.05.
      evaluated: The average that is evaluated and sampled from: "first", or the name of another
        one, such as half_life=50000 or power=0.05.
    """

    half_life_images: NonNegative = 0.0
    more_half_lives_images: Annotated[tuple[NonNegative, ...], OR_NONE] = ()
    power_widths: Annotated[tuple[Width, ...], OR_NONE] = ()
    evaluated: Annotated[str, MAY_CHANGE] = "first"

    @property
    def half_lives(self) -> tuple[float, ...]:
        """All half-lives, in training images."""
        return (self.half_life_images, *self.more_half_lives_images)

    @property
    def names(self) -> tuple[str, ...]:
        """The averages' names, in the order in which a state holds them."""
        lives = [f"half_life={life:.9g}" for life in self.half_lives]
        return (*lives, *(f"power={width:.9g}" for width in self.power_widths))

    @property
    def is_average(self) -> tuple[bool, ...]:
        """Return for each name whether it is an average, and not the parameters themselves."""
        return (*(life > 0 for life in self.half_lives), *(True for _ in self.power_widths))

    @property
    def index(self) -> int:
        """The place of the average that is evaluated.

        Raises:
          ValueError: there is no average of that name.
        """
        if self.evaluated == "first":
            return 0
        if self.evaluated not in self.names:
            raise ValueError(
                f'evaluated: there is no average "{self.evaluated}"; there are: first, '
                f"{', '.join(self.names)}"
            )
        return self.names.index(self.evaluated)


def ema_decay(step: Int[Array, ""] | int, batch_size: int, half_life: float) -> Float[Array, ""]:
    """Return the share of the old average that a step keeps: 2^(-batch / half-life).

    The half-life, in images, is cut to 5 % of the images seen, so that the average is
    never mostly the first values (Karras et al. 2024, `training_loop.py`).
    """
    seen = jnp.asarray(step, jnp.float32) * batch_size
    images = jnp.maximum(jnp.minimum(half_life, EMA_WARMUP * seen), 1e-8)
    return 0.5 ** (batch_size / images)


def power_decay(step: Int[ArrayLike, "*steps"], width: float) -> Float[Array, "*steps"]:
    """Return the share that a power-function average keeps: (1 - 1 / step)^(g + 1).

    Its weights grow as time^g; their standard deviation is `width` of the time that has passed,
    width^2 = (g + 1) / ((g + 2)^2 (g + 3)) (Karras et al. 2024, eq. 121 and 123).
    """
    t = width**-2
    power = float(np.roots([1, 7, 16 - t, 12 - t]).real.max())
    return (1 - 1 / jnp.maximum(jnp.asarray(step, jnp.float32), 1)) ** (power + 1)


def ema_decays(
    ema: EMA, step: Int[Array, ""] | int, batch_size: int
) -> list[Float[Array, ""] | None]:
    """Return what step `step` keeps of every average, in the order of `EMA.names`.

    None stands for the parameters themselves, which are not an average.
    """
    return [
        *(ema_decay(step, batch_size, life) if life else None for life in ema.half_lives),
        *(power_decay(step, width) for width in ema.power_widths),
    ]


def update_averages(
    ema: EMA,
    averages: tuple[PyTree | None, ...],
    params: PyTree,
    step: Int[Array, ""] | int,
    batch_size: int,
) -> tuple[PyTree | None, ...]:
    """Return the averages after a step, in the order of `EMA.names`.

    Args:
      ema: which averages are kept.
      averages: before the step; None: no average but the parameters themselves.
      params: after the step.
      step: the number of the step, from 1.
      batch_size: on all devices.
    """
    return tuple(
        None if decay is None else optax.incremental_update(params, old, 1 - decay)
        for old, decay in zip(averages, ema_decays(ema, step, batch_size), strict=True)
    )


def parameters_used(ema: EMA) -> str:
    """Return which parameters are evaluated, for the record: as trained, or which average."""
    number, lives = ema.index, ema.half_lives
    if number >= len(lives):
        return f"power EMA, width {ema.power_widths[number - len(lives)]:g}"
    life = lives[number]
    return f"EMA, half-life {life:g} images" if life else "as trained"
