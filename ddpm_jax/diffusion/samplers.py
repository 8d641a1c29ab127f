"""Samplers: a step from x_t to x_s, and the one driver that takes them all.

In the coordinates of `Prediction`, with h = (logsnr_s - logsnr_t) / 2 > 0,

    DDIM:           x_s = alpha_s x0 + sigma_s eps                                       (1)
    ODE in x0:      x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) x0 + O(h^2)         (2)

which are the same step.  A step to +inf ends at x0: no noise, first order, and no call of
the denoiser there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.diffusion.prediction import Denoiser, Prediction, Variance, reverse_log_variance
from ddpm_jax.diffusion.process import alpha_sigma, q_posterior

Scalar = Float[Array, ""]


class Sampler(NamedTuple):
    """A sampler: init(xT) -> state with .x; step -> (state, Prediction).

    step(denoise, state, noise, logsnr_t, logsnr_s)
    """

    init: Callable[[Array], Any]
    step: Callable[[Denoiser, Any, Array, Scalar, Scalar], tuple[Any, Prediction]]


class State(NamedTuple):
    """Of samplers that remember nothing."""

    x: Float[Array, "batch *event"]


class Trace(NamedTuple):
    """What a sampler went through: x_t and the predicted x0 of every step."""

    xt: Float[Array, "steps batch *event"]
    x0: Float[Array, "steps batch *event"]


def sample(
    sampler: Sampler,
    denoise: Denoiser,
    logsnrs: Float[Array, "grid"],
    keys: Key[Array, "batch"],
    xT: Float[Array, "batch *event"],
    trace: bool | int = False,
    first: Int[Array, ""] | int | None = None,
) -> Any:
    """Walk `sampler` along `logsnrs`, in one loop.

    Args:
      denoise: called with x_t [B, *event] and one logsnr for all; never at +inf.
      logsnrs: rising, from noise to data, as `schedules.grid` makes them.
      keys: one for each image, of the noise that the steps add.
      xT: noise, already drawn.
      trace: return (x, Trace) instead of x; a number: of so many images, the first ones.
      first: the entry of `logsnrs` at which xT lies, as a number that may be traced; the entries
        before it are not visited.  Without a trace.
    """

    traced = None if trace is True else trace

    def step(state, now):
        number, logsnr_t, logsnr_s = now
        noise = jax.vmap(
            lambda key, x: jax.random.normal(jax.random.fold_in(key, number), x.shape, x.dtype)
        )(keys, state.x)
        after, prediction = sampler.step(denoise, state, noise, logsnr_t, logsnr_s)
        return after, Trace(state.x[:traced], prediction.x0[:traced]) if trace else None

    if first is not None:
        last = len(logsnrs) - 1
        visit = lambda i, state: step(state, (i, logsnrs[i], logsnrs[i + 1]))[0]  # noqa: E731
        return jax.lax.fori_loop(first, last, visit, sampler.init(xT)).x
    steps = jnp.arange(len(logsnrs) - 1), logsnrs[:-1], logsnrs[1:]
    state, seen = jax.lax.scan(step, sampler.init(xT), steps)
    return (state.x, seen) if trace else state.x


def _within(what: str, value: float, most: float = float("inf")) -> None:
    """Raises ValueError unless 0 <= value <= most, finite."""
    if not (0 <= value <= most and value < float("inf")):
        allowed = f"between 0 and {most:g}" if most < float("inf") else "finite and at least 0"
        raise ValueError(f"{what} must be {allowed}, not {value:g}")


def ancestral(variance: Variance = "posterior", noise_scale: float = 1.0) -> Sampler:
    """Draw of p(x_s | x_t) (Ho et al. 2020, alg. 2): x0's posterior mean, and noise.

    Args:
      variance: "posterior" (the lower one), "beta" (the upper one) or "learned".
      noise_scale: of the noise that is added; less than 1 is no sampler, but shows why.

    Raises:
      ValueError: `noise_scale` is not between 0 and 1.
    """
    _within("the noise scale of ancestral sampling", noise_scale, 1.0)

    def step(denoise, state, noise, logsnr_t, logsnr_s):
        prediction = denoise(state.x, logsnr_t)
        mean, _ = q_posterior(prediction.x0, state.x, logsnr_t, logsnr_s)
        clean = jnp.isposinf(logsnr_s)  # where the variance is 0; its log gets another logsnr
        finite = jnp.where(clean, logsnr_t + 1.0, logsnr_s)
        log_variance = reverse_log_variance(prediction, variance, logsnr_t, finite)
        std = jnp.where(clean, 0.0, jnp.exp(0.5 * log_variance))
        return State(mean + noise_scale * std * noise), prediction

    return Sampler(State, step)


def ddim(eta: float = 0.0) -> Sampler:
    """DDIM (Song et al. 2021, eq. 12 and 16): eta 0 is an ODE step, eta 1 is `ancestral`.

    x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std noise,  std = eta std_posterior

    Raises:
      ValueError: `eta` is not between 0 and 1, where x_s has the marginal variance.
    """
    _within("DDIM's eta", eta, 1.0)

    def step(denoise, state, noise, logsnr_t, logsnr_s):
        prediction = denoise(state.x, logsnr_t)
        alpha, sigma = alpha_sigma(logsnr_s)
        _, variance = q_posterior(prediction.x0, state.x, logsnr_t, logsnr_s)
        variance = eta**2 * variance
        direction = jnp.sqrt(jnp.maximum(jnp.square(sigma) - variance, 0.0))
        x = alpha * prediction.x0 + direction * prediction.eps + jnp.sqrt(variance) * noise
        return State(x), prediction

    return Sampler(State, step)


def _heun_step(denoise, x, logsnr_t, logsnr_s):
    """Heun's step of dy / dsigma = eps, y = x / alpha, sigma = exp(-logsnr / 2)."""
    prediction = denoise(x, logsnr_t)
    alpha, sigma = alpha_sigma(logsnr_s)
    euler = alpha * prediction.x0 + sigma * prediction.eps

    def correct(_):
        eps = (prediction.eps + denoise(euler, logsnr_s).eps) / 2
        change = jnp.exp(-0.5 * logsnr_s) - jnp.exp(-0.5 * logsnr_t)
        return alpha * (x / alpha_sigma(logsnr_t)[0] + change * eps)

    return jax.lax.cond(jnp.isposinf(logsnr_s), lambda _: euler, correct, None), prediction


