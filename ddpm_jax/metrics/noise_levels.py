"""The error and the rate of a denoiser at each noise level."""

import numpy as np

from ddpm_jax import plots
from ddpm_jax.metrics.averages import ratio_of_sums, with_error

NOISE_LEVELS = 10  # intervals of t in [0, 1)

RATES = 50  # largest number of points of the rate-distortion curve


def noise_levels(
    terms: dict[str, np.ndarray], dims: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the squared error of eps and the bits per dimension of each tenth of t, and plots.

    Standard errors are over images, because the times of one image are not independent
    (`ratio_of_sums`). The second plot is the rate-distortion curve of `rate_distortion`.

    Args:
      terms: Arrays [images, times] by name: `t` in [0, 1) and `mse`, the squared error of eps.
        For a table of betas also `kl`, in nats times the number of steps T, and `distortion`.
      dims: Number of values of an image.
    """
    intervals = np.minimum((terms["t"] * NOISE_LEVELS).astype(int), NOISE_LEVELS - 1)
    numbers = np.unique(intervals)  # a few images may have no time in some intervals
    levels = numbers / NOISE_LEVELS
    metrics: dict[str, float] = {}

    def means_of(name: str, metric: str, scale: float = 1.0) -> np.ndarray:
        means = []
        for number, level in zip(numbers, levels, strict=True):
            mean, error = ratio_of_sums(terms[name], intervals == number)
            means.append(mean * scale)
            metrics.update(with_error(f"{metric}_t_{level:.1f}", (mean, error), scale))
        return np.array(means)

    curves = {"error of eps": means_of("mse", "mse")}
    images = {}
    if "kl" in terms:
        scale = 1 / (NOISE_LEVELS * dims * np.log(2))
        curves["bits/dim"] = means_of("kl", "bits", scale)
        rate, rmse = rate_distortion(terms["t"], terms["kl"], terms["distortion"], dims)
        images["rate_distortion"] = plots.lines(
            rate, {"RMSE of values in [0, 255]": rmse}, "bits/dim sent", "Progressive coding"
        )
    images["levels"] = plots.lines(levels, curves, "t", "By noise level")
    return metrics, images


def rate_distortion(
    t: np.ndarray, kl: np.ndarray, distortion: np.ndarray, dims: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return rate and distortion of progressive coding, as t falls (Ho et al. 2020, sec. 4.3).

    The rate at t is the integral of kl from t to 1, estimated from n sampled times: the sum of kl
    over the larger times, and half of kl at t itself, over n. Rate and distortion are then averaged
    over the same runs of consecutive times.

    Args:
      t: Uniform times in [0, 1).
      kl: Nats times the number of steps T, at each time.
      distortion: Mean squared error of the predicted x0, of values in [-1, 1], at each time.
      dims: Number of values of an image.

    Returns:
      The rate in bits per dimension, and the root mean squared error of values in [0, 255].
    """
    order = np.argsort(-t.ravel(), kind="stable")
    nats, error = kl.ravel()[order], distortion.ravel()[order]
    rate = (np.cumsum(nats) - nats / 2) / len(nats) / (dims * np.log(2))
    parts = min(len(nats), max(NOISE_LEVELS, min(RATES, len(nats) // 20)))
    rate, error = (
        np.array([part.mean() for part in np.array_split(a, parts)]) for a in (rate, error)
    )
    return rate, 127.5 * np.sqrt(error)
