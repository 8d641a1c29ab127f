"""The type `Sampler`, Heun's step, the two-step extrapolation, UniPC, and a check of numbers."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ddpm_jax.diffusion.prediction import Denoiser, Prediction
from ddpm_jax.diffusion.process import alpha_sigma

Scalar = Float[Array, ""]


class Sampler(NamedTuple):
    """A sampler, which consists of two functions.

    Attributes:
      init: A function from the initial noise xT to the initial state. A state has the field x, the
        current x_t.
      step: The function (denoise, state at x_t, noise, logsnr_t, logsnr_s) -> (state at x_s,
        prediction at x_t).
    """

    init: Callable[[Array], PyTree]
    step: Callable[[Denoiser, PyTree, Array, Scalar, Scalar], tuple[PyTree, Prediction]]


def heun_step(
    denoise: Denoiser, x: Array, logsnr_t: Scalar, logsnr_s: Scalar
) -> tuple[Array, Prediction]:
    """Take Heun's step of the ODE dy / dsigma = eps with y = x / alpha, sigma = exp(-logsnr / 2).

    A step to logsnr +inf is Euler's step, whose result is the predicted x0.

    Args:
      denoise: The denoiser, which is called at both ends of the step, but not at +inf.
      x: The noisy images x_t, [B, *event].
      logsnr_t: The log signal-to-noise ratio at the start of the step.
      logsnr_s: The log signal-to-noise ratio at the cleaner end of the step.

    Returns:
      x_s and the prediction at x_t.
    """
    prediction = denoise(x, logsnr_t)
    alpha, sigma = alpha_sigma(logsnr_s)
    euler = alpha * prediction.x0 + sigma * prediction.eps

    def correct(_: None) -> Array:
        eps = (prediction.eps + denoise(euler, logsnr_s).eps) / 2
        change = jnp.exp(-0.5 * logsnr_s) - jnp.exp(-0.5 * logsnr_t)
        return alpha * (x / alpha_sigma(logsnr_t)[0] + change * eps)

    end: Array = jax.lax.cond(jnp.isposinf(logsnr_s), lambda _: euler, correct, None)
    return end, prediction


class TwoStepState(NamedTuple):
    """The state of a two-step sampler.

    Attributes:
      x: The current x_t.
      x0: The x0 that the previous sampling step predicted.
      logsnr: The logsnr at which `x0` was predicted; NaN before the first step.
    """

    x: Float[Array, "batch *event"]
    x0: Float[Array, "batch *event"]
    logsnr: Scalar


def init_two_step(xT: Array) -> TwoStepState:
    """Return the state of a two-step sampler before the first step, with the initial noise xT."""
    return TwoStepState(xT, jnp.zeros_like(xT), jnp.full((), jnp.nan, xT.dtype))


def extrapolation(
    state: TwoStepState, prediction: Prediction, logsnr_t: Scalar, logsnr_s: Scalar
) -> Array:
    """Return the second-order correction of the predicted x0 (Lu et al. 2022b, alg. 2).

    (x0 - previous x0) / 2r, r = previous h / h, where h is logsnr_s - logsnr_t and "previous" is
    the previous sampling step. The result is 0 in the first step and in the step to +inf.

    Args:
      state: The state, which contains the previous x0 and the logsnr of the previous x0.
      prediction: The prediction at x_t.
      logsnr_t: The log signal-to-noise ratio at the start of the step.
      logsnr_s: The log signal-to-noise ratio at the cleaner end of the step.
    """
    second = (logsnr_t > state.logsnr) & jnp.isfinite(logsnr_s)  # comparison with NaN is false
    h = jnp.where(second, logsnr_s - logsnr_t, 0.0)
    h_previous = jnp.where(second, logsnr_t - state.logsnr, 1.0)
    return h / h_previous / 2 * (prediction.x0 - state.x0)


class UniPCState(NamedTuple):
    """The state of UniPC, with results of the last two sampling steps.

    Attributes:
      x: The current x_t, before UniPC corrects it.
      x_before: The corrected x_t of the previous step.
      x0: The x0 that the previous step predicted.
      x0_before: The x0 that the step before the previous step predicted.
      logsnr: The logsnr at which `x0` was predicted; NaN before the first step.
      logsnr_before: The logsnr at which `x0_before` was predicted; NaN before the second step.
    """

    x: Float[Array, "batch *event"]
    x_before: Float[Array, "batch *event"]
    x0: Float[Array, "batch *event"]
    x0_before: Float[Array, "batch *event"]
    logsnr: Scalar
    logsnr_before: Scalar


def unipc() -> Sampler:
    """Return the sampler UniPC of order 2 with B(h) = e^h - 1 (Zhao et al. 2023, alg. 1-2).

    The sampler calls the denoiser once per step. The prediction at x_t is used twice: to correct
    x_t, and to compute x_s.
    """

    def init(xT: Array) -> UniPCState:
        zeros, undefined = jnp.zeros_like(xT), jnp.full((), jnp.nan, xT.dtype)
        return UniPCState(xT, zeros, zeros, zeros, undefined, undefined)

    def step(
        denoise: Denoiser, state: UniPCState, noise: Array, logsnr_t: Scalar, logsnr_s: Scalar
    ) -> tuple[UniPCState, Prediction]:
        prediction = denoise(state.x, logsnr_t)
        # Correct the step from x_before at state.logsnr to x_t, with the new x0. In the first two
        # steps a finite logsnr replaces NaN, so that the gradient of the unused branch is finite.
        first, second = jnp.isnan(state.logsnr), jnp.isnan(state.logsnr_before)
        logsnr_1 = jnp.where(first, logsnr_t - 1.0, state.logsnr)
        logsnr_2 = jnp.where(second, logsnr_1 - 1.0, state.logsnr_before)
        h = 0.5 * (logsnr_t - logsnr_1)
        alpha, sigma = alpha_sigma(logsnr_t)
        rise = -jnp.expm1(-h)
        base = sigma / alpha_sigma(logsnr_1)[1] * state.x_before + alpha * rise * state.x0
        new = prediction.x0 - state.x0
        phi = (1 - rise / h) / rise  # (h - 1 + e^-h) / (h (1 - e^-h)): sum of the two weights
        phi_2 = (1 - 2 * (h - rise) / jnp.square(h)) / rise
        ratio = 0.5 * (logsnr_2 - logsnr_1) / h  # negative
        weight_new = (phi_2 - ratio * phi) / (1 - ratio)
        weight_old = (phi - weight_new) / ratio
        old = state.x0_before - state.x0
        change = jnp.where(second, 0.5 * new, weight_new * new + weight_old * old)
        x = jnp.where(first, state.x, base + alpha * rise * change)
        # Predict x_s as DPM-Solver++(2M) does.
        history = TwoStepState(x, state.x0, state.logsnr)
        data = prediction.x0 + extrapolation(history, prediction, logsnr_t, logsnr_s)
        alpha, sigma_s = alpha_sigma(logsnr_s)
        rise = -jnp.expm1(-0.5 * (logsnr_s - logsnr_t))
        after = sigma_s / sigma * x + alpha * rise * data
        return UniPCState(after, x, prediction.x0, state.x0, logsnr_t, state.logsnr), prediction

    return Sampler(init, step)


def check_range(name: str, value: float, maximum: float = float("inf")) -> None:
    """Check that `value` is finite and 0 <= value <= maximum.

    Raises:
      ValueError: If `value` is not in this range; the message begins with `name`.
    """
    if not (0 <= value <= maximum and value < float("inf")):
        allowed = (
            f"between 0 and {maximum:g}" if maximum < float("inf") else "finite and at least 0"
        )
        raise ValueError(f"{name} must be {allowed}, not {value:g}")
