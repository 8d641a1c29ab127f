"""How good a set of samples is, judged in a network's features and in pixels."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ddpm_jax import errors, plots
from ddpm_jax.data.types import Data, Split
from ddpm_jax.metrics.averages import averages, with_error
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
from ddpm_jax.metrics.features import FeatureNetwork
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.progress import log

WHOLE = 100_000  # images of a training set that are looked at, at the most: an endless one's
CHUNK = 1000  # images that are looked at, and added to the moments, at once
KEPT = 10_000  # of a set: features for KID, precision and recall, images for neighbours


class Quality(NamedTuple):
    """Metrics by name, and a sheet of samples beside their nearest training images."""

    metrics: dict[str, float]
    neighbours: np.ndarray | errors.NonFinite | None


class Features(NamedTuple):
    """Features of a set of images: the moments of all, the first `KEPT` features, and log p(y|x)."""

    grouped: Grouped
    features: np.ndarray
    logs: np.ndarray

    @property
    def moments(self) -> Moments:
        """The moments of all features."""
        return self.grouped.moments


def extract_features(
    network: FeatureNetwork, parts: Iterator[np.ndarray], before: Features | None = None
) -> Features:
    """Return the features of images, which come in parts, added to those of `before`."""
    grouped = before.grouped if before else None
    kept = [before.features] if before else []
    logs = [before.logs] if before else []
    for part in parts:
        features, log_probs = network.extract(part)
        grouped = Grouped(features, grouped)
        room = KEPT - sum(len(rows) for rows in kept)
        kept.append(features[:room].astype(np.float32))
        logs.append(log_probs.astype(np.float32))
    assert grouped is not None
    return Features(grouped, np.concatenate(kept), np.concatenate(logs))


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Samples beside held-out and training ones, as a feature network sees them.

    Attributes:
      network: The feature network.
      samples: Images in [-1, 1].
      labels: The class that each was sampled for; None: no class.
      order: In which `of_samples` has the samples.
      data: The data set.
      split: Whose images are the held-out ones.
      size: Images of both sides of a ratio.
      of_equally_many: `size` of the samples.
      of_samples: All samples.
      of_training: `size` training images.
      of_held_out: All held-out images.
    """

    network: FeatureNetwork
    samples: Float[np.ndarray, "n h w c"]
    labels: np.ndarray | None
    order: np.ndarray
    data: Data
    split: str
    size: int
    of_equally_many: Features
    of_samples: Features
    of_training: Features
    of_held_out: Features

    @property
    def distance_name(self) -> str:
        """What the Frechet distance is called: Inception's is FID."""
        return "fid" if self.network.name == "inception" else f"fd_{self.network.name}"

    @property
    def counts(self) -> dict[str, int]:
        """How many images each set has."""
        return {
            "generated": len(self.samples),
            "held-out": self.of_held_out.moments.size,
            "training": len(self.data.train.images),
        }

    @functools.cached_property
    def distance(self) -> Jackknife:
        """The Frechet distance of samples to held-out images."""
        return frechet_distance(self.of_samples.grouped, self.of_held_out.grouped)

    def has(self, least: int, *sets: str) -> bool:
        """Return whether each of some sets, by their names in `counts`, has `least` images."""
        return min(self.counts[name] for name in sets) >= least


class Measured(NamedTuple):
    """Metrics by name, the names of those that there are too few images for, and a sheet."""

    metrics: dict[str, float]
    missing: tuple[str, ...] = ()
    sheet: np.ndarray | errors.NonFinite | None = None


