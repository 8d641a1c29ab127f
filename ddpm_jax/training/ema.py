"""Exponential and power-function moving averages of parameters."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ddpm_jax.fields import EMPTY_ALLOWED, MAY_CHANGE, AtMost, MoreThan, NonNegative

EMA_WARMUP = 0.05  # largest half-life, as a share of the images seen so far (Karras et al. 2024)
# With a width above 1 / sqrt(12) the weights of a power-function average would fall with time.
Width = Annotated[float, MoreThan(0.0), AtMost(0.28)]


@dataclasses.dataclass(frozen=True)
class EMA:
    """Moving averages of the parameters, one of which is evaluated and sampled from.

    Attributes:
      half_life_images: Half-life of the first average, in training images; 0 disables averaging.
      more_half_lives_images: Half-lives of additional averages, in training images; 0 stands for
        the parameters without averaging.
      power_widths: Relative widths of additional power-function averages (Karras et al. 2024), more
        than 0 and at most 0.28.
      evaluated: Name of the average that is evaluated and sampled from: "first", or a name such as
        half_life=50000 or power=0.05.
    """

    half_life_images: NonNegative = 0.0
    more_half_lives_images: Annotated[tuple[NonNegative, ...], EMPTY_ALLOWED] = ()
    power_widths: Annotated[tuple[Width, ...], EMPTY_ALLOWED] = ()
    evaluated: Annotated[str, MAY_CHANGE] = "first"

    @property
    def half_lives(self) -> tuple[float, ...]:
        """The half-lives of all exponential averages, in training images."""
        return (self.half_life_images, *self.more_half_lives_images)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the averages, in the order of `TrainState.ema`."""
        lives = [f"half_life={life:.9g}" for life in self.half_lives]
        return (*lives, *(f"power={width:.9g}" for width in self.power_widths))

    @property
    def is_average(self) -> tuple[bool, ...]:
        """For each name: False if its half-life is 0, so that it stands for the parameters."""
        return (*(life > 0 for life in self.half_lives), *(True for _ in self.power_widths))

    @property
    def index(self) -> int:
        """The index in `names` of the average that is evaluated.

        Raises:
          ValueError: If no average has the name `evaluated`.
        """
        if self.evaluated == "first":
            return 0
        if self.evaluated not in self.names:
            raise ValueError(
                f"evaluated={self.evaluated}: this run has no average of that name; choose one of "
                f"first, {', '.join(self.names)}"
            )
        return self.names.index(self.evaluated)


def ema_decay(step: Int[Array, ""] | int, batch_size: int, half_life: float) -> Float[Array, ""]:
    """Return the decay of an exponential average at a step: 2^(-batch_size / half_life).

    The half-life is limited to 5 % of the images seen so far, so that the initial parameters do not
    dominate the average early in training (Karras et al. 2024, `training_loop.py`). It is counted
    in images, and steps are counted from 1.
    """
    seen = jnp.asarray(step, jnp.float32) * batch_size
    images = jnp.maximum(jnp.minimum(half_life, EMA_WARMUP * seen), 1e-8)
    return 0.5 ** (batch_size / images)


def power_decay(step: Int[ArrayLike, "*steps"], width: float) -> Float[Array, "*steps"]:
    """Return the decay of a power-function average at each step: (1 - 1 / step)^(g + 1).

    The average weighs the parameters at time t by t^g. The standard deviation of this weight over
    time, relative to the time so far, is `width`: width^2 = (g + 1) / ((g + 2)^2 (g + 3)) (Karras
    et al. 2024, eq. 121 and 123).
    """
    t = width**-2
    power = float(np.roots([1, 7, 16 - t, 12 - t]).real.max())
    return (1 - 1 / jnp.maximum(jnp.asarray(step, jnp.float32), 1)) ** (power + 1)


def ema_decays(
    ema: EMA, step: Int[Array, ""] | int, batch_size: int
) -> list[Float[Array, ""] | None]:
    """Return the decay of every average at a step, in the order of `EMA.names`.

    The entry is None for a half-life of 0, which stands for the parameters without averaging.
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
      ema: The settings of the averages.
      averages: The averages before the step; None for a half-life of 0.
      params: The parameters after the step.
      step: The number of the step, starting at 1.
      batch_size: Images per step, on all devices together.
    """
    return tuple(
        None if decay is None else optax.incremental_update(params, old, 1 - decay)
        for old, decay in zip(averages, ema_decays(ema, step, batch_size), strict=True)
    )


def parameters_used(ema: EMA) -> str:
    """Return a description of the parameters that are evaluated, for the record of a run."""
    index, lives = ema.index, ema.half_lives
    if index >= len(lives):
        return f"power EMA, width {ema.power_widths[index - len(lives)]:g}"
    life = lives[index]
    return f"EMA, half-life {life:g} images" if life else "as trained"
