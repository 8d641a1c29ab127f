"""PSNR and SSIM of reconstructions."""

import numpy as np

from ddpm_jax.metrics.reconstruction import psnr, ssim


def test_psnr_and_ssim_of_known_pairs():
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3))
    np.testing.assert_allclose(psnr(x, x), 100.0)
    np.testing.assert_allclose(psnr(x, x + 0.2), 20.0)  # (2 / 0.2)^2 is 20 dB
    np.testing.assert_allclose(ssim(x, x), 1.0)
    a, b = np.full((1, 16, 16, 1), 0.5), np.full((1, 16, 16, 1), -0.25)
    c1 = (0.01 * 2) ** 2  # constant images: only the term of the means remains
    expected = (2 * 0.5 * -0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    np.testing.assert_allclose(ssim(a, b), expected)
    assert (ssim(0.5 + 0.3 * x, 0.5 - 0.3 * x) < 0).all()  # equal means, and a negative covariance
