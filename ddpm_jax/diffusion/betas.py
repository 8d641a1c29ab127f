"""Tables of betas, the variances that the T steps of a discrete forward process add.

alpha_bar_i = prod_{j <= i} (1 - beta_j),  i = 1 ... T (Ho et al. 2020, eq. 4)       (1)
"""

import math

import numpy as np


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    """Return the betas of the linear schedule, float64 [steps].

    The betas rise linearly from (1000 / T) first to (1000 / T) last. With T = 1000 they are the
    betas of Ho et al. 2020, sec. 4. Because of the factor 1000 / T, the last logsnr is about -10
    for every T (code of Nichol & Dhariwal 2021).

    >>> print(linear_betas()[[0, -1]])
    [0.0001 0.02  ]

    Args:
      steps: The number of steps T.
      first: The first beta if T is 1000, in (0, 1).
      last: The last beta if T is 1000, in (0, 1).

    Raises:
      ValueError: If a beta is 1 or more, because T is too small.
    """
    scale = 1000 / steps
    if not scale * max(first, last) < 1:
        least = math.floor(1000 * max(first, last)) + 1
        raise ValueError(
            f"with {steps} steps the largest linear beta is {scale * max(first, last):g}, but a "
            f"beta must be less than 1; steps must be at least {least}"
        )
    return np.linspace(scale * first, scale * last, steps)


def cosine_betas(steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """Return the betas of the cosine schedule, float64 [steps] (Nichol & Dhariwal 2021, eq. 17).

    alpha_bar(t) = cos^2((t + offset) / (1 + offset) pi / 2);
    beta_i = min(1 - alpha_bar(i / T) / alpha_bar((i - 1) / T), max_beta), where T is `steps`

    >>> print(cosine_betas(steps=2, offset=0.0))  # alpha_bar = 1, 1/2, 0
    [0.5   0.999]
    """
    t = np.arange(steps + 1) / steps
    alpha_bars = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
    betas: np.ndarray = np.minimum(1 - alpha_bars[1:] / alpha_bars[:-1], max_beta)
    return betas


def log_alpha_bars(betas: np.ndarray) -> np.ndarray:
    """Return log alpha_bar_i for i = 0 ... T, eq. (1), in float64: [T + 1]."""
    return np.concatenate([[0.0], np.cumsum(np.log1p(-np.asarray(betas, np.float64)))])
