"""Grids of logsnr for samplers, and the conversion of times to steps of a noise schedule."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.schedules import FEW_STEPS, PURE_NOISE_LOGSNR, Scalar, Schedule

Spacing = Literal["leading", "trailing", "linspace", "quadratic", "logsnr", "rho7"]


def grid(schedule: Schedule, steps: int, spacing: Spacing = "trailing") -> Float[Array, "grid"]:
    """Return the increasing logsnr that a sampler visits in `steps` sampling steps, [steps + 1].

    The last entry is +inf, the clean data, where no sampler calls the denoiser. The list shows the
    steps of a noise schedule with T = 1000 that each spacing visits if `steps` is 10:

    leading    901, 801, ..., 1: every (T / steps)-th step, ending with step 1
    trailing   1000, 900, ..., 100: every (T / steps)-th step, starting with step T
    linspace   1000, 889, ..., 1: uniform from step T to step 1
    quadratic  801, 633, ..., 1: squares up to 0.8 T (code of Song et al. 2021, app. D.2)
    logsnr     uniform in logsnr from step T to step 1
    rho7       uniform in (sigma / alpha)^(1/7) from step T to step 1 (Karras et al. 2022, eq. 5)

    Sampling starts with pure noise, but the first entries of `leading` and `quadratic` are less
    noisy than t = 1. With at most `FEW_STEPS` steps, a first entry that exceeds
    `PURE_NOISE_LOGSNR` is therefore replaced by logsnr(1). Longer grids remain as published.

    >>> from ddpm_jax.diffusion import schedules
    >>> print(grid(schedules.linear(-8.0, 8.0), 4))
    [-8. -4.  0.  4. inf]

    Raises:
      ValueError: If `steps` is less than 1 or greater than T, or if `spacing` is unknown.
    """
    total = schedule.steps
    if steps < 1:
        raise ValueError(f"the number of sampling steps must be at least 1, not {steps}")
    if total is not None and steps > total:
        raise ValueError(
            f"the number of sampling steps must be at most {total}, the number of steps of the "
            f"noise schedule, not {steps}"
        )
    if spacing in ("logsnr", "rho7"):
        return jnp.append(_between_ends(schedule, steps, spacing), jnp.inf)
    logsnrs = jax.vmap(schedule.logsnr)(jnp.asarray(_times(total, steps, spacing)))
    if steps <= FEW_STEPS:
        end = schedule.logsnr(jnp.asarray(1.0))
        logsnrs = logsnrs.at[0].set(jnp.where(logsnrs[0] > PURE_NOISE_LOGSNR, end, logsnrs[0]))
    return jnp.append(logsnrs, jnp.inf)


def _times(total: int | None, steps: int, spacing: Spacing) -> np.ndarray:
    """Return the decreasing times t, [steps], of a spacing that is defined by t.

    `total` is the number of steps T of the noise schedule; None if the schedule is continuous.
    """
    first = 1 / total if total else 0.0  # the cleanest time
    if spacing == "leading":
        descending = np.arange(steps)[::-1]
        return descending * (total // steps) / total + first if total else descending / steps
    if spacing == "quadratic":
        scale = total or 1000
        times = np.linspace(0, np.sqrt(0.8 * scale), steps) ** 2
        if total:  # integer steps without repetition
            times = np.maximum(times.astype(int), np.arange(steps)) + 1
        return times[::-1] / scale
    if spacing == "trailing":
        times = np.arange(steps, 0, -1) / steps
    elif spacing == "linspace":
        times = np.linspace(1.0, first, steps)
    else:
        raise ValueError(f'unknown spacing "{spacing}"; use one of {", ".join(get_args(Spacing))}')
    return np.round(times * total) / total if total else times


def _between_ends(schedule: Schedule, steps: int, spacing: Spacing) -> Array:
    """Return the finite entries, [steps], of a grid that is uniform in a function of logsnr."""
    first = 1 / schedule.steps if schedule.steps else 0.0  # the cleanest time
    high, low = (schedule.logsnr(jnp.asarray(end)) for end in (first, 1.0))
    fractions = jnp.linspace(0.0, 1.0, steps)
    if spacing == "logsnr":
        return low + fractions * (high - low)
    noisy, clean = jnp.exp(-0.5 * low / 7), jnp.exp(-0.5 * high / 7)
    return -14 * jnp.log(noisy + fractions * (clean - noisy))


def grid_from(
    logsnrs: Float[Array, "grid"], start: Scalar
) -> tuple[Float[Array, "longer"], Int[Array, ""]]:
    """Return a grid that begins at the logsnr `start` and continues with entries of `logsnrs`.

    The grid continues with the entries that are cleaner than `start`. The first of them is omitted
    if its distance from `start` is less than a tenth of its distance from the entry before it,
    because a multistep sampler extrapolates by the ratio of two steps. +inf always remains.

    Args:
      logsnrs: An increasing grid that ends with +inf, from the function `grid`.
      start: A finite logsnr, which may be a traced value.

    Returns:
      An array with one more entry than `logsnrs`, and the index of `start` in this array. The
      grid consists of the entries from this index on; a sampler must skip the earlier entries.
    """
    finite = logsnrs[:-1]
    gaps = jnp.diff(finite, prepend=finite[:1])
    cleaner = (finite > start) & (finite - start >= gaps / 10)
    first = jnp.where(cleaner.any(), jnp.argmax(cleaner), len(finite))
    return jnp.concatenate([start[None], logsnrs]).at[first].set(start), first


def step_number(t: Float[Array, "*batch"], steps: int) -> Float[Array, "*batch"]:
    """Convert times t ~ U[0, 1) to numbers of steps that are uniform in 1 ... `steps`."""
    # The product t * steps may round up to `steps`.
    return jnp.clip(jnp.floor(t * steps) + 1, 1, steps)


def stratum_time(
    index: Int[Array, "..."], offset: Float[Array, "*batch"], count: int
) -> Float[Array, "*batch"]:
    """Return the time (index + offset) / count in one of `count` equal parts of [0, 1).

    If the sum rounds to `count`, the result is the largest number below 1.

    Args:
      index: The number of the part, 0 ... count - 1.
      offset: The relative position of the time in its part, in [0, 1).
      count: The number of equal parts.
    """
    return jnp.minimum((index + offset) / count, 1 - jnp.finfo(offset.dtype).epsneg)


def step_time(schedule: Schedule, t: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Convert times t ~ U[0, 1) to times i / T, where the steps i are uniform in 1 ... T.

    T is the number of steps of the noise schedule. If the schedule is continuous, return t.
    """
    if schedule.steps is None:
        return t
    return step_number(t, schedule.steps) / schedule.steps
