"""Steps of samplers: their type, Heun's step, the two-step extrapolation, UniPC, a range check."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ddpm_jax.diffusion.prediction import Denoiser, Prediction
from ddpm_jax.diffusion.process import alpha_sigma

Scalar = Float[Array, ""]


class Sampler(NamedTuple):
    """A sampler, as two functions.

    Attributes:
      init: A function xT -> state; the state has a field x.
      step: A function (denoise, state, noise, logsnr_t, logsnr_s) -> (state at s, prediction at t).
    """

    init: Callable[[Array], PyTree]
    step: Callable[[Denoiser, PyTree, Array, Scalar, Scalar], tuple[PyTree, Prediction]]


def heun_step(
    denoise: Denoiser, x: Array, logsnr_t: Scalar, logsnr_s: Scalar
) -> tuple[Array, Prediction]:
    """Take Heun's step of the ODE dy / dsigma = eps with y = x / alpha, sigma = exp(-logsnr / 2).

    A step to +inf is Euler's step, which ends at x0.

    Args:
      denoise: The denoiser, which is called at both ends of the step, but not at +inf.
      x: x_t of a batch, [B, *event].
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
      x0: The predicted x0 of the previous step.
      logsnr: The logsnr of that prediction; NaN before the first step.
    """

    x: Float[Array, "batch *event"]
    x0: Float[Array, "batch *event"]
    logsnr: Scalar


def init_two_step(xT: Array) -> TwoStepState:
    """Return the state before the first step."""
    return TwoStepState(xT, jnp.zeros_like(xT), jnp.full((), jnp.nan, xT.dtype))


def extrapolation(
    state: TwoStepState, prediction: Prediction, logsnr_t: Scalar, logsnr_s: Scalar
) -> Array:
    """Return (x0 - previous x0) / 2r, r = previous h / h; 0 in the first and in the last step.

    h is the step in logsnr (Lu et al. 2022b, alg. 2).

    Args:
      state: The state, with the previous x0 and its logsnr.
      prediction: The prediction at x_t.
      logsnr_t: The log signal-to-noise ratio at the start of the step.
      logsnr_s: The log signal-to-noise ratio at the cleaner end of the step.
    """
    second = (logsnr_t > state.logsnr) & jnp.isfinite(logsnr_s)  # comparison with NaN is false
    h = jnp.where(second, logsnr_s - logsnr_t, 0.0)
    h_previous = jnp.where(second, logsnr_t - state.logsnr, 1.0)
    return h / h_previous / 2 * (prediction.x0 - state.x0)


class UniPCState(NamedTuple):
    """The state of UniPC; a logsnr of a step before the first one is NaN.

    Attributes:
      x: The current x_t, before its correction.
      x_before: The corrected x_t of the previous step.
      x0: The predicted x0 of the previous step.
      x0_before: The predicted x0 of the step before that.
      logsnr: The logsnr of `x0`.
      logsnr_before: The logsnr of `x0_before`.
    """

    x: Float[Array, "batch *event"]
    x_before: Float[Array, "batch *event"]
    x0: Float[Array, "batch *event"]
    x0_before: Float[Array, "batch *event"]
    logsnr: Scalar
    logsnr_before: Scalar


def unipc() -> Sampler:
    """Return UniPC of order 2 with B(h) = e^h - 1, one call per step (Zhao et al. 2023).

    The evaluation at x_t corrects the step that led to x_t and predicts the next one (alg. 1-2).
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
      ValueError: If it is not.
    """
    if not (0 <= value <= maximum and value < float("inf")):
        allowed = (
            f"between 0 and {maximum:g}" if maximum < float("inf") else "finite and at least 0"
        )
        raise ValueError(f"{name} must be {allowed}, not {value:g}")
