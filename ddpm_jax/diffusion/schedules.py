"""Noise schedules: logsnr as a decreasing function of time, and its inverse.

    logsnr(t) = log(alpha(t)^2 / sigma(t)^2),  t in [0, 1],  t = 1 is pure noise         (1)
    logsnr(i / T) = log(alpha_bar_i / (1 - alpha_bar_i)) for a table of T betas          (2)

The module `grids` chooses the logsnr of sampling steps. S is the logistic function.
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

from ddpm_jax.diffusion.betas import cosine_betas, linear_betas, log_alpha_bars
from ddpm_jax.diffusion.bisection import inverse_of_decreasing
from ddpm_jax.fields import AtMost, FieldError, MoreThan, NoiseSteps

Scalar = Float[Array, ""]

PURE_NOISE_LOGSNR = -5.0  # x_t counts as pure noise at this or a smaller logsnr (alpha <= 0.08)

FEW_STEPS = 4  # grids of at most this number of sampling steps always start at pure noise

Beta = Annotated[float, MoreThan(0.0), AtMost(0.99)]


class Schedule(NamedTuple):
    """A noise schedule.

    Attributes:
      logsnr: The decreasing function from t in [0, 1] to logsnr, for arrays of any shape.
      time: The inverse function, from logsnr to t.
      steps: The number of steps T of a discrete noise schedule; None for a continuous one.
    """

    logsnr: Callable[[ArrayLike], Array]
    time: Callable[[ArrayLike], Array]
    steps: int | None = None


def from_betas(betas: np.ndarray) -> Schedule:
    """Return the noise schedule with the given betas [T], eq. (2), and logsnr(0) = +inf.

    Its functions `logsnr` and `time` round their arguments to the nearest step.

    >>> schedule = from_betas(np.array([0.5, 0.5]))
    >>> print(f"{jnp.exp(schedule.logsnr(1.0)):.4f}")  # SNR, alpha_bar = 1/4
    0.3333

    Raises:
      ValueError: If `betas` is not one-dimensional, or a beta is not between 0 and 1.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(
            f"betas must be one-dimensional with 0 < beta < 1, not of shape {betas.shape} with "
            f"values from {betas.min():g} to {betas.max():g}"
        )
    steps = len(betas)
    log_bars = log_alpha_bars(betas)
    with np.errstate(divide="ignore"):
        table = log_bars - np.log(-np.expm1(log_bars))  # without the cancellation of 1 - alpha_bar
    middles = (table[1:-1] + table[2:]) / 2  # between steps 1 and 2, 2 and 3, ...

    def logsnr(t: ArrayLike) -> Array:
        step = jnp.clip(jnp.round(jnp.asarray(t) * steps), 0, steps).astype(jnp.int32)
        return jnp.asarray(table)[step]

    def time(logsnr: ArrayLike) -> Array:
        logsnr = jnp.asarray(logsnr)
        # `searchsorted` needs increasing values, hence the signs. Only +inf is step 0.
        step = 1 + jnp.searchsorted(jnp.asarray(-middles), -logsnr)
        return jnp.where(jnp.isposinf(logsnr), 0, step) / steps

    return Schedule(logsnr, time, steps)


def linear(lowest: float = -15.0, highest: float = 15.0) -> Schedule:
    """Return the noise schedule whose logsnr falls linearly from `highest` to `lowest`.

    The learned schedule of VDM is linear before training (Kingma et al. 2021).

    >>> print(linear(-4.0, 4.0).logsnr(jnp.array([0.0, 0.5, 1.0])))
    [ 4.  0. -4.]
    """
    return Schedule(
        lambda t: highest + jnp.asarray(t) * (lowest - highest),
        lambda logsnr: (jnp.asarray(logsnr) - highest) / (lowest - highest),
    )


