"""Exponential and power-function moving averages of the parameters of a network."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ddpm_jax.fields import EMPTY_ALLOWED, MAY_CHANGE, AtMost, MoreThan, NonNegative

# The largest half-life, divided by the number of training images so far (Karras et al. 2024).
EMA_WARMUP = 0.05
# With a width above 1 / sqrt(12) the weights of a power-function average would fall with time.
Width = Annotated[float, MoreThan(0.0), AtMost(0.28)]


@dataclasses.dataclass(frozen=True)
class EMA:
    """Moving averages of the parameters, one of which is evaluated and sampled from.

    Attributes:
      half_life_images: Half-life of the first average, in training images. If it is 0, the
        parameters themselves are used instead of this average.
      more_half_lives_images: Half-lives of additional exponential averages, in training images; a
        value of 0 adds the parameters themselves to the choices of `evaluated`.
      power_widths: Relative widths of additional power-function averages (Karras et al. 2024), more
        than 0 and at most 0.28.
      evaluated: Name of the average that evaluation and sampling use: "first" for the average of
        `half_life_images`, or a name such as half_life=50000 or power=0.05.
    """

    half_life_images: NonNegative = 0.0
    more_half_lives_images: Annotated[tuple[NonNegative, ...], EMPTY_ALLOWED] = ()
    power_widths: Annotated[tuple[Width, ...], EMPTY_ALLOWED] = ()
    evaluated: Annotated[str, MAY_CHANGE] = "first"

    @property
    def half_lives(self) -> tuple[float, ...]:
        """The half-lives of all exponential averages in training images; 0 disables averaging."""
        return (self.half_life_images, *self.more_half_lives_images)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the averages, such as "power=0.05", in the order of `TrainState.ema`."""
        lives = [f"half_life={life:.9g}" for life in self.half_lives]
        return (*lives, *(f"power={width:.9g}" for width in self.power_widths))

    @property
    def is_average(self) -> tuple[bool, ...]:
        """For each name in `names`: True for an average; False for a half-life of 0."""
        return (*(life > 0 for life in self.half_lives), *(True for _ in self.power_widths))

    @property
    def index(self) -> int:
        """The index in `names` of the average that evaluation and sampling use.

        Raises:
          ValueError: If `names` does not contain the name in the field `evaluated`.
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
    """Return the decay 2^(-batch_size / half_life) of an exponential average at a training step.

    The half-life is limited to 5 % of the training images so far, so that the initial parameters do
    not dominate the average early in training (Karras et al. 2024, `training_loop.py`).

    Args:
      step: The number of the training step, starting at 1.
      batch_size: Number of images per training step.
      half_life: The half-life in training images, more than 0.
    """
    seen = jnp.asarray(step, jnp.float32) * batch_size
    images = jnp.maximum(jnp.minimum(half_life, EMA_WARMUP * seen), 1e-8)
    return 0.5 ** (batch_size / images)


def power_decay(step: Int[ArrayLike, "*steps"], width: float) -> Float[Array, "*steps"]:
    """Return the decay (1 - 1 / step)^(g + 1) of a power-function average at each training step.

    The average weighs the parameters at time t by t^g. The exponent g follows from the width by
    width^2 = (g + 1) / ((g + 2)^2 (g + 3)) (Karras et al. 2024, eq. 121 and 123).

    Args:
      step: The numbers of the training steps, starting at 1.
      width: Standard deviation of the time t under the weight t^g, divided by the last time.
    """
    t = width**-2
    power = float(np.roots([1, 7, 16 - t, 12 - t]).real.max())
    return (1 - 1 / jnp.maximum(jnp.asarray(step, jnp.float32), 1)) ** (power + 1)


def ema_decays(
    ema: EMA, step: Int[Array, ""] | int, batch_size: int
) -> list[Float[Array, ""] | None]:
    """Return the decay of every average at a training step, in the order of `EMA.names`.

    The decay is None for a half-life of 0, which is not averaged. Steps are counted from 1.
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
    """Return the averages of the parameters after a training step, in the order of `EMA.names`.

    Args:
      ema: The section `ema` of the config.
      averages: The averages before the training step; None for a half-life of 0.
      params: The parameters after the training step.
      step: The number of the training step, starting at 1.
      batch_size: Number of images per training step, on all devices together.
    """
    return tuple(
        None if decay is None else optax.incremental_update(params, old, 1 - decay)
        for old, decay in zip(averages, ema_decays(ema, step, batch_size), strict=True)
    )


def parameters_used(ema: EMA) -> str:
    """Return the text that describes the evaluated parameters in the results of a run.

    Examples are "EMA, half-life 50000 images", and "as trained" for parameters without averaging.
    """
    index, lives = ema.index, ema.half_lives
    if index >= len(lives):
        return f"power EMA, width {ema.power_widths[index - len(lives)]:g}"
    life = lives[index]
    return f"EMA, half-life {life:g} images" if life else "as trained"
