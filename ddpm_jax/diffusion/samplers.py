"""Samplers, which step from x_t to a cleaner x_s, and the loop over all sampling steps.

With the predicted x0 and eps at x_t, and h = (logsnr_s - logsnr_t) / 2 > 0,

    DDIM:           x_s = alpha_s x0 + sigma_s eps                                       (1)
    ODE in x0:      x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) x0 + O(h^2)         (2)

(1) and (2) are the same step, up to O(h^2). A step to logsnr +inf returns the predicted x0: the
step adds no noise, is of first order, and does not call the denoiser at +inf.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.diffusion.prediction import Denoiser, Prediction, Variance, reverse_log_variance
from ddpm_jax.diffusion.process import alpha_sigma, q_posterior
from ddpm_jax.diffusion.shared_steps import (
    Sampler,
    TwoStepState,
    check_range,
    extrapolation,
    heun_step,
    init_two_step,
    unipc,
)

Scalar = Float[Array, ""]


class State(NamedTuple):
    """The state of a single-step sampler, which is the current x_t."""

    x: Float[Array, "batch *event"]


class Trace(NamedTuple):
    """The x_t at the start of every sampling step, and the x0 that is predicted from this x_t."""

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
    """Return images that `sampler` computes from the noise xT, in steps along the grid `logsnrs`.

    >>> from ddpm_jax.diffusion import grids, prediction, schedules
    >>> def denoise(xt, logsnr):  # exact for data that are 0.5 everywhere
    ...     return prediction.with_x0(Prediction(xt, xt), jnp.full_like(xt, 0.5), xt, logsnr)
    >>> logsnrs = grids.grid(schedules.cosine(), 4)
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> print(sample(ddim(), denoise, logsnrs, keys, jnp.ones((2, 1))).ravel())
    [0.5 0.5]

    Args:
      sampler: The sampler.
      denoise: The denoiser, which is called with x_t [B, *event] and the same finite logsnr for
        all images.
      logsnrs: The logsnr of every step, increasing from noise to +inf, from `grids.grid`.
      keys: A random key for each image, [B], for the noise that the steps add.
      xT: The initial noise, [B, *event].
      first: The index of the logsnr of xT in `logsnrs`, which may be a traced value. Earlier
        entries of `logsnrs` are not used. If None, all entries are used.
    """

    def step_from_first(i: Array, state: PyTree) -> PyTree:
        return _step(sampler, denoise, keys, state, (i, logsnrs[i], logsnrs[i + 1]))[0]

    def step(state: PyTree, times: tuple[Array, Array, Array]) -> tuple[PyTree, None]:
        return _step(sampler, denoise, keys, state, times)[0], None

    if first is None:
        steps = jnp.arange(len(logsnrs) - 1), logsnrs[:-1], logsnrs[1:]
        state, _ = jax.lax.scan(step, sampler.init(xT), steps)
    else:
        state = jax.lax.fori_loop(first, len(logsnrs) - 1, step_from_first, sampler.init(xT))
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
    """Return the same images as `sample`, and the x_t and the predicted x0 of every step.

    Args:
      sampler: The sampler.
      denoise: The denoiser.
      logsnrs: The logsnr of every step, increasing from noise to +inf, from `grids.grid`.
      keys: A random key for each image, [B], for the noise that the steps add.
      xT: The initial noise, [B, *event].
      count: The trace contains the first `count` images. If None, it contains all images.
    """

    def step(state: PyTree, times: tuple[Array, Array, Array]) -> tuple[PyTree, Trace]:
        after, prediction = _step(sampler, denoise, keys, state, times)
        return after, Trace(state.x[:count], prediction.x0[:count])

    steps = jnp.arange(len(logsnrs) - 1), logsnrs[:-1], logsnrs[1:]
    state, trace = jax.lax.scan(step, sampler.init(xT), steps)
    return state.x, trace


def _step(
    sampler: Sampler, denoise: Denoiser, keys: Key[Array, "batch"], state: PyTree,
    times: tuple[Array | int, Array, Array],
) -> tuple[PyTree, Prediction]:  # fmt: skip
    """Take sampling step `times` = (index, logsnr_t, logsnr_s); return the state and prediction."""
    index, logsnr_t, logsnr_s = times
    noise = jax.vmap(
        lambda key, x: jax.random.normal(jax.random.fold_in(key, index), x.shape, x.dtype)
    )(keys, state.x)
    return sampler.step(denoise, state, noise, logsnr_t, logsnr_s)


def ancestral(variance: Variance = "posterior", noise_scale: float = 1.0) -> Sampler:
    """Return the ancestral sampler, which samples x_s ~ p(x_s | x_t) (Ho et al. 2020, alg. 2).

    Args:
      variance: The variance of p: "posterior", "beta" (which is larger) or "learned".
      noise_scale: A factor of the added noise, from 0 to 1. With a factor below 1 the sampler
        does not sample p; such factors show the effect of the noise.

    Raises:
      ValueError: If `noise_scale` is not between 0 and 1.
    """
    check_range("the noise scale of ancestral sampling", noise_scale, 1.0)

    def step(
        denoise: Denoiser, state: State, noise: Array, logsnr_t: Scalar, logsnr_s: Scalar
    ) -> tuple[State, Prediction]:
        prediction = denoise(state.x, logsnr_t)
        mean, _ = q_posterior(prediction.x0, state.x, logsnr_t, logsnr_s)
        # At +inf the variance is 0, and its log is computed at a finite logsnr instead.
        clean = jnp.isposinf(logsnr_s)
        finite = jnp.where(clean, logsnr_t + 1.0, logsnr_s)
        log_variance = reverse_log_variance(prediction, variance, logsnr_t, finite)
        std = jnp.where(clean, 0.0, jnp.exp(0.5 * log_variance))
        return State(mean + noise_scale * std * noise), prediction

    return Sampler(State, step)


def ddim(eta: float = 0.0) -> Sampler:
    """Return the DDIM sampler (Song et al. 2021, eq. 12 and 16).

    x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std noise,  std = eta std_posterior, where
    std_posterior is the standard deviation of q(x_s | x_t, x_0)

    With eta = 0 the sampler adds no noise, eq. (1); with eta = 1 it equals `ancestral`.

    Raises:
      ValueError: If `eta` is not between 0 and 1; above 1 the square root may not exist.
    """
    check_range("DDIM's eta", eta, 1.0)

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
    """Return Heun's sampler, which calls the denoiser twice per step (Karras et al. 2022)."""

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
    """Return EDM's stochastic sampler (Karras et al. 2022, alg. 2).

    Every step adds noise and then takes Heun's step. The noise increases sigma = exp(-logsnr / 2)
    to sigma (1 + gamma), where gamma = min(churn / steps, sqrt(2) - 1) if low <= sigma <= high,
    else 0.

    Args:
      steps: The number of sampling steps.
      churn: The maximum of the sum of gamma over all steps, EDM's S_churn.
      low: The lowest sigma at which noise is added.
      high: The highest sigma at which noise is added.
      noise_scale: A factor of the standard deviation of the added noise, EDM's S_noise.

    Raises:
      ValueError: If an argument is negative or not finite, or if `low` exceeds `high`.
    """
    for name, value in (("churn", churn), ("noise scale", noise_scale)):
        check_range(f"EDM's {name}", value)
    if not 0 <= low <= high:
        raise ValueError(
            f"EDM's noise levels must satisfy 0 <= low <= high, not low = {low:g}, high = {high:g}"
        )
    max_gamma = min(churn / steps, 2**0.5 - 1)

    def step(
        denoise: Denoiser, state: State, noise: Array, logsnr_t: Scalar, logsnr_s: Scalar
    ) -> tuple[State, Prediction]:
        sigma = jnp.exp(-0.5 * logsnr_t)
        gamma = jnp.where((low <= sigma) & (sigma <= high), max_gamma, 0.0)
        logsnr_hat = logsnr_t - 2 * jnp.log1p(gamma)
        added = sigma * jnp.sqrt(jnp.square(1 + gamma) - 1) * noise_scale
        y = state.x / alpha_sigma(logsnr_t)[0] + added * noise
        x, prediction = heun_step(denoise, y * alpha_sigma(logsnr_hat)[0], logsnr_hat, logsnr_s)
        return State(x), prediction

    return Sampler(State, step)


