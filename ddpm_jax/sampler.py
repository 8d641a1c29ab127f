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
from jaxtyping import Array, Float, Key

from ddpm_jax.prediction import Denoiser, Prediction, Variance, reverse_log_variance
from ddpm_jax.process import alpha_sigma, q_posterior

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
) -> Any:
    """Walk `sampler` along `logsnrs`, in one `lax.scan`.

    Args:
      denoise: called with x_t [B, *event] and one logsnr for all; never at +inf.
      logsnrs: rising, from noise to data, as `schedule.grid` makes them.
      keys: one for each image, of the noise that the steps add.
      xT: noise, already drawn.
      trace: return (x, Trace) instead of x; a number: of so many images, the first ones.
    """

    traced = None if trace is True else trace

    def step(state, now):
        number, logsnr_t, logsnr_s = now
        noise = jax.vmap(
            lambda key, x: jax.random.normal(jax.random.fold_in(key, number), x.shape, x.dtype)
        )(keys, state.x)
        after, prediction = sampler.step(denoise, state, noise, logsnr_t, logsnr_s)
        return after, Trace(state.x[:traced], prediction.x0[:traced]) if trace else None

    steps = jnp.arange(len(logsnrs) - 1), logsnrs[:-1], logsnrs[1:]
    state, seen = jax.lax.scan(step, sampler.init(xT), steps)
    return (state.x, seen) if trace else state.x


def ancestral(variance: Variance = "posterior", noise_scale: float = 1.0) -> Sampler:
    """Draw of p(x_s | x_t) (Ho et al. 2020, alg. 2): x0's posterior mean, and noise.

    Args:
      variance: "posterior" (the lower one), "beta" (the upper one) or "learned".
      noise_scale: of the noise that is added; less than 1 is no sampler, but shows why.
    """

    def step(denoise, state, noise, logsnr_t, logsnr_s):
        prediction = denoise(state.x, logsnr_t)
        mean, _ = q_posterior(prediction.x0, state.x, logsnr_t, logsnr_s)
        log_variance = reverse_log_variance(prediction, variance, logsnr_t, logsnr_s)
        std = jnp.where(jnp.isposinf(logsnr_s), 0.0, jnp.exp(0.5 * log_variance))
        return State(mean + noise_scale * std * noise), prediction

    return Sampler(State, step)


def ddim(eta: float = 0.0) -> Sampler:
    """DDIM (Song et al. 2021, eq. 12 and 16): eta 0 is an ODE step, eta 1 is `ancestral`.

    x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std noise,  std = eta std_posterior
    """

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
    """
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
    share = (logsnr_s - logsnr_t) / (logsnr_t - state.logsnr) / 2
    share = jnp.where(jnp.isfinite(share), share, 0.0)
    return share * (prediction.x0 - state.x0)


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
        # Correct: from x_before at state.logsnr to here, with the x0 found here.
        h = 0.5 * (logsnr_t - state.logsnr)
        alpha, sigma = alpha_sigma(logsnr_t)
        rise = -jnp.expm1(-h)
        base = sigma / alpha_sigma(state.logsnr)[1] * state.x_before + alpha * rise * state.x0
        new = prediction.x0 - state.x0
        phi = (1 - rise / h) / rise  # (h - 1 + e^-h) / (h (1 - e^-h)): sum of the two weights
        phi_2 = (1 - 2 * (h - rise) / jnp.square(h)) / rise
        ratio = 0.5 * (state.logsnr_before - state.logsnr) / h  # negative
        weight_new = (phi_2 - ratio * phi) / (1 - ratio)
        weight_old = (phi - weight_new) / ratio
        old = state.x0_before - state.x0
        second = weight_new * new + weight_old * old
        corrected = base + alpha * rise * jnp.where(jnp.isnan(ratio), 0.5 * new, second)
        x = jnp.where(jnp.isnan(h), state.x, corrected)
        # Predict: as DPM-Solver++(2M).
        last = TwoStep(x, state.x0, state.logsnr)
        data = prediction.x0 + _extrapolation(last, prediction, logsnr_t, logsnr_s)
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
    """The point of the great circle from a to b: noise between two noises stays noise."""
    cosine = jnp.sum(a * b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    return (jnp.sin((1 - share) * angle) * a + jnp.sin(share * angle) * b) / jnp.sin(angle)


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
      ValueError: what stands behind the colon is no number, or one that means nothing to it.
    """
    base, colon, text = name.partition(":")
    make = SAMPLERS[base]
    if not colon:
        return make(steps)
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError("a sampler's number is 0 or more")
    try:
        return make(steps, value)
    except TypeError:
        raise ValueError(f"{base} takes no number") from None
