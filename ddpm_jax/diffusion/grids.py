"""Grids of logsnr on which a sampler walks, and uniform steps of a table."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.schedules import FEW, NOISE, Scalar, Schedule

Spacing = Literal["leading", "trailing", "linspace", "quadratic", "logsnr", "rho7"]


def grid(schedule: Schedule, steps: int, spacing: Spacing = "trailing") -> Float[Array, "grid"]:
    """Return the logsnr that a sampler of `steps` steps visits, from noise to data: [steps + 1].

    The last entry is +inf, the clean data, so a one-evaluation sampler costs `steps`
    evaluations.  Of a T-step table, in steps 1 ... T, with T = 1000 and `steps` = 10:

    leading    901, 801, ..., 1: every T/steps-th step, from the data's end
    trailing   1000, 900, ..., 100: the same from the noise's end
    linspace   1000, 889, ..., 1: both ends
    quadratic  801, 633, ..., 1: squares up to 0.8 T (Song et al. 2021, app. D.2, its code)
    logsnr     uniform in logsnr between both ends
    rho7       uniform in (sigma / alpha)^(1/7) (Karras et al. 2022, eq. 5)

    A sampler starts with noise, so the first entry must be noise.  That of `leading` and
    `quadratic` is as far from t = 1 as a step is long: of at most `FEW` steps it is replaced by
    that of t = 1 where its logsnr exceeds `NOISE`.  Of more steps it is as published.

    Raises:
      ValueError: no steps, more than the table has, or an unknown spacing.
    """
    total = schedule.steps
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, not {steps}")
    if total is not None and steps > total:
        raise ValueError(f"the schedule has {total} steps, fewer than {steps}")
    first = 1 / total if total else 0.0  # the cleanest time
    down = np.arange(steps)[::-1]
    if spacing == "leading":
        times = down * (total // steps) / total + first if total else down / steps
    elif spacing == "trailing":
        times = np.arange(steps, 0, -1) / steps
        times = np.round(times * total) / total if total else times
    elif spacing == "linspace":
        times = np.linspace(1.0, first, steps)
        times = np.round(times * total) / total if total else times
    elif spacing == "quadratic":
        scale = total or 1000
        times = np.linspace(0, np.sqrt(0.8 * scale), steps) ** 2
        if total:  # whole steps, none twice
            times = np.maximum(times.astype(int), np.arange(steps)) + 1
        times = times[::-1] / scale
    elif spacing in ("logsnr", "rho7"):
        high, low = (schedule.logsnr(jnp.asarray(end)) for end in (first, 1.0))
        share = jnp.linspace(0.0, 1.0, steps)
        if spacing == "logsnr":
            inner = low + share * (high - low)
        else:
            noisy, clean = jnp.exp(-0.5 * low / 7), jnp.exp(-0.5 * high / 7)
            inner = -14 * jnp.log(noisy + share * (clean - noisy))
        return jnp.append(inner, jnp.inf)
    else:
        raise ValueError(f"unknown spacing {spacing}")
    logsnrs = jax.vmap(schedule.logsnr)(jnp.asarray(times))
    if steps > FEW:
        return jnp.append(logsnrs, jnp.inf)
    first_logsnr = jnp.where(logsnrs[0] > NOISE, schedule.logsnr(jnp.asarray(1.0)), logsnrs[0])
    return jnp.append(logsnrs.at[0].set(first_logsnr), jnp.inf)


def grid_from(
    logsnrs: Float[Array, "grid"], start: Scalar
) -> tuple[Float[Array, "longer"], Int[Array, ""]]:
    """Return the part of a sampler's grid that is cleaner than `start`, with `start` before it.

    An entry that is nearer to `start` than a tenth of the step that led to it is left out, since
    a multistep sampler extrapolates by the ratio of two steps.  The step from `start` to +inf is
    always there.

    Args:
      logsnrs: as `grid` returns them.
      start: finite; may be traced, as may `logsnrs`.

    Returns:
      logsnrs with one more entry; the number of the entry that is `start`.  They rise from there
      on, and the entries before it are not part of the grid.
    """
    finite = logsnrs[:-1]
    gaps = jnp.diff(finite, prepend=finite[:1])
    kept = (finite > start) & (finite - start >= gaps / 10)
    first = jnp.where(kept.any(), jnp.argmax(kept), len(finite))
    return jnp.concatenate([start[None], logsnrs]).at[first].set(start), first


def step_number(t: Float[Array, "*batch"], steps: int) -> Float[Array, "*batch"]:
    """Return a uniform step 1 ... `steps` from a uniform t in [0, 1)."""
    return jnp.clip(jnp.floor(t * steps) + 1, 1, steps)  # if t * steps rounds up to `steps`, too


def within(
    place: Int[Array, "..."], share: Float[Array, "*batch"], count: int
) -> Float[Array, "*batch"]:
    """(place + share) / count: a time in [0, 1), in part number `place` of `count` equal parts.

    The last part's times round to 1 where `share` is nearly 1; such a time becomes the largest
    number below 1.

    Args:
      place: 0 ... count - 1.
      share: in [0, 1).
    """
    return jnp.minimum((place + share) / count, 1 - jnp.finfo(share.dtype).epsneg)


def step_time(schedule: Schedule, t: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return a uniform step i / T, i = 1 ... T, of a table for a uniform t in [0, 1); else t."""
    if schedule.steps is None:
        return t
    return step_number(t, schedule.steps) / schedule.steps