def heun() -> Sampler:
    """Heun's second-order ODE step (Karras et al. 2022, alg. 1): two evaluations a step."""

    def step(denoise, state, noise, logsnr_t, logsnr_s):
        x, prediction = _heun_step(denoise, state.x, logsnr_t, logsnr_s)
        return State(x), prediction

    return Sampler(State, step)


def edm(
    steps: int,
    churn: float = 40.0,
    low: float = 0.05,
    high: float = 50.0,
    noise_scale: float = 1.003,
) -> Sampler:
    """EDM's stochastic sampler (Karras et al. 2022, alg. 2): some noise, then Heun's step.

    sigma_hat = sigma (1 + gamma), gamma = min(churn / steps, sqrt(2) - 1) where sigma lies
    between `low` and `high`, else 0.

    Raises:
      ValueError: a number is negative or not finite, or `low` exceeds `high`.
    """
    for what, value in (("churn", churn), ("noise scale", noise_scale)):
        _within(f"EDM's {what}", value)
    if not 0 <= low <= high:
        raise ValueError(f"EDM's noise levels must satisfy 0 <= low <= high, not {low:g}, {high:g}")
    most = min(churn / steps, 2**0.5 - 1)

    def step(denoise, state, noise, logsnr_t, logsnr_s):
        sigma = jnp.exp(-0.5 * logsnr_t)
        gamma = jnp.where((low <= sigma) & (sigma <= high), most, 0.0)
        logsnr_hat = logsnr_t - 2 * jnp.log1p(gamma)
        added = sigma * jnp.sqrt(jnp.square(1 + gamma) - 1) * noise_scale
        y = state.x / alpha_sigma(logsnr_t)[0] + added * noise
        x, prediction = _heun_step(denoise, y * alpha_sigma(logsnr_hat)[0], logsnr_hat, logsnr_s)
        return State(x), prediction

    return Sampler(State, step)


class TwoStep(NamedTuple):
    """Of samplers that remember the last x0 and where it was predicted (NaN: nowhere yet)."""

    x: Float[Array, "batch *event"]
    x0: Float[Array, "batch *event"]
    logsnr: Scalar


def _two_step_init(xT):
    return TwoStep(xT, jnp.zeros_like(xT), jnp.full((), jnp.nan, xT.dtype))


