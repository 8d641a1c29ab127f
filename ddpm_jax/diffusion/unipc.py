"""UniPC, a multistep predictor-corrector sampler (Zhao et al. 2023)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpm_jax.diffusion.prediction import Denoiser, Prediction
from ddpm_jax.diffusion.process import alpha_sigma
from ddpm_jax.diffusion.shared_steps import Sampler, TwoStepState, extrapolation

Scalar = Float[Array, ""]


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
