"""Similarity of images and their reconstructions: PSNR and SSIM of pixels in [-1, 1]."""

import numpy as np
from jaxtyping import Float

RANGE = 2.0  # difference between white (1) and black (-1)
MAX_PSNR = 100.0  # dB; makes the PSNR of an exact reconstruction finite
K1, K2, SIGMA, SIDE = 0.01, 0.03, 1.5, 11  # Wang et al. 2004, sec. III-C


def psnr(
    a: Float[np.ndarray, "n h w c"], b: Float[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n"]:
    """Return the PSNR of images `a` and `b` in [-1, 1], [N], in dB and at most `MAX_PSNR`.

    PSNR = 10 log10(range^2 / mean squared error), with range = 2
    """
    error = np.square(np.asarray(a, np.float64) - b).reshape(len(a), -1).mean(1)
    smallest = RANGE**2 * 10 ** (-MAX_PSNR / 10)
    return np.asarray(10 * np.log10(RANGE**2 / np.maximum(error, smallest)))


def ssim(
    a: Float[np.ndarray, "n h w c"], b: Float[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n"]:
    """Return the structural similarity of each pair of images, [N] (Wang et al. 2004, eq. 13).

    The similarity of equal images is 1. Means and covariances are weighted by a Gaussian with std
    1.5 pixels in windows of 11 x 11 pixels. The similarity is averaged over all windows within the
    image, and over the channels.

    Args:
      a: Images [N, H, W, C] in [-1, 1] of at least 11 x 11 pixels.
      b: Images of the same shape and range.
    """
    from scipy import ndimage

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    margin = SIDE // 2

    def window_mean(x: np.ndarray) -> np.ndarray:
        truncate = margin / SIGMA
        for axis in (1, 2):
            x = ndimage.gaussian_filter1d(x, SIGMA, axis, truncate=truncate)
        return x[:, margin:-margin, margin:-margin]

    mean_a, mean_b = window_mean(a), window_mean(b)
    var_a, var_b = window_mean(a * a) - mean_a**2, window_mean(b * b) - mean_b**2
    covariance = window_mean(a * b) - mean_a * mean_b
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return np.asarray(similarity.reshape(len(a), -1).mean(1))
