"""Noise schedules: logsnr as a decreasing function of time, and its inverse.

    logsnr(t) = log(alpha(t)^2 / sigma(t)^2),  t in [0, 1],  1 is pure noise             (1)
    of a table of betas, at t = i / T:  logit(alpha_bar_i),  alpha_bar_i = prod_j (1 - beta_j)  (2)

Which steps a sampler takes is a grid of logsnr, made here once and given to it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from ddpm_jax.diffusion.bisection import inverse_of_decreasing
from ddpm_jax.fields import AtMost, FieldError, MoreThan, NoiseSteps

Scalar = Float[Array, ""]

NOISE = -5.0  # logsnr up to which x_t is taken for pure noise: alpha is 0.08

FEW = 4  # steps up to which a grid that does not start at noise is made to

Beta = Annotated[float, MoreThan(0.0), AtMost(0.99)]


class Schedule(NamedTuple):
    """logsnr: t in [0, 1] -> logsnr, decreasing; time: its inverse; steps: T of a table."""

    logsnr: Callable[[ArrayLike], Array]
    time: Callable[[ArrayLike], Array]
    steps: int | None = None


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    """Betas rising linearly, scaled by 1000 / steps: float64 [steps].

    Those of 1000 steps are Ho et al. 2020's (sec. 4); the scale gives any number of steps nearly
    the same end, logsnr -10 (Nichol & Dhariwal 2021, their code).

    Args:
      first, last: betas of 1000 steps.

    Raises:
      ValueError: the last beta is 1 or more: there are too few steps.
    """
    scale = 1000 / steps
    if not scale * max(first, last) < 1:
        least = math.floor(1000 * max(first, last)) + 1
        raise ValueError(
            f"linear betas of {steps} steps reach {scale * max(first, last):g}, and a beta is less "
            f"than 1; steps must be at least {least}"
        )
    return np.linspace(scale * first, scale * last, steps)


def cosine_betas(steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """Betas of a squared cosine (Nichol & Dhariwal 2021, eq. 17): float64 [steps].

    alpha_bar(t) = cos^2((t + offset) / (1 + offset) pi / 2);
    beta_i = 1 - alpha_bar(i / T) / alpha_bar((i - 1) / T), at most `max_beta`
    """
    t = np.arange(steps + 1) / steps
    alpha_bars = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
    betas: np.ndarray = np.minimum(1 - alpha_bars[1:] / alpha_bars[:-1], max_beta)
    return betas


def log_alpha_bars(betas: np.ndarray) -> np.ndarray:
    """log alpha_bar_i for i = 0 ... T, eq. (2), in float64: [T + 1]."""
    return np.concatenate([[0.0], np.cumsum(np.log1p(-np.asarray(betas, np.float64)))])


def from_betas(betas: np.ndarray) -> Schedule:
    """Return the schedule of a table of betas, eq. (2); logsnr(0) = +inf.

    Both directions round to the nearest step.

    Raises:
      ValueError: a beta is not between 0 and 1.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError("betas must be a list of numbers between 0 and 1, both excluded")
    steps = len(betas)
    log_bars = log_alpha_bars(betas)
    with np.errstate(divide="ignore"):
        table = log_bars - np.log(-np.expm1(log_bars))  # 1 - alpha_bar cancels; this does not
    middles = (table[1:-1] + table[2:]) / 2  # between steps 1 and 2, 2 and 3, ...

    def logsnr(t: ArrayLike) -> Array:
        step = jnp.clip(jnp.round(jnp.asarray(t) * steps), 0, steps).astype(jnp.int32)
        return jnp.asarray(table)[step]

    def time(logsnr: ArrayLike) -> Array:
        logsnr = jnp.asarray(logsnr)
        # Decreasing, so searched with the sign turned; +inf alone is step 0.
        step = 1 + jnp.searchsorted(jnp.asarray(-middles), -logsnr)
        return jnp.where(jnp.isposinf(logsnr), 0, step) / steps

    return Schedule(logsnr, time, steps)


def linear(lowest: float = -15.0, highest: float = 15.0) -> Schedule:
    """Return the schedule whose logsnr falls linearly (Kingma et al. 2021, fig. 2's start)."""
    return Schedule(
        lambda t: highest + jnp.asarray(t) * (lowest - highest),
        lambda logsnr: (jnp.asarray(logsnr) - highest) / (lowest - highest),
    )


