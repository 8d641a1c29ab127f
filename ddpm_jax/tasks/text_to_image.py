"""Evaluation of a text-to-image task: its loss, and metrics of samples of captions and prompts.

Each function in `EVALUATIONS` computes one part of the evaluation. Each function in
`SAMPLE_METRICS` computes metrics of samples at every guidance scale.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from ddpm_jax import plots
from ddpm_jax.data.tokenizer import tokenize
from ddpm_jax.data.types import Batch
from ddpm_jax.metrics.averages import Average, average, averages, with_error
from ddpm_jax.metrics.clip_score import clip_scores, cosines
from ddpm_jax.metrics.distances import GroupedMoments, frechet_distance
from ddpm_jax.metrics.features import FeatureNetwork
from ddpm_jax.metrics.networks import image_tower
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.parallel.partitioner import fetch
from ddpm_jax.progress import log_once
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.task import Context, Evaluation, SampleRequest, Variables
from ddpm_jax.tasks.generation import CaptionTask
from ddpm_jax.tasks.guidance_plots import guidance_plots

BATCH = 64  # number of images that are sampled in one call
QUICK_SAMPLES = 64  # maximum number of sampled captions in an evaluation during training
SHEET = (8, 8)  # number of captions in the image grid, and number of samples of each caption
CHUNK = 1000  # number of pairs whose CLIP score is computed in one call
FEATURES = "text_encoder"  # name, in metrics, of the features of the image encoder


class TextSamples(NamedTuple):
    """Samples at one guidance scale.

    Attributes:
      captions: The N held-out captions.
      images: One sample for each caption [N, H, W, C] in [-1, 1].
      prompts: By the name of the prompt set, M texts and one sample for each text [M, H, W, C].
    """

    captions: list[str]
    images: Float[np.ndarray, "n h w c"]
    prompts: dict[str, tuple[list[str], Float[np.ndarray, "m h w c"]]]


# Functions for `Context.cached`: their results are used by several parts of an evaluation.


def _task(context: Context) -> CaptionTask:
    return cast(CaptionTask, context.task)


def held_out_captions(context: Context) -> list[str]:
    """Return the captions to sample: `num_samples`; during training, at most `QUICK_SAMPLES`."""
    task = _task(context)
    count = task.evaluation.num_samples
    return task.encoder.texts(
        context.held_out, count if context.full else min(QUICK_SAMPLES, count)
    )


def dual_encoder(context: Context) -> tuple[DualEncoder, PyTree]:
    """Return the text and image encoder that compute metrics, and their parameters."""
    load = context.resources.dual_encoder
    if load is None:
        return _task(context).text_network, context.variables.extra["text"]
    network, params = load()
    assert isinstance(network, DualEncoder)
    return network, params


def image_features(context: Context) -> FeatureNetwork:
    """Return the image encoder, whose features the Frechet distance compares."""
    return image_tower(FEATURES, *context.cached(dual_encoder))


def reference_features(context: Context) -> GroupedMoments:
    """Return the feature moments of random held-out images, as many as there are samples."""
    images = context.held_out.random_subset(len(context.cached(held_out_captions))).images
    network, levels = context.cached(image_features), context.data.levels
    return GroupedMoments(network.extract(to_images(images, levels))[0])


def default_samples(context: Context) -> TextSamples:
    """Return samples of captions and prompts at the guidance scale of the config."""
    return sample_at(_task(context).generator.guidance_scale, context)


def default_metrics(context: Context) -> dict[str, float]:
    """Return the metrics of the samples that `default_samples` returns."""
    return metrics_of(context.cached(default_samples), context)


# Sampling.


def sample_texts(
    context: Context, sets: Sequence[Sequence[str]], guidance: PyTree
) -> list[Float[np.ndarray, "n h w c"]]:
    """Return one sample for each text, as one array [N, H, W, C] for each set of texts.

    The n-th sample of every set uses the same random key. All batches have the same shape, so that
    sampling is compiled once.

    Args:
      context: The evaluation context (`task.Context`).
      sets: Sets of texts.
      guidance: The guidance that `make_guidance` of the generation model returns.
    """
    task, encoder = _task(context), _task(context).encoder
    texts = [text for texts in sets for text in texts]
    indices = np.concatenate([np.arange(len(texts), dtype=np.int32) for texts in sets])
    size = context.round_up(BATCH)
    padding = -len(texts) % size
    texts, indices = [*texts, *[""] * padding], np.pad(indices, (0, padding))
    null = context.place(encoder.prepare([""] * size))
    images = []
    for start in range(0, len(texts), size):
        context.check_preemption()
        rows = slice(start, start + size)
        captions, index = context.place((encoder.prepare(texts[rows]), indices[rows]))
        keys = example_keys(purpose_key(context.seed, SAMPLE), 0, index)
        samples = task.sample_captions(
            context.variables, keys, captions, null, SampleRequest(), guidance, context.compile
        )
        images.append(fetch(samples))
    ends = np.cumsum([len(texts) for texts in sets])
    return np.split(np.concatenate(images), ends)[:-1]


def sample_at(scale: float, context: Context) -> TextSamples:
    """Return samples of captions at a guidance scale, and in the final evaluation of prompts.

    Raises:
      NonFinite: If a value of an image is not finite.
    """
    task, captions = _task(context), context.cached(held_out_captions)
    sets = task.prompts.sets(context.split) if context.full else {}
    guidance = task.generator.make_guidance(scale)
    images, *prompt_images = sample_texts(context, [captions, *sets.values()], guidance)
    for part in (images, *prompt_images):
        plots.check_finite(part)
    pairs = zip(sets.items(), prompt_images, strict=True)
    return TextSamples(captions, images, {name: (texts, x) for (name, texts), x in pairs})


# Metrics of samples at one guidance scale.


@runtime_checkable
class SampleMetric(Protocol):
    """A function that computes metrics of samples."""

    def __call__(self, samples: TextSamples, context: Context) -> dict[str, float]:
        """Return the metrics of the samples, by name."""


def distance_metrics(samples: TextSamples, context: Context) -> dict[str, float]:
    """In the final evaluation, return the Frechet distance of samples to held-out images."""
    if not context.full:
        return {}
    network = context.cached(image_features)
    images = GroupedMoments(network.extract(samples.images)[0])
    return distance_to(context.cached(reference_features), images, f"fd_{network.name}")


def clip_metrics(samples: TextSamples, context: Context) -> dict[str, float]:
    """Return the CLIP score of captions and their samples, with its standard error."""
    return with_error("clip_score", clip_score(samples.captions, samples.images, context))


def alignment_metrics(samples: TextSamples, context: Context) -> dict[str, float]:
    """Return the shares, from 0 to 1, of samples that show what their captions or prompts say."""
    align = _task(context).prompts.align
    metrics = averages(align(samples.images, samples.captions))
    for name, (texts, images) in samples.prompts.items():
        results = align(images, texts)
        metrics |= averages({f"{key}_{name}": aligned for key, aligned in results.items()})
    return metrics


SAMPLE_METRICS: tuple[SampleMetric, ...] = (distance_metrics, clip_metrics, alignment_metrics)


def metrics_of(samples: TextSamples, context: Context) -> dict[str, float]:
    """Return the metrics of all functions in `SAMPLE_METRICS`."""
    metrics: dict[str, float] = {}
    for compute in SAMPLE_METRICS:
        metrics |= compute(samples, context)
    return metrics


def distance_to(reference: GroupedMoments, images: GroupedMoments, name: str) -> dict[str, float]:
    """Return the Frechet distance of two sets of images as the metric `name`, with its error.

    If one set has fewer than 2 images, log a warning and return an empty dictionary.
    """
    if min(reference.moments.size, images.moments.size) < 2:
        log_once(f"metric {name} is left out: it needs at least 2 images in each of the two sets")
        return {}
    distance = frechet_distance(images, reference)
    return with_error(name, distance.estimate)


def clip_score(
    texts: Sequence[str], images: Float[np.ndarray, "n h w c"], context: Context
) -> Average:
    """Return the mean CLIP score of pairs of captions and images (values in [-1, 1])."""
    network, params = context.cached(dual_encoder)
    tokens, parts = tokenize(texts, network.length), []
    compiled = context.compile(cosines, static_argnums=0)
    for start in range(0, len(texts), CHUNK):
        rows = slice(start, start + CHUNK)
        parts.append(fetch(compiled(network, params, tokens[rows], images[rows])))
    return average(clip_scores(np.concatenate(parts)))


def example_losses(
    task: CaptionTask, variables: Variables, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return, by name, the loss and its terms for every example [B], without dropout.

    Args:
      task: The task, after `bind` has set the fields that depend on the data set.
      variables: The parameters and the extra variables (not trained by gradients) of the task.
      batch: Images with captions in the form that the text encoder takes.
      keys: Random keys, one for each example.
    """
    losses, metrics, _ = task.loss(variables, batch, keys, train=False, all_gather=lambda x: x)
    return {"loss": losses, **metrics}