def dpmpp_2m() -> Sampler:
    """Return the two-step sampler DPM-Solver++(2M) (Lu et al. 2022b, alg. 2).

    x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D,  D = x0 + (x0 - previous x0) / 2r,
    r = previous h / h, where "previous" is the previous sampling step. In the first and the last
    step D is x0. The sampler calls the denoiser once per step.
    """

    def step(
        denoise: Denoiser, state: TwoStepState, noise: Array, logsnr_t: Scalar, logsnr_s: Scalar
    ) -> tuple[TwoStepState, Prediction]:
        prediction = denoise(state.x, logsnr_t)
        data = prediction.x0 + extrapolation(state, prediction, logsnr_t, logsnr_s)
        alpha, sigma = alpha_sigma(logsnr_s)
        rise = -jnp.expm1(-0.5 * (logsnr_s - logsnr_t))
        x = sigma / alpha_sigma(logsnr_t)[1] * state.x + alpha * rise * data
        return TwoStepState(x, prediction.x0, logsnr_t), prediction

    return Sampler(init_two_step, step)


def dpmpp_2m_sde() -> Sampler:
    """Return the stochastic form of DPM-Solver++(2M) (Lu et al. 2022b, app. D, eq. 22).

    x_s = sigma_s / sigma_t e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) noise,
    with the D of `dpmpp_2m`
    """

    def step(
        denoise: Denoiser, state: TwoStepState, noise: Array, logsnr_t: Scalar, logsnr_s: Scalar
    ) -> tuple[TwoStepState, Prediction]:
        prediction = denoise(state.x, logsnr_t)
        data = prediction.x0 + extrapolation(state, prediction, logsnr_t, logsnr_s)
        alpha, sigma = alpha_sigma(logsnr_s)
        rise = -jnp.expm1(logsnr_t - logsnr_s)
        weight = sigma / alpha_sigma(logsnr_t)[1] * jnp.exp(-0.5 * (logsnr_s - logsnr_t))
        x = weight * state.x + alpha * rise * data + sigma * jnp.sqrt(rise) * noise
        return TwoStepState(x, prediction.x0, logsnr_t), prediction

    return Sampler(init_two_step, step)