def cosine(lowest: float = -15.0, highest: float = 15.0) -> Schedule:
    """alpha = cos(pi t' / 2), cut to a range of logsnr (Kingma & Gao 2023, app. D.2).

    logsnr = -2 log tan(a + t (b - a)),  tan(a) = exp(-highest / 2),  tan(b) = exp(-lowest / 2)
    """
    a, b = np.arctan(np.exp(-0.5 * highest)), np.arctan(np.exp(-0.5 * lowest))
    c = np.arctan(np.exp(0.5 * lowest))  # pi / 2 - b, which would cancel

    def logsnr(t: ArrayLike) -> Array:
        t = jnp.asarray(t)
        # tan(angle) from the nearer end, so that neither end cancels in float32.
        up, down = a + t * (b - a), c + (1 - t) * (b - a)
        near_noise = -jnp.log(jnp.tan(jnp.where(t > 0.5, down, 1.0)))
        return -2 * jnp.where(t > 0.5, near_noise, jnp.log(jnp.tan(jnp.where(t > 0.5, 1.0, up))))

    def time(logsnr: ArrayLike) -> Array:
        logsnr = jnp.asarray(logsnr)
        near_data = logsnr > 0
        angle = jnp.arctan(jnp.exp(-0.5 * jnp.where(near_data, logsnr, -logsnr)))  # no overflow
        return jnp.where(near_data, (angle - a) / (b - a), 1 - (angle - c) / (b - a))

    return Schedule(logsnr, time)


def sigmoid(
    start: float = -3.0, end: float = 3.0, tau: float = 1.0,
    lowest: float = -15.0, highest: float = 15.0,
) -> Schedule:  # fmt: skip
    """alpha_bar is a falling sigmoid (Jabri et al. 2023, alg. 1), cut to a range of logsnr.

    alpha_bar(u) = (S(end) - S(u)) / (S(end) - S(start)), S(u) = 1 / (1 + exp(-u / tau)), so
    logsnr = log sinh(e) - log sinh(d) + constant with d = (u - start) / 2 tau and
    e = (end - u) / 2 tau, which cancels nowhere.

    Args:
      start, end: arguments u of the sigmoid at t = 0 and t = 1.
      tau: temperature of the sigmoid.
      lowest, highest: range of logsnr.
    """
    width = (end - start) / tau
    shift = float(np.log(np.cosh(0.5 * start / tau)) - np.log(np.cosh(0.5 * end / tau)))

    near, rest = (_distance(end, width) for end in (highest - shift, shift - lowest))
    length = _distance(lowest - shift, width) - near

    def logsnr(t: ArrayLike) -> Array:
        t = jnp.asarray(t)
        d, e = near + t * length, rest + (1 - t) * length
        return jnp.log(jnp.sinh(0.5 * e)) - jnp.log(jnp.sinh(0.5 * d)) + shift

    def time(logsnr: ArrayLike) -> Array:
        logsnr = jnp.asarray(logsnr)
        near_data = logsnr > shift
        # `_distance` of a log ratio that is not negative, whose exp(-...) cannot overflow.
        small = jnp.exp(-jnp.where(near_data, logsnr - shift, shift - logsnr))
        edge = 2 * jnp.arctanh(np.sinh(width / 2) * small / (1 + np.cosh(width / 2) * small))
        return jnp.where(near_data, (edge - near) / length, 1 - (edge - rest) / length)

    return Schedule(logsnr, time)


def _distance(log_ratio: float, width: float) -> float:
    """Return 2 d for log_ratio = log(sinh(e) / sinh(d)), d + e = width / 2; 2 e for -log_ratio."""
    high = np.exp(log_ratio) + np.cosh(width / 2)
    return float(2 * np.arctanh(np.sinh(width / 2) / high))


def shifted(schedule: Schedule, factor: float) -> Schedule:
    """Return `schedule` with alpha / sigma times `factor` (Hoogeboom et al. 2023, eq. 3).

    For images of a side times k larger than those the schedule was made for, 1 / k.
    """
    change = 2 * float(np.log(factor))
    return Schedule(
        lambda t: schedule.logsnr(t) + change,
        lambda logsnr: schedule.time(jnp.asarray(logsnr) - change),
        schedule.steps,
    )