def cosine(lowest: float = -15.0, highest: float = 15.0) -> Schedule:
    """Return the cosine schedule from logsnr `highest` to `lowest` (Kingma & Gao 2023, app. D.2).

    alpha = cos(angle), sigma = sin(angle), angle = a + t (b - a), so logsnr = -2 log tan(angle)
    with tan(a) = exp(-highest / 2) and tan(b) = exp(-lowest / 2).

    >>> print(f"{cosine().time(0.0):.3f}")
    0.500
    """
    a, b = np.arctan(np.exp(-0.5 * highest)), np.arctan(np.exp(-0.5 * lowest))
    c = np.arctan(np.exp(0.5 * lowest))  # pi / 2 - b without cancellation

    def logsnr(t: ArrayLike) -> Array:
        t = jnp.asarray(t)
        # The angle is computed from the nearer end, so that no end cancels in float32.
        up, down = a + t * (b - a), c + (1 - t) * (b - a)
        near_noise = -jnp.log(jnp.tan(jnp.where(t > 0.5, down, 1.0)))
        return -2 * jnp.where(t > 0.5, near_noise, jnp.log(jnp.tan(jnp.where(t > 0.5, 1.0, up))))

    def time(logsnr: ArrayLike) -> Array:
        logsnr = jnp.asarray(logsnr)
        near_data = logsnr > 0
        # The argument of exp is not positive and cannot overflow.
        angle = jnp.arctan(jnp.exp(-0.5 * jnp.where(near_data, logsnr, -logsnr)))
        return jnp.where(near_data, (angle - a) / (b - a), 1 - (angle - c) / (b - a))

    return Schedule(logsnr, time)


def sigmoid(
    start: float = -3.0, end: float = 3.0, tau: float = 1.0,
    lowest: float = -15.0, highest: float = 15.0,
) -> Schedule:  # fmt: skip
    """Return the sigmoid schedule from logsnr `highest` to `lowest` (Jabri et al. 2023, alg. 1).

    alpha_bar(u) = (S(end) - S(u)) / (S(end) - S(start)), S(u) = 1 / (1 + exp(-u / tau)), and
    S(x) - S(y) = sinh((x - y) / 2 tau) / (2 cosh(x / 2 tau) cosh(y / 2 tau)). Therefore
    logsnr = log sinh(e) - log sinh(d) + constant, with d = (u - start) / 2 tau and
    e = (end - u) / 2 tau. This form avoids the cancellation of 1 - alpha_bar.

    Args:
      start: The u at t = 0, before u is restricted to the range of logsnr.
      end: The u at t = 1, before u is restricted to the range of logsnr.
      tau: The temperature of the sigmoid.
      lowest: The logsnr at t = 1.
      highest: The logsnr at t = 0.
    """
    width = (end - start) / tau
    shift = float(np.log(np.cosh(0.5 * start / tau)) - np.log(np.cosh(0.5 * end / tau)))
    # Distances of u, in units of tau: at t = 0 from `start`, and at t = 1 from `end`.
    d_0, e_1 = (_distance(ratio, width) for ratio in (highest - shift, shift - lowest))
    length = _distance(lowest - shift, width) - d_0

    def logsnr(t: ArrayLike) -> Array:
        t = jnp.asarray(t)
        d, e = d_0 + t * length, e_1 + (1 - t) * length
        return jnp.log(jnp.sinh(0.5 * e)) - jnp.log(jnp.sinh(0.5 * d)) + shift

    def time(logsnr: ArrayLike) -> Array:
        logsnr = jnp.asarray(logsnr)
        near_data = logsnr > shift
        # As `_distance`, with the sign of the log ratio for which exp cannot overflow.
        small = jnp.exp(-jnp.where(near_data, logsnr - shift, shift - logsnr))
        edge = 2 * jnp.arctanh(np.sinh(width / 2) * small / (1 + np.cosh(width / 2) * small))
        return jnp.where(near_data, (edge - d_0) / length, 1 - (edge - e_1) / length)

    return Schedule(logsnr, time)


def _distance(log_ratio: float, width: float) -> float:
    """Return 2 d, where d and e of `sigmoid` satisfy log_ratio = log(sinh(e) / sinh(d)).

    d + e is width / 2. For -log_ratio instead of log_ratio, the function returns 2 e.
    """
    high = np.exp(log_ratio) + np.cosh(width / 2)
    return float(2 * np.arctanh(np.sinh(width / 2) / high))


