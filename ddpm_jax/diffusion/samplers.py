"""Samplers: a step from x_t to x_s, and the one driver that takes them all.

In the coordinates of `Prediction`, with h = (logsnr_s - logsnr_t) / 2 > 0,

    DDIM:           x_s = alpha_s x0 + sigma_s eps                                       (1)
    ODE in x0:      x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) x0 + O(h^2)         (2)

which are the same step.  A step to +inf ends at x0: no noise, first order, and no call of
the denoiser there.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.diffusion.prediction import Denoiser, Prediction, Variance, reverse_log_variance
from ddpm_jax.diffusion.process import alpha_sigma, q_posterior
from ddpm_jax.diffusion.shared_steps import TwoStep, check_within, extrapolation, heun_step, initial

Scalar = Float[Array, ""]


class Sampler(NamedTuple):
    """A sampler: init(xT) -> state with .x; step -> (state, Prediction).

    step(denoise, state, noise, logsnr_t, logsnr_s)
    """

    init: Callable[[Array], PyTree]
    step: Callable[[Denoiser, PyTree, Array, Scalar, Scalar], tuple[PyTree, Prediction]]


class State(NamedTuple):
    """State of a sampler that remembers nothing."""

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
    first: Int[Array, ""] | int | None = None,
) -> Float[Array, "batch *event"]:
    """Walk `sampler` along `logsnrs`, in one loop.

    Args:
      denoise: called with x_t [B, *event] and one logsnr for all; never at +inf.
      logsnrs: rising, from noise to data, as `grids.grid` makes them.
      keys: one for each image, of the noise that the steps add.
      xT: noise, already drawn.
      first: the entry of `logsnrs` at which xT lies, as a number that may be traced; the entries
        before it are not visited.
    """

    def visit(i: Array, state: PyTree) -> PyTree:
        return _step(sampler, denoise, keys, state, (i, logsnrs[i], logsnrs[i + 1]))[0]

    def take(state: PyTree, now: tuple[Array, Array, Array]) -> tuple[PyTree, None]:
        return _step(sampler, denoise, keys, state, now)[0], None

    if first is None:
        steps = jnp.arange(len(logsnrs) - 1), logsnrs[:-1], logsnrs[1:]
        state, _ = jax.lax.scan(take, sampler.init(xT), steps)
    else:
        state = jax.lax.fori_loop(first, len(logsnrs) - 1, visit, sampler.init(xT))
    x: Array = state.x
    return x


def sample_and_trace(
    sampler: Sampler,
    denoise: Denoiser,
    logsnrs: Float[Array, "grid"],
    keys: Key[Array, "batch"],
    xT: Float[Array, "batch *event"],
    count: int | None = None,
) -> tuple[Float[Array, "batch *event"], Trace]:
    """Return what `sample` returns, and the way there.

    Args:
      sampler, denoise, logsnrs, keys, xT: as for `sample`.
      count: the images whose trace is returned, the first ones; None: all.
    """

    def step(state: PyTree, now: tuple[Array, Array, Array]) -> tuple[PyTree, Trace]:
        after, prediction = _step(sampler, denoise, keys, state, now)
        return after, Trace(state.x[:count], prediction.x0[:count])

    steps = jnp.arange(len(logsnrs) - 1), logsnrs[:-1], logsnrs[1:]
    state, trace = jax.lax.scan(step, sampler.init(xT), steps)
    return state.x, trace


def _step(
    sampler: Sampler, denoise: Denoiser, keys: Key[Array, "batch"], state: PyTree,
    now: tuple[Array | int, Array, Array],
) -> tuple[PyTree, Prediction]:  # fmt: skip
    """Take the sampler's step of `now`, (number, logsnr_t, logsnr_s)."""
    number, logsnr_t, logsnr_s = now
    noise = jax.vmap(
        lambda key, x: jax.random.normal(jax.random.fold_in(key, number), x.shape, x.dtype)
    )(keys, state.x)
    return sampler.step(denoise, state, noise, logsnr_t, logsnr_s)