def _extrapolation(state, prediction, logsnr_t, logsnr_s):
    """(x0 - last x0) / 2r with r = h_last / h, or 0 at the first and the last step."""
    second = (logsnr_t > state.logsnr) & jnp.isfinite(logsnr_s)  # no number exceeds NaN
    h = jnp.where(second, logsnr_s - logsnr_t, 0.0)
    h_last = jnp.where(second, logsnr_t - state.logsnr, 1.0)
    return h / h_last / 2 * (prediction.x0 - state.x0)


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022b, alg. 2): multistep, one evaluation a step.

    x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D,  D = x0 + (x0 - last x0) / 2r
    """

    def step(denoise, state, noise, logsnr_t, logsnr_s):
        prediction = denoise(state.x, logsnr_t)
        data = prediction.x0 + _extrapolation(state, prediction, logsnr_t, logsnr_s)
        alpha, sigma = alpha_sigma(logsnr_s)
        rise = -jnp.expm1(-0.5 * (logsnr_s - logsnr_t))
        x = sigma / alpha_sigma(logsnr_t)[1] * state.x + alpha * rise * data
        return TwoStep(x, prediction.x0, logsnr_t), prediction

    return Sampler(_two_step_init, step)


def dpmpp_2m_sde() -> Sampler:
    """The SDE form of DPM-Solver++(2M) (Lu et al. 2022b, app. D, eq. 22).

    x_s = sigma_s / sigma_t e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) noise
    """

    def step(denoise, state, noise, logsnr_t, logsnr_s):
        prediction = denoise(state.x, logsnr_t)
        data = prediction.x0 + _extrapolation(state, prediction, logsnr_t, logsnr_s)
        alpha, sigma = alpha_sigma(logsnr_s)
        rise = -jnp.expm1(logsnr_t - logsnr_s)
        keep = sigma / alpha_sigma(logsnr_t)[1] * jnp.exp(-0.5 * (logsnr_s - logsnr_t))
        x = keep * state.x + alpha * rise * data + sigma * jnp.sqrt(rise) * noise
        return TwoStep(x, prediction.x0, logsnr_t), prediction

    return Sampler(_two_step_init, step)


class UniPCState(NamedTuple):
    """x, and what the corrector needs of the step before."""

    x: Float[Array, "batch *event"]
    x_before: Float[Array, "batch *event"]
    x0: Float[Array, "batch *event"]
    x0_before: Float[Array, "batch *event"]
    logsnr: Scalar
    logsnr_before: Scalar


def unipc() -> Sampler:
    """UniPC of order 2 with B(h) = e^h - 1 (Zhao et al. 2023, alg. 1-2): one evaluation a step.

    The evaluation at x_t first corrects the step that led to x_t, then predicts the next.
    """

    def init(xT):
        zeros, nowhere = jnp.zeros_like(xT), jnp.full((), jnp.nan, xT.dtype)
        return UniPCState(xT, zeros, zeros, zeros, nowhere, nowhere)

    def step(denoise, state, noise, logsnr_t, logsnr_s):
        prediction = denoise(state.x, logsnr_t)
        # Correct: from x_before at state.logsnr to here, with the x0 found here.  Where a step
        # before is missing (NaN), a finite logsnr keeps the unused branch's gradient finite.
        first, second = jnp.isnan(state.logsnr), jnp.isnan(state.logsnr_before)
        last = jnp.where(first, logsnr_t - 1.0, state.logsnr)
        last_but_one = jnp.where(second, last - 1.0, state.logsnr_before)
        h = 0.5 * (logsnr_t - last)
        alpha, sigma = alpha_sigma(logsnr_t)
        rise = -jnp.expm1(-h)
        base = sigma / alpha_sigma(last)[1] * state.x_before + alpha * rise * state.x0
        new = prediction.x0 - state.x0
        phi = (1 - rise / h) / rise  # (h - 1 + e^-h) / (h (1 - e^-h)): sum of the two weights
        phi_2 = (1 - 2 * (h - rise) / jnp.square(h)) / rise
        ratio = 0.5 * (last_but_one - last) / h  # negative
        weight_new = (phi_2 - ratio * phi) / (1 - ratio)
        weight_old = (phi - weight_new) / ratio
        old = state.x0_before - state.x0
        change = jnp.where(second, 0.5 * new, weight_new * new + weight_old * old)
        x = jnp.where(first, state.x, base + alpha * rise * change)
        # Predict: as DPM-Solver++(2M).
        memory = TwoStep(x, state.x0, state.logsnr)
        data = prediction.x0 + _extrapolation(memory, prediction, logsnr_t, logsnr_s)
        alpha, sigma_s = alpha_sigma(logsnr_s)
        rise = -jnp.expm1(-0.5 * (logsnr_s - logsnr_t))
        after = sigma_s / sigma * x + alpha * rise * data
        return UniPCState(after, x, prediction.x0, state.x0, logsnr_t, state.logsnr), prediction

    return Sampler(init, step)


def invert(
    denoise: Denoiser, logsnrs: Float[Array, "grid"], x0: Float[Array, "batch *event"]
) -> Float[Array, "batch *event"]:
    """The noise from which `ddim()` leads to x0: its steps taken backwards (Song et al. 2021).

    Args:
      logsnrs: rising, as for `sample`; the last, +inf, is where x0 lies, and the first step
        back from it takes the prediction of the cleanest finite entry.
    """
    down = logsnrs[:-1][::-1]
    alpha, _ = alpha_sigma(down[0])
    x = alpha * x0

    def step(x, pair):
        prediction = denoise(x, pair[0])
        alpha, sigma = alpha_sigma(pair[1])
        return alpha * prediction.x0 + sigma * prediction.eps, None

    return jax.lax.scan(step, x, jnp.stack([down[:-1], down[1:]], -1))[0]


def slerp(
    a: Float[Array, "*event"], b: Float[Array, "*event"], share: float | Array
) -> Float[Array, "*event"]:
    """The point of the great circle from a to b: noise between two noises stays noise.

    (sin((1 - share) angle) a + sin(share angle) b) / sin(angle) (Shoemake 1985, sec. 3.3).  Where
    a and b fix no great circle (they are parallel or opposite, or one is 0), the point of the
    straight line, (1 - share) a + share b.

    Args:
      share: 0 gives a, 1 gives b.
    """
    size_a, size_b = jnp.sum(jnp.square(a)), jnp.sum(jnp.square(b))
    nonzero = (size_a > 0) & (size_b > 0)
    unit_a, unit_b = (
        x / jnp.sqrt(jnp.where(nonzero, n, 1.0)) for x, n in ((a, size_a), (b, size_b))
    )
    apart, together = jnp.sum(jnp.square(unit_a - unit_b)), jnp.sum(jnp.square(unit_a + unit_b))
    least = jnp.square(10 * jnp.finfo(apart.dtype).eps)
    curved = nonzero & (apart > least) & (together > least)
    # Both branches are finite everywhere, and so are their gradients.
    apart, together = jnp.where(curved, apart, 2.0), jnp.where(curved, together, 2.0)
    angle = 2 * jnp.arctan2(jnp.sqrt(apart), jnp.sqrt(together))
    arc = (jnp.sin((1 - share) * angle) * a + jnp.sin(share * angle) * b) / jnp.sin(angle)
    return jnp.where(curved, arc, (1 - share) * a + share * b)


# What `--sampler` knows: name -> (steps[, the number after a colon]) -> Sampler.
SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ancestral": lambda steps, noise=1.0: ancestral("posterior", noise),
    "ancestral_beta": lambda steps, noise=1.0: ancestral("beta", noise),
    "ancestral_learned": lambda steps, noise=1.0: ancestral("learned", noise),
    "ddim": lambda steps, eta=0.0: ddim(eta),
    "heun": lambda steps: heun(),
    "edm": lambda steps, churn=40.0: edm(steps, churn),
    "dpmpp_2m": lambda steps: dpmpp_2m(),
    "dpmpp_2m_sde": lambda steps: dpmpp_2m_sde(),
    "unipc": lambda steps: unipc(),
}


def named(name: str, steps: int) -> Sampler:
    """The sampler of a name: "ddim", or "ddim:0.5" for eta 0.5.

    Raises:
      KeyError: there is none of that name.
      ValueError: there is a colon without a number, or with one that the sampler cannot take.
    """
    base, colon, text = name.partition(":")
    make = SAMPLERS[base]
    if not colon:
        return make(steps)
    if not make.__defaults__:
        raise ValueError(f"{base} takes no number; use {base}")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f'"{text}" is not a number; use {base}:NUMBER or {base}') from None
    return make(steps, value)