class SamplerEntry(NamedTuple):
    """A sampler of the option `--sampler`, such as `ddim` or `ddim:0.5`.

    Attributes:
      make: A function (sampling steps, number after the colon) -> sampler.
      default: The number if the name has no colon. If None, the sampler accepts no number.
    """

    make: Callable[[int, float], Sampler]
    default: float | None = None


SAMPLERS: dict[str, SamplerEntry] = {
    "ancestral": SamplerEntry(lambda steps, noise: ancestral("posterior", noise), 1.0),
    "ancestral_beta": SamplerEntry(lambda steps, noise: ancestral("beta", noise), 1.0),
    "ancestral_learned": SamplerEntry(lambda steps, noise: ancestral("learned", noise), 1.0),
    "ddim": SamplerEntry(lambda steps, eta: ddim(eta), 0.0),
    "heun": SamplerEntry(lambda steps, _: heun()),
    "edm": SamplerEntry(edm, 40.0),
    "dpmpp_2m": SamplerEntry(lambda steps, _: dpmpp_2m()),
    "dpmpp_2m_sde": SamplerEntry(lambda steps, _: dpmpp_2m_sde()),
    "unipc": SamplerEntry(lambda steps, _: unipc()),
}


def named(name: str, steps: int) -> Sampler:
    """Return the sampler with a name such as "ddim", or "ddim:0.5" for eta = 0.5.

    `steps` is the number of sampling steps.

    Raises:
      KeyError: If `SAMPLERS` does not contain the name before the colon.
      ValueError: If no number follows the colon, or the sampler does not accept the number.
    """
    base, colon, text = name.partition(":")
    make, default = SAMPLERS[base]
    if not colon:
        return make(steps, default or 0.0)
    if default is None:
        raise ValueError(f"the sampler {base} takes no number; use {base}")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(
            f'"{text}" after {base}: is not a number; use {base}:NUMBER or {base}'
        ) from None
    return make(steps, value)
