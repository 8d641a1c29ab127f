"""The error and the rate of a denoiser at each noise level."""

import numpy as np

from ddpm_jax import plots
from ddpm_jax.metrics.averages import ratio_of_sums, with_error

NOISE_LEVELS = 10  # of the table of errors

RATES = 50  # points at most of the rate-distortion curve


def noise_levels(
    terms: dict[str, np.ndarray], dims: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the error of eps and the bits per dimension of each tenth of t, and their plots.

    A standard error is over images, each with all of its times (`ratio_of_sums`).

    Progressive coding (Ho et al. 2020, sec. 4.3): sent from noise to data, after the bits of
    all times above t, the predicted x0 differs from the image by its root mean squared error.

    Args:
      terms: [images, times] t, mse and, of a table, kl (nats, times T) and distortion.
    """
    rows = np.minimum((terms["t"] * NOISE_LEVELS).astype(int), NOISE_LEVELS - 1)
    seen = np.unique(rows)  # all of them, but for a handful of images
    levels = seen / NOISE_LEVELS
    metrics: dict[str, float] = {}

    def of(name: str, metric: str = "", scale: float = 1.0) -> np.ndarray:
        means = []
        for row in seen:
            mean, error = ratio_of_sums(terms[name], rows == row)
            means.append(mean * scale)
            if metric:
                metrics.update(
                    with_error(f"{metric}_t_{row / NOISE_LEVELS:.1f}", (mean, error), scale)
                )
        return np.array(means)

    curves: dict[str, np.ndarray] = {"error of eps": of("mse", "mse")}
    pictures = {}
    if "kl" in terms:
        bits = of("kl", "bits", 1 / (NOISE_LEVELS * dims * np.log(2)))
        curves["bits/dim"] = bits
        rate, rmse = rate_distortion(terms["t"], terms["kl"], terms["distortion"], dims)
        pictures["rate_distortion"] = plots.lines(
            rate, {"RMSE of 255": rmse}, "bits/dim sent", "Progressive coding"
        )
    pictures["levels"] = plots.lines(levels, curves, "t", "By noise level")
    return metrics, pictures


def rate_distortion(
    t: np.ndarray, kl: np.ndarray, distortion: np.ndarray, dims: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (bits per dimension sent, root mean squared error of 255) as t falls.

    rate(t) = integral of kl from t to 1: over draws of t, sorted, the sum of all above it and of
    half its own.  Both are averaged over the same neighbouring draws (Ho et al. 2020, sec. 4.3).

    Args:
      t: uniform times [...].
      kl: nats times T at each of them.
      distortion: mean squared error of the predicted x0, of values in [-1, 1], at each of them.
    """
    order = np.argsort(-t.ravel(), kind="stable")
    nats, error = kl.ravel()[order], distortion.ravel()[order]
    rate = (np.cumsum(nats) - nats / 2) / len(nats) / (dims * np.log(2))
    parts = min(len(nats), max(NOISE_LEVELS, min(RATES, len(nats) // 20)))
    rate, error = (
        np.array([part.mean() for part in np.array_split(a, parts)]) for a in (rate, error)
    )
    return rate, 127.5 * np.sqrt(error)
