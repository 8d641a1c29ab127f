"""Quality of samples: metrics that compare features and pixels of samples and real images."""

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
    GroupedMoments,
    Jackknife,
    Moments,
    frechet_distance,
    inception_score,
    inception_score_error,
    kernel_distance,
    median,
    quotient,
    share_error,
)
from ddpm_jax.metrics.features import FeatureNetwork
from ddpm_jax.metrics.neighbours import NEIGHBOUR_RANK, nearest_neighbours, precision_recall
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.progress import log

MAX_TRAINING_IMAGES = 100_000  # largest number of training images for a comparison
CHUNK = 1000  # number of images in one call of a feature network
MAX_FEATURES = 10_000  # largest number of features of a set in KID, precision, recall
MAX_PIXEL_SAMPLES = 10_000  # largest number of samples that are compared in pixels


class Quality(NamedTuple):
    """Metrics of a set of samples.

    Attributes:
      metrics: A dictionary from the name of a metric to its value.
      nearest_training_images: A figure with samples, each above the nearest training image; an
        error object if values are not finite; None if pixels are not compared.
    """

    metrics: dict[str, float]
    nearest_training_images: np.ndarray | errors.NonFinite | None


class FeatureSet(NamedTuple):
    """Features of a set of N images.

    Attributes:
      grouped: Moments of the features of all images, in groups for standard errors.
      features: Features [n, D] of the first images, at most `MAX_FEATURES`.
      log_probs: log p(y|x) [N, classes] of all images.
    """

    grouped: GroupedMoments
    features: np.ndarray
    log_probs: np.ndarray

    @property
    def moments(self) -> Moments:
        """Moments of the features of all images."""
        return self.grouped.moments