# The parts of an evaluation.


def caption_loss(task: CaptionTask, context: Context) -> Evaluation:
    """Return the loss on held-out examples; during training, on the first 4 batches."""
    size = task.evaluation.batch_size
    examples = context.examples(4 * size)
    return Evaluation(
        averages(context.per_example(example_losses, examples, size, context.variables))
    )


def sample_sheet(task: CaptionTask, context: Context) -> Evaluation:
    """Return an image grid of samples, with one row for each caption."""
    rows, columns = SHEET
    captions = task.encoder.texts(context.held_out, rows)
    repeated = [caption for caption in captions for _ in range(columns)]
    (images,) = sample_texts(context, [repeated], context.guidance)
    parts = [images[start : start + columns] for start in range(0, len(images), columns)]
    sheet = plots.image_or_error(plots.captioned, list(zip(captions, parts, strict=True)))
    return Evaluation(images={"samples": sheet})


def reference_metrics(task: CaptionTask, context: Context) -> Evaluation:
    """In the final evaluation, return metrics of real images, to compare with those of samples.

    They are the Frechet distance of training images to held-out images, and the CLIP score of
    held-out images and their captions.
    """
    if not context.full:
        return Evaluation()
    captions, network = context.cached(held_out_captions), context.cached(image_features)
    name = f"fd_{network.name}_of_training"
    training = to_images(
        context.data.train.random_subset(len(captions)).images, context.data.levels
    )
    features = GroupedMoments(network.extract(training)[0])
    metrics = distance_to(context.cached(reference_features), features, name)
    metrics[f"{name}_images"] = float(features.moments.size)
    real = to_images(context.held_out.first(len(captions)).images, context.data.levels)
    metrics |= with_error("clip_score_of_images", clip_score(captions, real, context))
    owner = "this run" if context.resources.dual_encoder is None else "another run"
    about = {
        "generation": task.generator.about(),
        "num_samples": len(captions),
        "reference": f"{context.split} split",
        "features": {network.name: f"image encoder trained with the text encoder of {owner}"},
    }
    return Evaluation(metrics, about=about)


def sample_metrics(task: CaptionTask, context: Context) -> Evaluation:
    """Return the metrics of samples at the guidance scale of the config."""
    del task
    return Evaluation(dict(context.cached(default_metrics)))


def guidance_sweep(task: CaptionTask, context: Context) -> Evaluation:
    """In the final evaluation, return metrics of samples at all guidance scales, and plots."""
    if not context.full:
        return Evaluation()
    curve = {task.generator.guidance_scale: context.cached(default_metrics)}
    for scale in task.evaluation.guidance_scales:
        if scale not in curve:
            curve[scale] = metrics_of(sample_at(scale, context), context)
    metrics = {
        f"guidance_{scale:g}/{name}": value
        for scale, point in curve.items()
        for name, value in point.items()
    }
    return Evaluation(metrics, dict(guidance_plots(curve, FEATURES)) if len(curve) > 1 else {})


EVALUATIONS = (caption_loss, sample_sheet, reference_metrics, sample_metrics, guidance_sweep)