def compare(
    network: FeatureNetwork,
    samples: Float[np.ndarray, "n h w c"],
    labels: np.ndarray | None,
    data: Data,
    split: str = "test",
) -> Comparison:
    """Return what all metrics of `quality` are computed from; the arguments are its own.

    Args:
      network: the feature network.
      samples: in [-1, 1].
      labels: the class that each was sampled for; None: no class.
      data: the data set.
      split: whose images are the held-out ones.
    """
    train = data.train.some(len(samples))
    size = len(train.images)
    order = np.arange(len(samples))
    if size < len(samples):  # a part of them, which need not be in a random order
        order = np.random.Generator(np.random.Philox(key=[0, 4])).permutation(len(samples))
    of_equally_many = extract_features(network, _chunks(samples, order[:size]))
    of_samples = (
        extract_features(network, _chunks(samples, order[size:]), of_equally_many)
        if size < len(samples)
        else of_equally_many
    )
    of_training = extract_features(network, _parts(train, data.levels))
    held_out = extract_features(network, _parts(data.part(split), data.levels))
    return Comparison(
        network,
        samples,
        labels,
        order,
        data,
        split,
        size,
        of_equally_many,
        of_samples,
        of_training,
        held_out,
    )


def frechet_of_samples(sets: Comparison) -> Measured:
    """Measure the Frechet distance of samples to held-out images."""
    if not sets.has(2, "generated", "held-out"):
        return Measured({}, (sets.distance_name,))
    return Measured(_of(sets.distance_name, sets.distance))


def frechet_ratio(sets: Comparison) -> Measured:
    """Measure the Frechet distance of training images, and the ratio of equally many samples."""
    name = sets.distance_name
    if not sets.has(2, *sets.counts):
        return Measured({}, (f"{name}_ratio",))
    apart, usual = (
        sets.distance,
        frechet_distance(sets.of_training.grouped, sets.of_held_out.grouped),
    )
    if sets.of_equally_many is not sets.of_samples:
        apart = frechet_distance(sets.of_equally_many.grouped, sets.of_held_out.grouped)
    metrics, ratio = _of(f"{name}_of_training", usual), apart.over(usual)
    if ratio is None:
        return Measured(metrics, (f"{name}_ratio",))
    metrics |= _of(f"{name}_ratio", ratio)
    return Measured({**metrics, f"{name}_ratio_images": float(sets.size)})


def kernel_of_samples(sets: Comparison) -> Measured:
    """Measure the kernel distance (KID) of samples to held-out ones."""
    name = f"kid_{sets.network.name}"
    if not sets.has(2, "generated", "held-out"):
        return Measured({}, (name,))
    return Measured(
        with_error(name, kernel_distance(sets.of_samples.features, sets.of_held_out.features))
    )


def score(sets: Comparison) -> Measured:
    """Measure the Inception score of samples."""
    name = f"score_{sets.network.name}"
    if not sets.has(2, "generated"):
        return Measured({}, (name,))
    p = np.exp(sets.of_samples.logs)
    return Measured(with_error(name, (inception_score(p), inception_score_error(p))))


def precision_and_recall(sets: Comparison) -> Measured:
    """Measure how many samples lie near held-out ones, and the other way round."""
    names = f"precision_{sets.network.name}", f"recall_{sets.network.name}"
    if not sets.has(RANK + 1, "generated", "held-out"):
        return Measured({}, (", ".join(names),))
    metrics: dict[str, float] = {}
    shares = precision_recall(sets.of_held_out.features, sets.of_samples.features)
    counts = len(sets.of_samples.features), len(sets.of_held_out.features)
    for name, share, count in zip(names, shares, counts, strict=True):
        metrics |= with_error(name, (share, share_error(share, count)))
    return Measured(metrics)


def fid_to_training(sets: Comparison) -> Measured:
    """Measure FID against the whole training set, as papers report it: of Inception alone."""
    if sets.network.name != "inception":
        return Measured({})
    if not sets.has(2, "generated", "training"):
        return Measured({}, ("fid_to_training",))
    all_training = extract_features(
        sets.network, _parts(sets.data.train.some(WHOLE), sets.data.levels)
    )
    return Measured(
        _of("fid_to_training", frechet_distance(sets.of_samples.grouped, all_training.grouped))
    )


