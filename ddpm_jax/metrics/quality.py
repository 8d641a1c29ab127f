"""How good a set of drawn images is, judged in a network's features and in pixels."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ddpm_jax import report
from ddpm_jax.classifier import Judge
from ddpm_jax.data.loader import Data, Split
from ddpm_jax.metrics.distances import (
    Moments,
    frechet,
    inception_score,
    kernel_distance,
    moments,
    nearest,
    precision_recall,
)
from ddpm_jax.tasks import to_images

WHOLE = 100_000  # images of a training set that are looked at, at the most: an endless one's
CHUNK = 1000  # images that are looked at, and added to the moments, at once
KEPT = 10_000  # of a set: features for KID, precision and recall, images for neighbours


class Quality(NamedTuple):
    """Figures by name, and a picture of drawn images beside their nearest training images."""

    metrics: dict[str, float]
    neighbours: np.ndarray | None


class Seen(NamedTuple):
    """What a judge saw of a set: all features' moments, the first `KEPT` features, log p(y|x)."""

    moments: Moments
    features: np.ndarray
    logs: np.ndarray


def look(judge: Judge, parts: Iterator[np.ndarray]) -> Seen:
    """Show a judge a set of images, part by part."""
    total = None
    kept: list[np.ndarray] = []
    logs: list[np.ndarray] = []
    for part in parts:
        features, log = judge.see(part)
        total = moments(features, total)
        room = KEPT - sum(len(some) for some in kept)
        kept.append(features[:room].astype(np.float32))
        logs.append(log.astype(np.float32))
    assert total is not None
    return Seen(total, np.concatenate(kept), np.concatenate(logs))


def quality(
    judge: Judge,
    drawn: Float[np.ndarray, "n h w c"],
    labels: np.ndarray | None,
    data: Data,
    split: str = "test",
    pixels: bool = True,
) -> Quality:
    """Compare `drawn` with the held-out images, and as many training images with them, too.

    A distance between two finite sets is never 0: that of training images to the held-out
    ones is what a perfect model would reach.  Figures are named for the judge; Inception's is
    FID, told against the whole training set, too, as papers do.

    Args:
      drawn: in [-1, 1].
      labels: what each was meant to be; None: nothing was asked for.
      split: whose images are the held-out ones.
      pixels: compare with the nearest training images, too.
    """
    ours = look(judge, (drawn[at : at + CHUNK] for at in range(0, len(drawn), CHUNK)))
    theirs = look(judge, _parts(data.train.some(len(drawn)), data.levels)).moments
    held_out = look(judge, _parts(data.part(split), data.levels))
    inception = judge.name == "inception"
    name = judge.name
    distance = "fid" if inception else f"fd_{name}"
    apart, usual = frechet(ours.moments, held_out.moments), frechet(theirs, held_out.moments)
    kid, deviation = kernel_distance(ours.features, held_out.features)
    precision, recall = precision_recall(held_out.features, ours.features)
    metrics = {
        f"{distance}": apart,
        f"{distance}_of_training": usual,
        f"{distance}_ratio": apart / usual,
        f"kid_{name}": kid,
        f"kid_{name}_error": deviation,
        f"score_{name}": inception_score(np.exp(ours.logs)),
        f"precision_{name}": precision,
        f"recall_{name}": recall,
        "drawn": float(len(drawn)),
    }
    if inception:
        train = look(judge, _parts(data.train.some(WHOLE), data.levels)).moments
        metrics["fid_to_training"] = frechet(ours.moments, train)
    else:
        metrics["sure"] = float((np.exp(ours.logs).max(1) > 0.9).mean())
        if labels is not None:
            metrics["recognised"] = float((ours.logs.argmax(1) == labels).mean())
    if not pixels:
        return Quality(metrics, None)
    near, picture = neighbours(drawn[:KEPT], data, split)
    return Quality(metrics | near, picture)


def neighbours(
    drawn: Float[np.ndarray, "n h w c"], data: Data, split: str = "test"
) -> tuple[dict[str, float], np.ndarray]:
    """How far drawn images are, in pixels, from the nearest training ones, and a sheet of both.

    The median distance, and its ratio to that of held-out images: under 1 is memorising.
    """
    train = to_images(np.asarray(data.train.some(WHOLE).images), data.levels)
    held_out = to_images(np.asarray(data.part(split).images), data.levels)
    flat = [images.reshape(len(images), -1) for images in (drawn, held_out, train)]
    distance, which = nearest(flat[0], flat[2])
    usual, _ = nearest(flat[1], flat[2])
    rows = []
    for start in range(0, min(40, len(drawn)) // 10 * 10, 10):
        rows += [drawn[start : start + 10], train[which[start : start + 10]]]
    metrics = {
        "nearest": float(np.median(distance)),
        "nearest_ratio": float(np.median(distance) / np.median(usual)),
    }
    return metrics, report.grid(np.concatenate(rows) if rows else drawn, columns=10)


def _parts(split: Split, levels: int) -> Iterator[np.ndarray]:
    for at in range(0, len(split.images), CHUNK):
        yield to_images(np.asarray(split.images[at : at + CHUNK]), levels)