def extract_features(
    network: FeatureNetwork, chunks: Iterator[np.ndarray], previous: FeatureSet | None = None
) -> FeatureSet:
    """Return the features of a set of images.

    Args:
      network: The feature network.
      chunks: An iterator of arrays of images, [n, H, W, C] in [-1, 1].
      previous: Features of images that the set also contains, before the new images, or None.
    """
    grouped = previous.grouped if previous else None
    stored = [previous.features] if previous else []
    stored_log_probs = [previous.log_probs] if previous else []
    for chunk in chunks:
        features, log_probs = network.extract(chunk)
        grouped = GroupedMoments(features, grouped)
        room = MAX_FEATURES - sum(len(rows) for rows in stored)
        stored.append(features[:room].astype(np.float32))
        stored_log_probs.append(log_probs.astype(np.float32))
    assert grouped is not None
    return FeatureSet(grouped, np.concatenate(stored), np.concatenate(stored_log_probs))


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Samples, training images and held-out images, with features of one feature network.

    Attributes:
      network: The feature network.
      samples: Samples, [N, H, W, C] in [-1, 1].
      labels: The class [N] on which each sample is conditioned; None for a model without classes.
      order: Index in `samples` of each row of `sample_features`.
      data: The data set.
      split: Name of the split of the held-out images.
      size: Number of images in `matched_sample_features` and in `training_features`.
      sample_features: Features of all samples.
      matched_sample_features: Features of a random subset of `size` samples.
      training_features: Features of a random subset of `size` training images.
      held_out_features: Features of all held-out images.
    """

    network: FeatureNetwork
    samples: Float[np.ndarray, "n h w c"]
    labels: np.ndarray | None
    order: np.ndarray
    data: Data
    split: str
    size: int
    sample_features: FeatureSet
    matched_sample_features: FeatureSet
    training_features: FeatureSet
    held_out_features: FeatureSet

    @property
    def distance_name(self) -> str:
        """Name of the Frechet distance: "fid" for the Inception network, else "fd_NETWORK"."""
        return "fid" if self.network.name == "inception" else f"fd_{self.network.name}"

    @property
    def counts(self) -> dict[str, int]:
        """Number of images in each set, with the keys "sampled", "held-out" and "training"."""
        return {
            "sampled": len(self.samples),
            "held-out": self.held_out_features.moments.size,
            "training": len(self.data.train.images),
        }

    @functools.cached_property
    def distance(self) -> Jackknife:
        """Frechet distance between samples and held-out images."""
        return frechet_distance(self.sample_features.grouped, self.held_out_features.grouped)

    def has_images(self, count: int, *sets: str) -> bool:
        """Return True if each of the `sets` (keys of `counts`) has at least `count` images."""
        return min(self.counts[name] for name in sets) >= count


class MetricValues(NamedTuple):
    """The result of one function of `METRICS`.

    Attributes:
      metrics: A dictionary from the name of a metric to its value.
      missing: Names of metrics that are not computed because a set has too few images.
      sheet: A figure of samples that is saved with the metrics, or None.
    """

    metrics: dict[str, float]
    missing: tuple[str, ...] = ()
    sheet: np.ndarray | errors.NonFinite | None = None


def _compare(
    network: FeatureNetwork,
    samples: Float[np.ndarray, "n h w c"],
    labels: np.ndarray | None,
    data: Data,
    split: str = "test",
) -> Comparison:
    """Compute the features of samples, training images and held-out images for `quality`."""
    train = data.train.random_subset(len(samples))
    size = len(train.images)
    order = np.arange(len(samples))
    if size < len(samples):  # random, because samples may be sorted by class
        order = np.random.Generator(np.random.Philox(key=[0, 4])).permutation(len(samples))
    matched = extract_features(network, _sample_chunks(samples, order[:size]))
    every_sample = matched
    if size < len(samples):
        every_sample = extract_features(network, _sample_chunks(samples, order[size:]), matched)
    return Comparison(
        network, samples, labels, order, data, split, size,
        sample_features=every_sample,
        matched_sample_features=matched,
        training_features=extract_features(network, _split_chunks(train, data.levels)),
        held_out_features=extract_features(network, _split_chunks(data.split(split), data.levels)),
    )  # fmt: skip


def frechet_of_samples(sets: Comparison) -> MetricValues:
    """Compute the Frechet distance between samples and held-out images."""
    if not sets.has_images(2, "sampled", "held-out"):
        return MetricValues({}, (sets.distance_name,))
    return MetricValues(with_error(sets.distance_name, sets.distance.estimate))


def frechet_ratio(sets: Comparison) -> MetricValues:
    """Compute d(samples, held-out) / d(training, held-out) with equally many images."""
    name = sets.distance_name
    if not sets.has_images(2, *sets.counts):
        return MetricValues({}, (f"{name}_ratio",))
    held_out, of_samples = sets.held_out_features.grouped, sets.distance
    if sets.size < len(sets.samples):
        of_samples = frechet_distance(sets.matched_sample_features.grouped, held_out)
    of_training = frechet_distance(sets.training_features.grouped, held_out)
    metrics = with_error(f"{name}_of_training", of_training.estimate)
    ratio = of_samples.divided_by(of_training)
    if ratio is None:
        return MetricValues(metrics, (f"{name}_ratio",))
    metrics |= with_error(f"{name}_ratio", ratio.estimate)
    return MetricValues({**metrics, f"{name}_ratio_images": float(sets.size)})


def kernel_of_samples(sets: Comparison) -> MetricValues:
    """Compute the kernel distance (KID) between samples and held-out images."""
    name = f"kid_{sets.network.name}"
    if not sets.has_images(2, "sampled", "held-out"):
        return MetricValues({}, (name,))
    distance = kernel_distance(sets.sample_features.features, sets.held_out_features.features)
    return MetricValues(with_error(name, distance))


def score(sets: Comparison) -> MetricValues:
    """Compute the Inception score of samples from the classes of the feature network."""
    name = f"score_{sets.network.name}"
    if not sets.has_images(2, "sampled"):
        return MetricValues({}, (name,))
    p = np.exp(sets.sample_features.log_probs)
    return MetricValues(with_error(name, (inception_score(p), inception_score_error(p))))


def precision_and_recall(sets: Comparison) -> MetricValues:
    """Compute precision and recall of samples with respect to held-out images."""
    names = f"precision_{sets.network.name}", f"recall_{sets.network.name}"
    if not sets.has_images(NEIGHBOUR_RANK + 1, "sampled", "held-out"):
        return MetricValues({}, (", ".join(names),))
    metrics: dict[str, float] = {}
    held_out, samples = sets.held_out_features.features, sets.sample_features.features
    shares = precision_recall(held_out, samples)
    for name, share, count in zip(names, shares, (len(samples), len(held_out)), strict=True):
        metrics |= with_error(name, (share, share_error(share, count)))
    return MetricValues(metrics)


def fid_to_training(sets: Comparison) -> MetricValues:
    """Compute the FID between samples and training images, if the network is Inception."""
    if sets.network.name != "inception":
        return MetricValues({})
    if not sets.has_images(2, "sampled", "training"):
        return MetricValues({}, ("fid_to_training",))
    train = _split_chunks(sets.data.train.random_subset(MAX_TRAINING_IMAGES), sets.data.levels)
    training = extract_features(sets.network, train).grouped
    distance = frechet_distance(sets.sample_features.grouped, training)
    return MetricValues(with_error("fid_to_training", distance.estimate))


def classifier_shares(sets: Comparison) -> MetricValues:
    """Compute the share of samples that the classifier assigns correctly, or with p > 0.9."""
    if sets.network.name == "inception":
        return MetricValues({})
    log_probs = sets.sample_features.log_probs
    values = {"confident_share": np.exp(log_probs).max(1) > 0.9}
    if sets.labels is not None:
        labels = np.asarray(sets.labels)[sets.order]
        values["classifier_accuracy"] = log_probs.argmax(1) == labels
    return MetricValues(averages(values))


def nearest_training_images(sets: Comparison) -> MetricValues:
    """Compute the median Euclidean distance, in pixels, of samples to the nearest training image.

    `nearest_ratio`, this median over that of held-out images, is far below 1 if the model repeats
    training images. It is left out if half of the held-out images are training images.
    """
    samples, levels = sets.samples[:MAX_PIXEL_SAMPLES], sets.data.levels
    train = to_images(sets.data.train.random_subset(MAX_TRAINING_IMAGES).images, levels)
    held_out = to_images(sets.data.split(sets.split).images, levels)
    rows = [images.reshape(len(images), -1) for images in (samples, held_out, train)]
    distances, indices = nearest_neighbours(rows[0], rows[2])
    held_out_distances, _ = nearest_neighbours(rows[1], rows[2])
    distance = median(distances)
    metrics = with_error("nearest", distance)
    ratio = quotient(distance, median(held_out_distances))
    if ratio is not None:
        metrics |= with_error("nearest_ratio", ratio)
    missing = ("nearest_ratio",) if ratio is None else ()
    shown = []  # ten samples, their ten training images, ten more samples, ...
    for start in range(0, min(40, len(samples)) // 10 * 10, 10):
        shown += [samples[start : start + 10], train[indices[start : start + 10]]]
    sheet = np.concatenate(shown) if shown else samples
    return MetricValues(metrics, missing, plots.image_or_error(plots.grid, sheet, columns=10))


METRICS: tuple[Callable[[Comparison], MetricValues], ...] = (
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
    """Compute the metrics of `METRICS` for samples, with standard errors NAME_error.

    The Frechet distance of two finite sets depends on the numbers of images, and is not 0 for a
    perfect model: such a model reaches the distance of training images to held-out images. The
    metric `..._ratio` compares these two distances with equally many samples and training images.
    If a metric needs more images than are available, a warning is logged and it is left out.

    Args:
      network: The feature network. The names of metrics contain the name of the network.
      samples: Samples, [N, H, W, C] in [-1, 1].
      labels: The class [N] on which each sample is conditioned; None for a model without classes.
      data: The data set.
      split: Name of the split of the held-out images.
      pixels: If True, samples are also compared with training images in pixels.
    """
    sets = _compare(network, samples, labels, data, split)
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
        log(f"{', '.join(missing)} are not computed: there are too few images ({sizes})")
    return Quality(metrics, sheet)


def _sample_chunks(images: np.ndarray, indices: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(indices), CHUNK):
        yield images[indices[start : start + CHUNK]]


def _split_chunks(split: Split, levels: int) -> Iterator[np.ndarray]:
    for start in range(0, len(split.images), CHUNK):
        yield to_images(split.images[start : start + CHUNK], levels)
