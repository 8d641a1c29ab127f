"""How good a set of drawn images is, judged in a classifier's features and in pixels."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ddpm_jax import report
from ddpm_jax.classifier import Judge
from ddpm_jax.data.loader import Data
from ddpm_jax.metrics.distances import (
    frechet,
    inception_score,
    kernel_distance,
    moments,
    nearest,
    precision_recall,
)
from ddpm_jax.tasks import to_images


class Quality(NamedTuple):
    """Figures by name, and a picture of drawn images beside their nearest training images."""

    metrics: dict[str, float]
    neighbours: np.ndarray


def quality(
    judge: Judge,
    drawn: Float[np.ndarray, "n h w c"],
    labels: np.ndarray | None,
    data: Data,
) -> Quality:
    """Compare `drawn` with the held-out images, and as many training images with them, too.

    A distance between two finite sets is never 0: that of training images to the held-out
    ones is what a perfect model would reach.

    Args:
      drawn: in [-1, 1].
      labels: what each was meant to be; None: nothing was asked for.
    """
    draws = np.random.Generator(np.random.Philox(key=[0, 1]))
    order = draws.permutation(len(data.train.images))[: len(drawn)]
    train = to_images(np.asarray(data.train.images), data.levels)
    test = to_images(np.asarray(data.test.images), data.levels)
    drawn_features, logs = judge.see(drawn)
    train_features, _ = judge.see(train[np.sort(order)])
    test_features, _ = judge.see(test)
    held_out = moments(test_features)
    ours, theirs = (
        frechet(moments(drawn_features), held_out),
        frechet(moments(train_features), held_out),
    )
    kid, deviation = kernel_distance(drawn_features, test_features)
    precision, recall = precision_recall(test_features, drawn_features)
    sure = np.exp(logs).max(1)
    name = judge.name
    metrics = {
        f"test/fd_{name}": ours,
        f"test/fd_{name}_of_training": theirs,
        f"test/fd_{name}_ratio": ours / theirs,
        f"test/kid_{name}": kid,
        f"test/kid_{name}_error": deviation,
        f"test/score_{name}": inception_score(np.exp(logs)),
        f"test/precision_{name}": precision,
        f"test/recall_{name}": recall,
        "test/sure": float((sure > 0.9).mean()),
        "test/drawn": float(len(drawn)),
    }
    if labels is not None:
        metrics["test/recognised"] = float((logs.argmax(1) == labels).mean())
    flat = [images.reshape(len(images), -1) for images in (drawn, test, train)]
    distance, which = nearest(flat[0], flat[2])
    usual, _ = nearest(flat[1], flat[2])
    metrics["test/nearest"] = float(np.median(distance))
    metrics["test/nearest_ratio"] = float(np.median(distance) / np.median(usual))
    rows = []
    for start in range(0, min(40, len(drawn)) // 10 * 10, 10):
        rows += [drawn[start : start + 10], train[which[start : start + 10]]]
    sheet = np.concatenate(rows) if rows else drawn
    return Quality(metrics, report.grid(sheet, columns=10))
