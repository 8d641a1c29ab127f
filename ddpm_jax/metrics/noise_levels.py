"""The squared error and the rate, in bits per dimension, of a denoiser at each noise level."""

import numpy as np

from ddpm_jax import plots
from ddpm_jax.metrics.averages import ratio_of_sums, with_error

NOISE_LEVELS = 10  # number of intervals of t in [0, 1)
RATES = 50  # largest number of points of the rate-distortion curve


def noise_levels(
    terms: dict[str, np.ndarray], dims: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Compute the error of eps and the bits per dimension in each tenth of the diffusion time t.

    Standard errors are over images, because the times of one image are not independent.

    Args:
      terms: A dictionary of arrays [images, times]: "t", the times in [0, 1); "mse", the squared
        error of eps. With a discrete noise schedule of T steps also "kl", T times the term L_(t-1)
        in nats, and "distortion", the mean squared error of the predicted x0.
      dims: Number of values of an image, H W C.

    Returns:
      Metrics with standard errors, by name, and plots, by name: "levels" (the metrics over t) and,
      with a discrete noise schedule, "rate_distortion" (the curve of `rate_distortion`).
    """
    intervals = np.minimum((terms["t"] * NOISE_LEVELS).astype(int), NOISE_LEVELS - 1)
    numbers = np.unique(intervals)  # with few images, an interval may contain no times
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
    """Return the rate-distortion curve of progressive coding (Ho et al. 2020, sec. 4.3).

    The rate at t is the integral of kl from t to 1. From n sampled times, it is estimated as
    (sum of kl over larger times + kl at t / 2) / n. The times are then sorted from 1 to 0 and split
    into at most `RATES` parts. Rate and squared error are averaged over the times of each part.

    Args:
      t: Uniform times in [0, 1), [images, times].
      kl: T times the term L_(t-1) of the variational bound, in nats, [images, times].
      distortion: Mean squared error of the predicted x0 in [-1, 1], [images, times].
      dims: Number of values of an image, H W C.

    Returns:
      The rates in bits per dimension, [parts], and the root mean squared errors of x0 in pixel
      values from 0 to 255, [parts].
    """
    order = np.argsort(-t.ravel(), kind="stable")
    nats, error = kl.ravel()[order], distortion.ravel()[order]
    rate = (np.cumsum(nats) - nats / 2) / len(nats) / (dims * np.log(2))
    parts = min(len(nats), max(NOISE_LEVELS, min(RATES, len(nats) // 20)))
    rate, error = (
        np.array([part.mean() for part in np.array_split(a, parts)]) for a in (rate, error)
    )
    return rate, 127.5 * np.sqrt(error)