def shifted(schedule: Schedule, factor: float) -> Schedule:
    """Return `schedule` with alpha / sigma multiplied by `factor` (Hoogeboom et al. 2023, eq. 3).

    If `schedule` suits images of n x n pixels, factor 1 / k suits images of k n x k n pixels.

    >>> print(f"{shifted(linear(-4.0, 4.0), 0.5).logsnr(0.5):.3f}")  # 0 + 2 log(0.5)
    -1.386
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
    """Return the noise schedule of EDM's training distribution (Karras et al. 2022, table 1).

    For uniform t, log(sigma / alpha) ~ N(mean, std^2), truncated to a range of sigma / alpha.

    Args:
      mean: The mean of log(sigma / alpha).
      std: The standard deviation of log(sigma / alpha).
      lowest: The sigma / alpha at t = 0.
      highest: The sigma / alpha at t = 1.
    """
    # Both tail probabilities, in float64. In float32 probabilities near 1 would cancel.
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
    """Return initial parameters for `learned`, with which the noise schedule is nearly linear.

    Args:
      key: The key of the random weights.
      width: The number of hidden units of the monotone network.
      lowest: The logsnr at t = 1.
      highest: The logsnr at t = 0.
    """
    first, second = jax.random.split(key)
    return {
        "ends": jnp.array([highest, lowest]),
        "slope": jnp.zeros(()),
        "inner": jax.random.normal(first, (2, width)),
        "outer": jax.random.normal(second, (width,)) - 4.0,
    }


def learned(params: dict[str, Array]) -> Schedule:
    """Return VDM's learned noise schedule, a monotone network (Kingma et al. 2021, app. H).

    f(t) = softplus(slope) t + sum_j softplus(outer_j) S(softplus(inner_j) t + bias_j);
    logsnr = highest + (lowest - highest) (f(t) - f(0)) / (f(1) - f(0)), where all constants are
    learned (`learned_init`). The inverse is computed by bisection.
    """
    highest, lowest = params["ends"]
    rate, bias = jax.nn.softplus(params["inner"][0]), params["inner"][1]

    def rise(t: ArrayLike) -> Array:
        t = jnp.asarray(t)[..., None]
        steps = jax.nn.softplus(params["outer"]) * jax.nn.sigmoid(rate * t + bias)
        height: Array = jax.nn.softplus(params["slope"]) * t[..., 0] + steps.sum(-1)
        return height

    def logsnr(t: ArrayLike) -> Array:
        fraction = (rise(t) - rise(0.0)) / (rise(1.0) - rise(0.0))
        value: Array = highest + (lowest - highest) * fraction
        return value

    return Schedule(logsnr, lambda value: inverse_of_decreasing(logsnr, jnp.asarray(value)))


@dataclasses.dataclass(frozen=True)
class LinearBetas:
    """A discrete noise schedule with linearly rising betas (Ho et al. 2020, sec. 4).

    Attributes:
      steps: Number of steps T of the noise schedule.
      first: First beta if T is 1,000; for another T it is multiplied by 1,000 / T.
      last: Last beta if T is 1,000; for another T it is multiplied by 1,000 / T.
    """

    steps: NoiseSteps = 1000
    first: Beta = 1e-4
    last: Beta = 0.02

    def make(self) -> Schedule:
        """Return logsnr(t) and its inverse for this noise schedule (see `linear_betas`).

        Raises:
          FieldError: If a beta is 1 or more.
        """
        try:
            return from_betas(linear_betas(self.steps, self.first, self.last))
        except ValueError as error:
            raise FieldError(f"steps={self.steps}: {error}") from None


@dataclasses.dataclass(frozen=True)
class CosineBetas:
    """A discrete noise schedule whose alpha_bar is cos^2 (Nichol & Dhariwal 2021, eq. 17).

    Attributes:
      steps: Number of steps T of the noise schedule.
    """

    steps: NoiseSteps = 1000

    def make(self) -> Schedule:
        """Return logsnr(t) and its inverse for this noise schedule (see `cosine_betas`)."""
        return from_betas(cosine_betas(self.steps))


@dataclasses.dataclass(frozen=True)
class Linear:
    """A continuous noise schedule whose logsnr falls linearly in t from 15 to -15."""

    def make(self) -> Schedule:
        """Return logsnr(t) and its inverse for this noise schedule (see `linear`)."""
        return linear()


@dataclasses.dataclass(frozen=True)
class Cosine:
    """The continuous cosine noise schedule, with logsnr from 15 to -15."""

    def make(self) -> Schedule:
        """Return logsnr(t) and its inverse for this noise schedule (see `cosine`)."""
        return cosine()


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """The continuous sigmoid noise schedule, with logsnr from 15 to -15."""

    def make(self) -> Schedule:
        """Return logsnr(t) and its inverse for this noise schedule (see `sigmoid`)."""
        return sigmoid()


@dataclasses.dataclass(frozen=True)
class EDM:
    """The continuous noise schedule with the noise levels of EDM (Karras et al. 2022)."""

    def make(self) -> Schedule:
        """Return logsnr(t) and its inverse for this noise schedule (see `edm`)."""
        return edm()


NoiseSchedule = LinearBetas | CosineBetas | Linear | Cosine | Sigmoid | EDM
