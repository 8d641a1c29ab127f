"""Grids of logsnr along which samplers step, and uniformly sampled steps of a table of betas."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.schedules import FEW_STEPS, PURE_NOISE_LOGSNR, Scalar, Schedule

Spacing = Literal["leading", "trailing", "linspace", "quadratic", "logsnr", "rho7"]


def grid(schedule: Schedule, steps: int, spacing: Spacing = "trailing") -> Float[Array, "grid"]:
    """Return the increasing grid of logsnr of a sampler with `steps` steps: [steps + 1].

    The last entry is +inf, the clean data, where no sampler calls the denoiser. The spacings, with
    the steps of a table that they visit if it has T = 1000 steps and `steps` is 10:

    leading    901, 801, ..., 1: every (T / steps)-th step, ending with step 1
    trailing   1000, 900, ..., 100: every (T / steps)-th step, starting with step T
    linspace   1000, 889, ..., 1: uniform, with both ends
    quadratic  801, 633, ..., 1: squares up to 0.8 T (code of Song et al. 2021, app. D.2)
    logsnr     uniform in logsnr, with both ends
    rho7       uniform in (sigma / alpha)^(1/7), with both ends (Karras et al. 2022, eq. 5)

    Sampling starts with pure noise, but the first entries of `leading` and `quadratic` are less
    noisy than t = 1. With at most `FEW_STEPS` steps, a first entry that exceeds
    `PURE_NOISE_LOGSNR` is therefore replaced by logsnr(1). Grids of more steps are as published.

    >>> from ddpm_jax.diffusion import schedules
    >>> print(grid(schedules.linear(-8.0, 8.0), 4))
    [-8. -4.  0.  4. inf]

    Raises:
      ValueError: If `steps` is less than 1 or more than the table has, or `spacing` is unknown.
    """
    total = schedule.steps
    if steps < 1:
        raise ValueError(f"the number of sampling steps must be at least 1, not {steps}")
    if total is not None and steps > total:
        raise ValueError(
            f"the number of sampling steps must be at most {total}, the steps of the schedule, "
            f"not {steps}"
        )
    if spacing in ("logsnr", "rho7"):
        return jnp.append(_between_ends(schedule, steps, spacing), jnp.inf)
    logsnrs = jax.vmap(schedule.logsnr)(jnp.asarray(_times(total, steps, spacing)))
    if steps <= FEW_STEPS:
        end = schedule.logsnr(jnp.asarray(1.0))
        logsnrs = logsnrs.at[0].set(jnp.where(logsnrs[0] > PURE_NOISE_LOGSNR, end, logsnrs[0]))
    return jnp.append(logsnrs, jnp.inf)


def _times(total: int | None, steps: int, spacing: Spacing) -> np.ndarray:
    """Return the decreasing times of the spacings that are defined by t; `total` is T or None."""
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
    """Return the finite entries of the spacings that are uniform in a function of logsnr."""
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
    """Return a grid that starts at `start` and goes on with the cleaner entries of `logsnrs`.

    An entry is omitted if its distance from `start` is less than a tenth of the step that led to
    it, because a multistep sampler extrapolates by the ratio of two steps. The step from `start`
    to +inf always remains.

    Args:
      logsnrs: An increasing grid, as `grid` returns it.
      start: A finite logsnr. Like `logsnrs`, it may be traced.

    Returns:
      A grid with one more entry than `logsnrs`, and the index of the entry that is `start`.
      The entries increase from that index on; earlier entries do not belong to the grid.
    """
    finite = logsnrs[:-1]
    gaps = jnp.diff(finite, prepend=finite[:1])
    cleaner = (finite > start) & (finite - start >= gaps / 10)
    first = jnp.where(cleaner.any(), jnp.argmax(cleaner), len(finite))
    return jnp.concatenate([start[None], logsnrs]).at[first].set(start), first


def step_number(t: Float[Array, "*batch"], steps: int) -> Float[Array, "*batch"]:
    """Convert t ~ U[0, 1) to a uniformly distributed step in 1 ... `steps`."""
    # The product t * steps may round up to `steps`.
    return jnp.clip(jnp.floor(t * steps) + 1, 1, steps)


def stratum_time(
    index: Int[Array, "..."], offset: Float[Array, "*batch"], count: int
) -> Float[Array, "*batch"]:
    """Return (index + offset) / count, a time in part `index` of `count` equal parts of [0, 1).

    A sum that rounds to `count` gives the largest number below 1.

    Args:
      index: The number of the part, 0 ... count - 1.
      offset: The position in the part, in [0, 1).
      count: The number of parts.
    """
    return jnp.minimum((index + offset) / count, 1 - jnp.finfo(offset.dtype).epsneg)


def step_time(schedule: Schedule, t: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Convert t ~ U[0, 1) to the time i / T of a uniform step i of a table of T betas.

    If the schedule is continuous, return t.
    """
    if schedule.steps is None:
        return t
    return step_number(t, schedule.steps) / schedule.steps
