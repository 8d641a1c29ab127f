"""How good a set of drawn images is, judged in a network's features and in pixels."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ddpm_jax import errors, plots
from ddpm_jax.data.types import Data, Split
from ddpm_jax.metrics.averages import averages, figures
from ddpm_jax.metrics.distances import (
    RANK,
    Grouped,
    Jackknife,
    Moments,
    frechet_distance,
    inception_score,
    inception_score_error,
    kernel_distance,
    median,
    nearest,
    precision_recall,
    quotient,
    share_error,
)
from ddpm_jax.metrics.features import Judge
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.progress import tell

WHOLE = 100_000  # images of a training set that are looked at, at the most: an endless one's
CHUNK = 1000  # images that are looked at, and added to the moments, at once
KEPT = 10_000  # of a set: features for KID, precision and recall, images for neighbours


class Quality(NamedTuple):
    """Figures by name, and a picture of drawn images beside their nearest training images."""

    metrics: dict[str, float]
    neighbours: np.ndarray | errors.NonFinite | None


class Seen(NamedTuple):
    """Of a set: moments of all features, the first `KEPT` features, log p(y|x)."""

    grouped: Grouped
    features: np.ndarray
    logs: np.ndarray

    @property
    def moments(self) -> Moments:
        """Those of all features."""
        return self.grouped.moments


def look(judge: Judge, parts: Iterator[np.ndarray], before: Seen | None = None) -> Seen:
    """What a judge finds in a set of images, part by part, added to what came `before`."""
    grouped = before.grouped if before else None
    kept = [before.features] if before else []
    logs = [before.logs] if before else []
    for part in parts:
        features, log = judge.see(part)
        grouped = Grouped(features, grouped)
        room = KEPT - sum(len(rows) for rows in kept)
        kept.append(features[:room].astype(np.float32))
        logs.append(log.astype(np.float32))
    assert grouped is not None
    return Seen(grouped, np.concatenate(kept), np.concatenate(logs))


def quality(
    judge: Judge,
    drawn: Float[np.ndarray, "n h w c"],
    labels: np.ndarray | None,
    data: Data,
    split: str = "test",
    pixels: bool = True,
) -> Quality:
    """Compare `drawn` with the held-out images, and as many training images with them, too.

    A distance between two finite sets is not 0: a perfect model reaches that of training images to
    the held-out ones.  Both depend on the number of images, so the ratio is of the distances of
    equally many, min(drawn, training), which `..._ratio_images` reports.  The metrics are named
    after the judge; Inception's is FID, also against the whole training set, as in papers.  Every
    metric has its standard error beside it, `..._error`; a metric that there are too few images for
    is left out, and a line says so.

    Args:
      drawn: in [-1, 1].
      labels: the class that each was drawn for; None: no class.
      split: whose images are the held-out ones.
      pixels: compare with the nearest training images, too.
    """
    train = data.train.some(len(drawn))
    size = len(train.images)  # of both sides of the ratio
    order = np.arange(len(drawn))
    if size < len(drawn):  # some of them, which need not be drawn in a random order
        order = np.random.Generator(np.random.Philox(key=[0, 4])).permutation(len(drawn))
    equal = look(judge, _chunks(drawn, order[:size]))
    ours = look(judge, _chunks(drawn, order[size:]), equal) if size < len(drawn) else equal
    theirs = look(judge, _parts(train, data.levels))
    held_out = look(judge, _parts(data.part(split), data.levels))
    counts = {
        "generated": len(drawn),
        "held-out": held_out.moments.size,
        "training": len(data.train.images),
    }
    inception = judge.name == "inception"
    name = judge.name
    distance = "fid" if inception else f"fd_{name}"
    metrics: dict[str, float] = {"drawn": float(len(drawn))}
    missing: list[str] = []

    def enough(what: str, least: int, *sets: str) -> bool:
        if min(counts[of] for of in sets) >= least:
            return True
        missing.append(what)
        return False

    if enough(distance, 2, "generated", "held-out"):
        apart = frechet_distance(ours.grouped, held_out.grouped)
        metrics |= _of(distance, apart)
    if enough(f"{distance}_ratio", 2, *counts):
        usual = frechet_distance(theirs.grouped, held_out.grouped)
        if equal is not ours:
            apart = frechet_distance(equal.grouped, held_out.grouped)
        ratio = apart.over(usual)
        metrics |= _of(f"{distance}_of_training", usual)
        if ratio is None:
            missing.append(f"{distance}_ratio")
        else:
            metrics |= _of(f"{distance}_ratio", ratio)
            metrics[f"{distance}_ratio_images"] = float(size)
    if enough(f"kid_{name}", 2, "generated", "held-out"):
        kid = kernel_distance(ours.features, held_out.features)
        metrics |= figures(f"kid_{name}", kid)
    if enough(f"score_{name}", 2, "generated"):
        p = np.exp(ours.logs)
        metrics |= figures(f"score_{name}", (inception_score(p), inception_score_error(p)))
    if enough(f"precision_{name}, recall_{name}", RANK + 1, "generated", "held-out"):
        sets = ours.features, held_out.features
        shares = precision_recall(held_out.features, ours.features)
        for word, share, of in zip(("precision", "recall"), shares, sets, strict=True):
            metrics |= figures(f"{word}_{name}", (share, share_error(share, len(of))))
    if inception:
        whole = look(judge, _parts(data.train.some(WHOLE), data.levels))
        if enough("fid_to_training", 2, "generated", "training"):
            metrics |= _of("fid_to_training", frechet_distance(ours.grouped, whole.grouped))
    else:
        right = {"sure": np.exp(ours.logs).max(1) > 0.9}
        if labels is not None:
            right["recognised"] = ours.logs.argmax(1) == np.asarray(labels)[order]
        metrics |= averages(right)
    picture = None
    if pixels:
        near, picture = neighbours(drawn[:KEPT], data, split)
        metrics |= near
        if "nearest_ratio" not in near:
            missing.append("nearest_ratio")
    if missing:
        sizes = ", ".join(f"{count} {of}" for of, count in counts.items())
        tell(f"metrics that {sizes} images do not give are left out: {', '.join(missing)}")
    return Quality(metrics, picture)


def neighbours(
    drawn: Float[np.ndarray, "n h w c"], data: Data, split: str = "test"
) -> tuple[dict[str, float], np.ndarray | errors.NonFinite]:
    """How far drawn images are, in pixels, from the nearest training ones, and a sheet of both.

    The median distance, and its ratio to that of held-out images: under 1 is memorising.  The ratio
    is left out where half of the held-out images are training images, too.
    """
    train = to_images(data.train.some(WHOLE).images, data.levels)
    held_out = to_images(data.part(split).images, data.levels)
    flat = [images.reshape(len(images), -1) for images in (drawn, held_out, train)]
    distance, which = nearest(flat[0], flat[2])
    usual, _ = nearest(flat[1], flat[2])
    rows = []
    for start in range(0, min(40, len(drawn)) // 10 * 10, 10):
        rows += [drawn[start : start + 10], train[which[start : start + 10]]]
    apart = median(distance)
    metrics = figures("nearest", apart)
    ratio = quotient(apart, median(usual))
    if ratio is not None:
        metrics |= figures("nearest_ratio", ratio)
    shown = np.concatenate(rows) if rows else drawn
    return metrics, plots.attempt(plots.grid, shown, columns=10)


def _of(name: str, distance: Jackknife) -> dict[str, float]:
    return figures(name, (distance.value, distance.error))


def _chunks(images: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    for at in range(0, len(rows), CHUNK):
        yield images[rows[at : at + CHUNK]]


def _parts(split: Split, levels: int) -> Iterator[np.ndarray]:
    for at in range(0, len(split.images), CHUNK):
        yield to_images(split.images[at : at + CHUNK], levels)