def ancestral(variance: Variance = "posterior", noise_scale: float = 1.0) -> Sampler:
    """Draw of p(x_s | x_t) (Ho et al. 2020, alg. 2): x0's posterior mean, and noise.

    Args:
      variance: "posterior" (the lower one), "beta" (the upper one) or "learned".
      noise_scale: of the noise that is added; less than 1 does not sample p, and shows why.

    Raises:
      ValueError: `noise_scale` is not between 0 and 1.
    """
    check_within("the noise scale of ancestral sampling", noise_scale, 1.0)

    def step(
        denoise: Denoiser, state: State, noise: Array, logsnr_t: Scalar, logsnr_s: Scalar
    ) -> tuple[State, Prediction]:
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
    check_within("DDIM's eta", eta, 1.0)

    def step(
        denoise: Denoiser, state: State, noise: Array, logsnr_t: Scalar, logsnr_s: Scalar
    ) -> tuple[State, Prediction]:
        prediction = denoise(state.x, logsnr_t)
        alpha, sigma = alpha_sigma(logsnr_s)
        _, variance = q_posterior(prediction.x0, state.x, logsnr_t, logsnr_s)
        variance = eta**2 * variance
        direction = jnp.sqrt(jnp.maximum(jnp.square(sigma) - variance, 0.0))
        x = alpha * prediction.x0 + direction * prediction.eps + jnp.sqrt(variance) * noise
        return State(x), prediction

    return Sampler(State, step)


def heun() -> Sampler:
    """Heun's second-order ODE step (Karras et al. 2022, alg. 1): two evaluations a step."""

    def step(
        denoise: Denoiser, state: State, noise: Array, logsnr_t: Scalar, logsnr_s: Scalar
    ) -> tuple[State, Prediction]:
        x, prediction = heun_step(denoise, state.x, logsnr_t, logsnr_s)
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

    Args:
      steps: steps of the sampler's grid.
      churn: sum of gamma over the steps, at most.
      low, high: values of sigma between which noise is added.
      noise_scale: of the noise that is added.

    Raises:
      ValueError: a number is negative or not finite, or `low` exceeds `high`.
    """
    for what, value in (("churn", churn), ("noise scale", noise_scale)):
        check_within(f"EDM's {what}", value)
    if not 0 <= low <= high:
        raise ValueError(f"EDM's noise levels must satisfy 0 <= low <= high, not {low:g}, {high:g}")
    most = min(churn / steps, 2**0.5 - 1)

    def step(
        denoise: Denoiser, state: State, noise: Array, logsnr_t: Scalar, logsnr_s: Scalar
    ) -> tuple[State, Prediction]:
        sigma = jnp.exp(-0.5 * logsnr_t)
        gamma = jnp.where((low <= sigma) & (sigma <= high), most, 0.0)
        logsnr_hat = logsnr_t - 2 * jnp.log1p(gamma)
        added = sigma * jnp.sqrt(jnp.square(1 + gamma) - 1) * noise_scale
        y = state.x / alpha_sigma(logsnr_t)[0] + added * noise
        x, prediction = heun_step(denoise, y * alpha_sigma(logsnr_hat)[0], logsnr_hat, logsnr_s)
        return State(x), prediction

    return Sampler(State, step)


def dpmpp_2m() -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022b, alg. 2): multistep, one evaluation a step.

    x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D,  D = x0 + (x0 - last x0) / 2r
    """

    def step(
        denoise: Denoiser, state: TwoStep, noise: Array, logsnr_t: Scalar, logsnr_s: Scalar
    ) -> tuple[TwoStep, Prediction]:
        prediction = denoise(state.x, logsnr_t)
        data = prediction.x0 + extrapolation(state, prediction, logsnr_t, logsnr_s)
        alpha, sigma = alpha_sigma(logsnr_s)
        rise = -jnp.expm1(-0.5 * (logsnr_s - logsnr_t))
        x = sigma / alpha_sigma(logsnr_t)[1] * state.x + alpha * rise * data
        return TwoStep(x, prediction.x0, logsnr_t), prediction

    return Sampler(initial, step)