def classifier_shares(sets: Comparison) -> Measured:
    """Measure the accuracy of a classifier on samples, and the share of confident answers."""
    if sets.network.name == "inception":
        return Measured({})
    right = {"confident_share": np.exp(sets.of_samples.logs).max(1) > 0.9}
    if sets.labels is not None:
        right["classifier_accuracy"] = (
            sets.of_samples.logs.argmax(1) == np.asarray(sets.labels)[sets.order]
        )
    return Measured(averages(right))


def nearest_training_images(sets: Comparison) -> Measured:
    """Measure how far samples are, in pixels, from the nearest training ones."""
    metrics, sheet = neighbours(sets.samples[:KEPT], sets.data, sets.split)
    missing = () if "nearest_ratio" in metrics else ("nearest_ratio",)
    return Measured(metrics, missing, sheet)


METRICS: tuple[Callable[[Comparison], Measured], ...] = (
    frechet_of_samples,
    frechet_ratio,
    kernel_of_samples,
    score,
    precision_and_recall,
    fid_to_training,
    classifier_shares,
)


def quality(
    network: FeatureNetwork,
    samples: Float[np.ndarray, "n h w c"],
    labels: np.ndarray | None,
    data: Data,
    split: str = "test",
    pixels: bool = True,
) -> Quality:
    """Compare `samples` with the held-out images, and as many training images with them, too.

    A distance between two finite sets is not 0: a perfect model reaches that of training images to
    the held-out ones.  Both depend on the number of images, so the ratio is of the distances of
    equally many, min(samples, training), which `..._ratio_images` reports.  The metrics are named
    after the network; Inception's is FID, also against the whole training set.  Every
    metric has its standard error beside it, `..._error`; a metric that there are too few images for
    is left out, and a line says so.

    Args:
      network: the feature network.
      samples: in [-1, 1].
      labels: the class that each was sampled for; None: no class.
      data: the data set.
      split: whose images are the held-out ones.
      pixels: compare with the nearest training images, too.
    """
    sets = compare(network, samples, labels, data, split)
    metrics: dict[str, float] = {"num_samples": float(len(samples))}
    missing: list[str] = []
    sheet = None
    for measure in (*METRICS, nearest_training_images) if pixels else METRICS:
        measured = measure(sets)
        metrics |= measured.metrics
        missing += measured.missing
        sheet = measured.sheet if measured.sheet is not None else sheet
    if missing:
        sizes = ", ".join(f"{count} {name}" for name, count in sets.counts.items())
        log(f"metrics that {sizes} images do not give are left out: {', '.join(missing)}")
    return Quality(metrics, sheet)


def neighbours(
    samples: Float[np.ndarray, "n h w c"], data: Data, split: str = "test"
) -> tuple[dict[str, float], np.ndarray | errors.NonFinite]:
    """Return distances in pixels of samples to the nearest training ones, and a sheet.

    The median distance, and its ratio to that of held-out images: under 1 is memorising.  The ratio
    is left out where half of the held-out images are training images, too.
    """
    train = to_images(data.train.some(WHOLE).images, data.levels)
    held_out = to_images(data.part(split).images, data.levels)
    flat = [images.reshape(len(images), -1) for images in (samples, held_out, train)]
    distance, which = nearest(flat[0], flat[2])
    usual, _ = nearest(flat[1], flat[2])
    rows = []
    for start in range(0, min(40, len(samples)) // 10 * 10, 10):
        rows += [samples[start : start + 10], train[which[start : start + 10]]]
    apart = median(distance)
    metrics = with_error("nearest", apart)
    ratio = quotient(apart, median(usual))
    if ratio is not None:
        metrics |= with_error("nearest_ratio", ratio)
    shown = np.concatenate(rows) if rows else samples
    return metrics, plots.attempt(plots.grid, shown, columns=10)


def _of(name: str, distance: Jackknife) -> dict[str, float]:
    return with_error(name, (distance.value, distance.error))


def _chunks(images: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    for at in range(0, len(rows), CHUNK):
        yield images[rows[at : at + CHUNK]]


def _parts(split: Split, levels: int) -> Iterator[np.ndarray]:
    for at in range(0, len(split.images), CHUNK):
        yield to_images(split.images[at : at + CHUNK], levels)
