"""How alike two images are, pixel by pixel: PSNR and SSIM, of images in [-1, 1]."""

import numpy as np
from jaxtyping import Float

RANGE = 2.0  # from black to white
MOST = 100.0  # dB, at the most: so that one pixel-perfect image leaves a mean that can be read
K1, K2, SIGMA, SIDE = 0.01, 0.03, 1.5, 11  # Wang et al. 2004, sec. III-C


def psnr(
    a: Float[np.ndarray, "n h w c"], b: Float[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n"]:
    """10 log10(range^2 / mean squared error) of each pair, in dB; `MOST` of equal ones."""
    error = np.square(np.asarray(a, np.float64) - b).reshape(len(a), -1).mean(1)
    return np.asarray(10 * np.log10(RANGE**2 / np.maximum(error, RANGE**2 * 10 ** (-MOST / 10))))


def ssim(
    a: Float[np.ndarray, "n h w c"], b: Float[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n"]:
    """Structural similarity of each pair (Wang et al. 2004, eq. 13), the mean over channels.

    Means and covariances are under a Gaussian of deviation 1.5 in windows of 11 x 11 pixels that
    lie within the image, which is at least as large; 1 of equal images.
    """
    from scipy import ndimage

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    margin = SIDE // 2

    def blur(x: np.ndarray) -> np.ndarray:
        truncate = margin / SIGMA
        for axis in (1, 2):
            x = ndimage.gaussian_filter1d(x, SIGMA, axis, truncate=truncate)
        return x[:, margin:-margin, margin:-margin]

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return np.asarray(similarity.reshape(len(a), -1).mean(1))
