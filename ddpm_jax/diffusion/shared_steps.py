"""What several samplers share: Heun's step, the two-step extrapolation, a check of numbers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddpm_jax.diffusion.prediction import Denoiser, Prediction
from ddpm_jax.diffusion.process import alpha_sigma

Scalar = Float[Array, ""]


def heun_step(
    denoise: Denoiser, x: Array, logsnr_t: Scalar, logsnr_s: Scalar
) -> tuple[Array, Prediction]:
    """Heun's step of dy / dsigma = eps, y = x / alpha, sigma = exp(-logsnr / 2).

    Args:
      denoise: called at both ends of the step, at +inf not.
      x: x_t of a batch.
      logsnr_t, logsnr_s: of the noisier and the cleaner time.

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


class TwoStep(NamedTuple):
    """State with the last x0 and the logsnr it was predicted at (NaN: none yet)."""

    x: Float[Array, "batch *event"]
    x0: Float[Array, "batch *event"]
    logsnr: Scalar


def initial(xT: Array) -> TwoStep:
    """Return the state before the first step."""
    return TwoStep(xT, jnp.zeros_like(xT), jnp.full((), jnp.nan, xT.dtype))


def extrapolation(
    state: TwoStep, prediction: Prediction, logsnr_t: Scalar, logsnr_s: Scalar
) -> Array:
    """Return (x0 - last x0) / 2r with r = h_last / h, or 0 at the first and the last step.

    Args:
      state: holds the last x0 and its logsnr.
      prediction: at x_t.
      logsnr_t, logsnr_s: of the noisier and the cleaner time.
    """
    second = (logsnr_t > state.logsnr) & jnp.isfinite(logsnr_s)  # no number exceeds NaN
    h = jnp.where(second, logsnr_s - logsnr_t, 0.0)
    h_last = jnp.where(second, logsnr_t - state.logsnr, 1.0)
    return h / h_last / 2 * (prediction.x0 - state.x0)


def check_within(what: str, value: float, most: float = float("inf")) -> None:
    """Check that 0 <= value <= most, and that it is finite.

    Raises:
      ValueError: it is not.
    """
    if not (0 <= value <= most and value < float("inf")):
        allowed = f"between 0 and {most:g}" if most < float("inf") else "finite and at least 0"
        raise ValueError(f"{what} must be {allowed}, not {value:g}")
