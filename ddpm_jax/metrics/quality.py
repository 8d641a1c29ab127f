"""How good a set of drawn images is, judged in a network's features and in pixels."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
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
from ddpm_jax.progress import log

WHOLE = 100_000  # images of a training set that are looked at, at the most: an endless one's
CHUNK = 1000  # images that are looked at, and added to the moments, at once
KEPT = 10_000  # of a set: features for KID, precision and recall, images for neighbours


class Quality(NamedTuple):
    """Figures by name, and a picture of drawn images beside their nearest training images."""

    metrics: dict[str, float]
    neighbours: np.ndarray | errors.NonFinite | None


class Seen(NamedTuple):
    """Features of a set: moments of all, the first `KEPT` features, and log p(y|x)."""

    grouped: Grouped
    features: np.ndarray
    logs: np.ndarray

    @property
    def moments(self) -> Moments:
        """The moments of all features."""
        return self.grouped.moments


def look(judge: Judge, parts: Iterator[np.ndarray], before: Seen | None = None) -> Seen:
    """Return what a judge finds in a set of images, part by part, added to what came `before`."""
    grouped = before.grouped if before else None
    kept = [before.features] if before else []
    logs = [before.logs] if before else []
    for part in parts:
        features, log_probs = judge.see(part)
        grouped = Grouped(features, grouped)
        room = KEPT - sum(len(rows) for rows in kept)
        kept.append(features[:room].astype(np.float32))
        logs.append(log_probs.astype(np.float32))
    assert grouped is not None
    return Seen(grouped, np.concatenate(kept), np.concatenate(logs))


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Drawn images beside held-out and training ones, as a feature network sees them.

    Attributes:
      judge: The feature network.
      drawn: Images in [-1, 1].
      labels: The class that each was drawn for; None: no class.
      order: In which `ours` has the drawn images.
      data: The data set.
      split: Whose images are the held-out ones.
      size: Images of both sides of a ratio.
      equal: `size` of the drawn images.
      ours: All drawn images.
      theirs: `size` training images.
      held_out: All held-out images.
    """

    judge: Judge
    drawn: Float[np.ndarray, "n h w c"]
    labels: np.ndarray | None
    order: np.ndarray
    data: Data
    split: str
    size: int
    equal: Seen
    ours: Seen
    theirs: Seen
    held_out: Seen

    @property
    def distance_name(self) -> str:
        """What the Frechet distance is called: Inception's is FID."""
        return "fid" if self.judge.name == "inception" else f"fd_{self.judge.name}"

    @property
    def counts(self) -> dict[str, int]:
        """How many images each set has."""
        return {
            "generated": len(self.drawn),
            "held-out": self.held_out.moments.size,
            "training": len(self.data.train.images),
        }

    @functools.cached_property
    def distance(self) -> Jackknife:
        """The Frechet distance of drawn images to held-out ones."""
        return frechet_distance(self.ours.grouped, self.held_out.grouped)

    def has(self, least: int, *sets: str) -> bool:
        """Return whether each of some sets, by their names in `counts`, has `least` images."""
        return min(self.counts[name] for name in sets) >= least


class Measured(NamedTuple):
    """Metrics by name, the names of those that there are too few images for, and a picture."""

    metrics: dict[str, float]
    missing: tuple[str, ...] = ()
    picture: np.ndarray | errors.NonFinite | None = None


def compare(
    judge: Judge,
    drawn: Float[np.ndarray, "n h w c"],
    labels: np.ndarray | None,
    data: Data,
    split: str = "test",
) -> Comparison:
    """Return what all metrics of `quality` are computed from; the arguments are its own.

    Args:
      judge: the feature network.
      drawn: in [-1, 1].
      labels: the class that each was drawn for; None: no class.
      data: the data set.
      split: whose images are the held-out ones.
    """
    train = data.train.some(len(drawn))
    size = len(train.images)
    order = np.arange(len(drawn))
    if size < len(drawn):  # a part of them, which need not be drawn in a random order
        order = np.random.Generator(np.random.Philox(key=[0, 4])).permutation(len(drawn))
    equal = look(judge, _chunks(drawn, order[:size]))
    ours = look(judge, _chunks(drawn, order[size:]), equal) if size < len(drawn) else equal
    theirs = look(judge, _parts(train, data.levels))
    held_out = look(judge, _parts(data.part(split), data.levels))
    return Comparison(judge, drawn, labels, order, data, split, size, equal, ours, theirs, held_out)


def frechet_of_drawn(sets: Comparison) -> Measured:
    """Measure the Frechet distance of drawn images to held-out ones."""
    if not sets.has(2, "generated", "held-out"):
        return Measured({}, (sets.distance_name,))
    return Measured(_of(sets.distance_name, sets.distance))