def dpmpp_2m_sde() -> Sampler:
    """Return the SDE form of DPM-Solver++(2M) (Lu et al. 2022b, app. D, eq. 22).

    x_s = sigma_s / sigma_t e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) noise
    """

    def step(
        denoise: Denoiser, state: TwoStep, noise: Array, logsnr_t: Scalar, logsnr_s: Scalar
    ) -> tuple[TwoStep, Prediction]:
        prediction = denoise(state.x, logsnr_t)
        data = prediction.x0 + extrapolation(state, prediction, logsnr_t, logsnr_s)
        alpha, sigma = alpha_sigma(logsnr_s)
        rise = -jnp.expm1(logsnr_t - logsnr_s)
        keep = sigma / alpha_sigma(logsnr_t)[1] * jnp.exp(-0.5 * (logsnr_s - logsnr_t))
        x = keep * state.x + alpha * rise * data + sigma * jnp.sqrt(rise) * noise
        return TwoStep(x, prediction.x0, logsnr_t), prediction

    return Sampler(initial, step)


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

    def init(xT: Array) -> UniPCState:
        zeros, nowhere = jnp.zeros_like(xT), jnp.full((), jnp.nan, xT.dtype)
        return UniPCState(xT, zeros, zeros, zeros, nowhere, nowhere)

    def step(
        denoise: Denoiser, state: UniPCState, noise: Array, logsnr_t: Scalar, logsnr_s: Scalar
    ) -> tuple[UniPCState, Prediction]:
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
        data = prediction.x0 + extrapolation(memory, prediction, logsnr_t, logsnr_s)
        alpha, sigma_s = alpha_sigma(logsnr_s)
        rise = -jnp.expm1(-0.5 * (logsnr_s - logsnr_t))
        after = sigma_s / sigma * x + alpha * rise * data
        return UniPCState(after, x, prediction.x0, state.x0, logsnr_t, state.logsnr), prediction

    return Sampler(init, step)


class Named(NamedTuple):
    """make(steps, number) -> Sampler; default: the number that a bare name stands for."""

    make: Callable[[int, float], Sampler]
    default: float | None = None  # None: the name takes no number


# What `--sampler` knows.
SAMPLERS: dict[str, Named] = {
    "ancestral": Named(lambda steps, noise: ancestral("posterior", noise), 1.0),
    "ancestral_beta": Named(lambda steps, noise: ancestral("beta", noise), 1.0),
    "ancestral_learned": Named(lambda steps, noise: ancestral("learned", noise), 1.0),
    "ddim": Named(lambda steps, eta: ddim(eta), 0.0),
    "heun": Named(lambda steps, _: heun()),
    "edm": Named(edm, 40.0),
    "dpmpp_2m": Named(lambda steps, _: dpmpp_2m()),
    "dpmpp_2m_sde": Named(lambda steps, _: dpmpp_2m_sde()),
    "unipc": Named(lambda steps, _: unipc()),
}


def named(name: str, steps: int) -> Sampler:
    """Return the sampler of a name: "ddim", or "ddim:0.5" for eta 0.5.

    Raises:
      KeyError: there is none of that name.
      ValueError: there is a colon without a number, or with one that the sampler cannot take.
    """
    base, colon, text = name.partition(":")
    make, default = SAMPLERS[base]
    if not colon:
        return make(steps, default or 0.0)
    if default is None:
        raise ValueError(f"{base} takes no number; use {base}")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f'"{text}" is not a number; use {base}:NUMBER or {base}') from None
    return make(steps, value)
