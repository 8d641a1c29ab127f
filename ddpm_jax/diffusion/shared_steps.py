"""Parts of several samplers: their type, Heun's step, the two-step extrapolation, a range check."""

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