def frechet_ratio(sets: Comparison) -> Measured:
    """Measure the Frechet distance of training images, and the ratio of equally many drawn ones."""
    name = sets.distance_name
    if not sets.has(2, *sets.counts):
        return Measured({}, (f"{name}_ratio",))
    apart, usual = sets.distance, frechet_distance(sets.theirs.grouped, sets.held_out.grouped)
    if sets.equal is not sets.ours:
        apart = frechet_distance(sets.equal.grouped, sets.held_out.grouped)
    metrics, ratio = _of(f"{name}_of_training", usual), apart.over(usual)
    if ratio is None:
        return Measured(metrics, (f"{name}_ratio",))
    metrics |= _of(f"{name}_ratio", ratio)
    return Measured({**metrics, f"{name}_ratio_images": float(sets.size)})


def kernel_of_drawn(sets: Comparison) -> Measured:
    """Measure the kernel distance (KID) of drawn images to held-out ones."""
    name = f"kid_{sets.judge.name}"
    if not sets.has(2, "generated", "held-out"):
        return Measured({}, (name,))
    return Measured(figures(name, kernel_distance(sets.ours.features, sets.held_out.features)))


def score(sets: Comparison) -> Measured:
    """Measure the Inception score of drawn images."""
    name = f"score_{sets.judge.name}"
    if not sets.has(2, "generated"):
        return Measured({}, (name,))
    p = np.exp(sets.ours.logs)
    return Measured(figures(name, (inception_score(p), inception_score_error(p))))


def precision_and_recall(sets: Comparison) -> Measured:
    """Measure how many drawn images lie near held-out ones, and the other way round."""
    names = f"precision_{sets.judge.name}", f"recall_{sets.judge.name}"
    if not sets.has(RANK + 1, "generated", "held-out"):
        return Measured({}, (", ".join(names),))
    metrics: dict[str, float] = {}
    shares = precision_recall(sets.held_out.features, sets.ours.features)
    counts = len(sets.ours.features), len(sets.held_out.features)
    for name, share, count in zip(names, shares, counts, strict=True):
        metrics |= figures(name, (share, share_error(share, count)))
    return Measured(metrics)


def fid_to_training(sets: Comparison) -> Measured:
    """Measure FID against the whole training set, as papers report it: of Inception alone."""
    if sets.judge.name != "inception":
        return Measured({})
    if not sets.has(2, "generated", "training"):
        return Measured({}, ("fid_to_training",))
    whole = look(sets.judge, _parts(sets.data.train.some(WHOLE), sets.data.levels))
    return Measured(_of("fid_to_training", frechet_distance(sets.ours.grouped, whole.grouped)))


def classifier_shares(sets: Comparison) -> Measured:
    """Measure how many drawn images a classifier is sure of, and how many have their class."""
    if sets.judge.name == "inception":
        return Measured({})
    right = {"sure": np.exp(sets.ours.logs).max(1) > 0.9}
    if sets.labels is not None:
        right["recognised"] = sets.ours.logs.argmax(1) == np.asarray(sets.labels)[sets.order]
    return Measured(averages(right))


def nearest_training_images(sets: Comparison) -> Measured:
    """Measure how far drawn images are, in pixels, from the nearest training ones."""
    metrics, picture = neighbours(sets.drawn[:KEPT], sets.data, sets.split)
    missing = () if "nearest_ratio" in metrics else ("nearest_ratio",)
    return Measured(metrics, missing, picture)


METRICS: tuple[Callable[[Comparison], Measured], ...] = (
    frechet_of_drawn,
    frechet_ratio,
    kernel_of_drawn,
    score,
    precision_and_recall,
    fid_to_training,
    classifier_shares,
)


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
      judge: the feature network.
      drawn: in [-1, 1].
      labels: the class that each was drawn for; None: no class.
      data: the data set.
      split: whose images are the held-out ones.
      pixels: compare with the nearest training images, too.
    """
    sets = compare(judge, drawn, labels, data, split)
    metrics: dict[str, float] = {"drawn": float(len(drawn))}
    missing: list[str] = []
    picture = None
    for measure in (*METRICS, nearest_training_images) if pixels else METRICS:
        measured = measure(sets)
        metrics |= measured.metrics
        missing += measured.missing
        picture = measured.picture if measured.picture is not None else picture
    if missing:
        sizes = ", ".join(f"{count} {name}" for name, count in sets.counts.items())
        log(f"metrics that {sizes} images do not give are left out: {', '.join(missing)}")
    return Quality(metrics, picture)


def neighbours(
    drawn: Float[np.ndarray, "n h w c"], data: Data, split: str = "test"
) -> tuple[dict[str, float], np.ndarray | errors.NonFinite]:
    """Return distances in pixels of drawn images to the nearest training ones, and a sheet.

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