def edm(
    mean: float = -1.2, std: float = 1.2, lowest: float = 0.002, highest: float = 80.0
) -> Schedule:
    """EDM's training distribution: with t uniform, log(sigma / alpha) ~ N(mean, std^2).

    Cut to sigma / alpha between `lowest` and `highest` (Karras et al. 2022, table 1).

    Args:
      mean, std: of log(sigma / alpha).
      lowest, highest: range of sigma / alpha.
    """
    # Probabilities of both tails in float64: those near 1 would cancel in float32.
    z_low, z_high = ((math.log(sigma) - mean) / std for sigma in (lowest, highest))
    below, above = (0.5 * math.erfc(z / math.sqrt(2)) for z in (-z_low, z_high))
    width = 0.5 * math.erfc(-z_high / math.sqrt(2)) - below

    def logsnr(t: ArrayLike) -> Array:
        t = jnp.asarray(t)
        from_data = below + t * width
        near_data = from_data < 0.5
        tail = jnp.where(near_data, from_data, above + (1 - t) * width)
        z = jax.scipy.special.ndtri(tail)
        return -2 * (mean + std * jnp.where(near_data, z, -z))

    def time(logsnr: ArrayLike) -> Array:
        z = (-0.5 * jnp.asarray(logsnr) - mean) / std
        near_data = z < 0
        tail = jax.scipy.special.ndtr(jnp.where(near_data, z, -z))
        return jnp.where(near_data, (tail - below) / width, 1 - (tail - above) / width)

    return Schedule(logsnr, time)


def learned_init(
    key: Key[Array, ""], width: int = 64, lowest: float = -5.0, highest: float = 13.3
) -> dict[str, Array]:
    """Return parameters of a `learned` schedule that starts linear between the two ends.

    Args:
      key: of the network's random weights.
      width: hidden units of the monotone network.
      lowest, highest: logsnr at t = 1 and at t = 0.
    """
    first, second = jax.random.split(key)
    return {
        "ends": jnp.array([highest, lowest]),
        "slope": jnp.zeros(()),
        "inner": jax.random.normal(first, (2, width)),
        "outer": jax.random.normal(second, (width,)) - 4.0,
    }


def learned(params: dict[str, Array]) -> Schedule:
    """VDM's monotone network, learned with its two ends (Kingma et al. 2021, app. H).

    f(t) = softplus(slope) t + sum_j softplus(outer_j) S(softplus(inner_j) t + bias_j);
    logsnr = highest + (lowest - highest) (f(t) - f(0)) / (f(1) - f(0)).  Its inverse is found
    by bisection.
    """
    highest, lowest = params["ends"]
    rate, bias = jax.nn.softplus(params["inner"][0]), params["inner"][1]

    def rise(t: ArrayLike) -> Array:
        t = jnp.asarray(t)[..., None]
        steps = jax.nn.softplus(params["outer"]) * jax.nn.sigmoid(rate * t + bias)
        height: Array = jax.nn.softplus(params["slope"]) * t[..., 0] + steps.sum(-1)
        return height

    def logsnr(t: ArrayLike) -> Array:
        share = (rise(t) - rise(0.0)) / (rise(1.0) - rise(0.0))
        value: Array = highest + (lowest - highest) * share
        return value

    return Schedule(logsnr, lambda value: inverse_of_decreasing(logsnr, jnp.asarray(value)))


@dataclasses.dataclass(frozen=True)
class LinearBetas:
    """A table of betas that rise linearly (Ho et al. 2020, sec. 4); see `linear_betas`.

    Attributes:
      steps: Steps T of the table.
      first: First beta of a table of 1,000 steps.
      last: Last beta of a table of 1,000 steps.
    """

    steps: NoiseSteps = 1000
    first: Beta = 1e-4
    last: Beta = 0.02

    def make(self) -> Schedule:
        """Return the schedule.

        Raises:
          FieldError: a beta is 1 or more.
        """
        try:
            return from_betas(linear_betas(self.steps, self.first, self.last))
        except ValueError as error:
            raise FieldError(f"steps={self.steps}: {error}") from None


@dataclasses.dataclass(frozen=True)
class CosineBetas:
    """A table of betas of a squared cosine (Nichol & Dhariwal 2021, eq. 17); see `cosine_betas`.

    Attributes:
      steps: Steps T of the table.
    """

    steps: NoiseSteps = 1000

    def make(self) -> Schedule:
        """Return the schedule."""
        return from_betas(cosine_betas(self.steps))


@dataclasses.dataclass(frozen=True)
class Linear:
    """A logsnr that falls linearly in continuous time; see `linear`."""

    def make(self) -> Schedule:
        """Return the schedule."""
        return linear()


@dataclasses.dataclass(frozen=True)
class Cosine:
    """The cosine schedule in continuous time; see `cosine`."""

    def make(self) -> Schedule:
        """Return the schedule."""
        return cosine()


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """The sigmoid schedule in continuous time; see `sigmoid`."""

    def make(self) -> Schedule:
        """Return the schedule."""
        return sigmoid()


@dataclasses.dataclass(frozen=True)
class EDM:
    """The noise levels of Karras et al. 2022 in continuous time; see `edm`."""

    def make(self) -> Schedule:
        """Return the schedule."""
        return edm()


NoiseSchedule = LinearBetas | CosineBetas | Linear | Cosine | Sigmoid | EDM
