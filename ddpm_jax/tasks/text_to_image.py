"""How a text-to-image system is evaluated: its loss, and samples of captions and prompts.

Each function of `EVALUATIONS` is one part of it. A further metric of samples is one function in
`SAMPLE_METRICS`, which is computed at every scale of guidance.
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
from ddpm_jax.metrics.distances import Grouped, frechet_distance
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

BATCH = 64  # images that are sampled in one call
QUICK_SAMPLES = 64  # samples of captions in an evaluation before the final one, at most
SHEET = (8, 8)  # captions on the sheet of samples, images of each
CHUNK = 1000  # captions and images that are compared in one call
FEATURES = "text_encoder"  # what metrics call the image tower beside the text encoder


class TextSamples(NamedTuple):
    """Samples at one scale of guidance, in [-1, 1].

    Attributes:
      captions: Held-out captions.
      images: One for every caption.
      prompts: Texts and their images, by the names of sets of prompts.
    """

    captions: list[str]
    images: Float[np.ndarray, "n h w c"]
    prompts: dict[str, tuple[list[str], Float[np.ndarray, "m h w c"]]]


# What the parts of an evaluation share: functions for `Context.shared`.


def _task(context: Context) -> CaptionTask:
    return cast(CaptionTask, context.task)


def held_out_captions(context: Context) -> list[str]:
    """Return the captions that are sampled: fewer before the final evaluation."""
    task = _task(context)
    count = task.evaluation.num_samples
    return task.encoder.texts(
        context.held_out, count if context.full else min(QUICK_SAMPLES, count)
    )


def dual_encoder(context: Context) -> tuple[DualEncoder, PyTree]:
    """Return the dual encoder that computes metrics, with its parameters."""
    load = context.resources.dual_encoder
    if load is None:
        return _task(context).text_network, context.variables.extra["text"]
    network, params = load()
    assert isinstance(network, DualEncoder)
    return network, params


def image_features(context: Context) -> FeatureNetwork:
    """Return the image tower of the dual encoder, in whose features images are compared."""
    return image_tower(FEATURES, *context.shared(dual_encoder))


def reference(context: Context) -> Grouped:
    """Return the features of held-out images, as many as there are samples."""
    images = context.held_out.some(len(context.shared(held_out_captions))).images
    network, levels = context.shared(image_features), context.data.levels
    return Grouped(network.extract(to_images(images, levels))[0])


def own_samples(context: Context) -> TextSamples:
    """Return the samples at the scale of guidance of the settings."""
    return sample_at(_task(context).generator.guidance_scale, context)


def own_metrics(context: Context) -> dict[str, float]:
    """Return the metrics of the samples at the scale of the settings."""
    return metrics_of(context.shared(own_samples), context)


# Sampling.


def sample_texts(
    context: Context, sets: Sequence[Sequence[str]], guidance: PyTree
) -> list[Float[np.ndarray, "n h w c"]]:
    """Return an image of each text of every set, the n-th of a set from the n-th key.

    All of them are sampled in calls of one shape, compiled once.
    """
    task, encoder = _task(context), _task(context).encoder
    texts = [text for texts in sets for text in texts]
    numbers = np.concatenate([np.arange(len(texts), dtype=np.int32) for texts in sets])
    size = context.round_up(BATCH)
    fill = -len(texts) % size
    texts, numbers = [*texts, *[""] * fill], np.pad(numbers, (0, fill))
    null = context.place(encoder.prepare([""] * size))
    images = []
    for start in range(0, len(texts), size):
        context.check_preemption()
        rows = slice(start, start + size)
        captions, index = context.place((encoder.prepare(texts[rows]), numbers[rows]))
        keys = example_keys(purpose_key(context.seed, SAMPLE), 0, index)
        samples = task.sample_captions(
            context.variables, keys, captions, null, SampleRequest(), guidance, context.compile
        )
        images.append(fetch(samples))
    ends = np.cumsum([len(texts) for texts in sets])
    return np.split(np.concatenate(images), ends)[:-1]


def sample_at(scale: float, context: Context) -> TextSamples:
    """Return samples at a scale of guidance: of captions, and in the end of prompts.

    Raises:
      NonFinite: a value of an image is not finite.
    """
    task, captions = _task(context), context.shared(held_out_captions)
    sets = task.prompts.sets(context.split) if context.full else {}
    guidance = task.generator.make_guidance(scale)
    images, *of_prompts = sample_texts(context, [captions, *sets.values()], guidance)
    for part in (images, *of_prompts):
        plots.check_finite(part)
    pairs = zip(sets.items(), of_prompts, strict=True)
    return TextSamples(captions, images, {name: (texts, x) for (name, texts), x in pairs})


# Metrics of samples, at any scale of guidance.


@runtime_checkable
class SampleMetric(Protocol):
    """A function that computes metrics of samples."""

    def __call__(self, samples: TextSamples, context: Context) -> dict[str, float]:
        """Return metrics by name."""


def distance_metrics(samples: TextSamples, context: Context) -> dict[str, float]:
    """Return the Frechet distance of samples to held-out images, in the final evaluation."""
    if not context.full:
        return {}
    network = context.shared(image_features)
    images = Grouped(network.extract(samples.images)[0])
    return distance_to(context.shared(reference), images, f"fd_{network.name}")


def clip_metrics(samples: TextSamples, context: Context) -> dict[str, float]:
    """Return the CLIP score of captions and their samples."""
    return with_error("clip_score", clip_score(samples.captions, samples.images, context))


def alignment_metrics(samples: TextSamples, context: Context) -> dict[str, float]:
    """Return the shares of images that show their captions, and their prompts."""
    align = _task(context).prompts.align
    metrics = averages(align(samples.images, samples.captions))
    for name, (texts, images) in samples.prompts.items():
        verdicts = align(images, texts)
        metrics |= averages({f"{criterion}_{name}": of for criterion, of in verdicts.items()})
    return metrics


SAMPLE_METRICS: tuple[SampleMetric, ...] = (distance_metrics, clip_metrics, alignment_metrics)


def metrics_of(samples: TextSamples, context: Context) -> dict[str, float]:
    """Return every metric of samples."""
    metrics: dict[str, float] = {}
    for compute in SAMPLE_METRICS:
        metrics |= compute(samples, context)
    return metrics


def distance_to(truth: Grouped, images: Grouped, name: str) -> dict[str, float]:
    """Return the Frechet distance as the metric `name`, with its error; none of one image."""
    if min(truth.moments.size, images.moments.size) < 2:
        log_once(f"left out, since it needs at least 2 images: {name}")
        return {}
    distance = frechet_distance(images, truth)
    return with_error(name, (distance.value, distance.error))


def clip_score(
    texts: Sequence[str], images: Float[np.ndarray, "n h w c"], context: Context
) -> Average:
    """Return the mean of `clip_scores` of captions and images, in [-1, 1]."""
    network, params = context.shared(dual_encoder)
    tokens, parts = tokenize(texts, network.length), []
    compiled = context.compile(cosines, static_argnums=0)
    for start in range(0, len(texts), CHUNK):
        rows = slice(start, start + CHUNK)
        parts.append(fetch(compiled(network, params, tokens[rows], images[rows])))
    return average(clip_scores(np.concatenate(parts)))


def example_losses(
    task: CaptionTask, variables: Variables, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return the loss of every example and its other quantities, without dropout.

    Args:
      task: the task.
      variables: of the trained task.
      batch: examples.
      keys: one for every example.
    """
    losses, metrics, _ = task.loss(variables, batch, keys, train=False, all_gather=lambda x: x)
    return {"loss": losses, **metrics}


# The parts of an evaluation.


def caption_loss(task: CaptionTask, context: Context) -> Evaluation:
    """Return the loss under held-out captions, of fewer examples before the final evaluation."""
    size = task.evaluation.batch_size
    examples = context.examples(4 * size)
    return Evaluation(
        averages(context.per_example(example_losses, examples, size, context.variables))
    )


def sample_sheet(task: CaptionTask, context: Context) -> Evaluation:
    """Return a sheet of samples, several of each caption."""
    rows, columns = SHEET
    captions = task.encoder.texts(context.held_out, rows)
    repeated = [caption for caption in captions for _ in range(columns)]
    (images,) = sample_texts(context, [repeated], context.guidance)
    parts = [images[start : start + columns] for start in range(0, len(images), columns)]
    sheet = plots.attempt(plots.captioned, list(zip(captions, parts, strict=True)))
    return Evaluation(images={"samples": sheet})


def reference_metrics(task: CaptionTask, context: Context) -> Evaluation:
    """Return what the metrics of samples are to be compared with: the same of training images.

    The CLIP score is that of held-out images. All of it is of the final evaluation.
    """
    if not context.full:
        return Evaluation()
    captions, network = context.shared(held_out_captions), context.shared(image_features)
    name = f"fd_{network.name}_of_training"
    training = to_images(context.data.train.some(len(captions)).images, context.data.levels)
    usual = Grouped(network.extract(training)[0])
    metrics = distance_to(context.shared(reference), usual, name)
    metrics[f"{name}_images"] = float(usual.moments.size)
    real = to_images(context.held_out.first(len(captions)).images, context.data.levels)
    metrics |= with_error("clip_score_of_images", clip_score(captions, real, context))
    tower = "this run's" if context.resources.dual_encoder is None else "another run's"
    about = {
        "generation": task.generator.about(),
        "num_samples": len(captions),
        "reference": f"{context.split} split",
        "features": {network.name: f"image tower beside {tower} text encoder"},
    }
    return Evaluation(metrics, about=about)


def sample_metrics(task: CaptionTask, context: Context) -> Evaluation:
    """Return the metrics of samples at the scale of guidance of the settings."""
    del task
    return Evaluation(dict(context.shared(own_metrics)))


def guidance_sweep(task: CaptionTask, context: Context) -> Evaluation:
    """Return the metrics of samples at every scale, and plots, in the final evaluation."""
    if not context.full:
        return Evaluation()
    curve = {task.generator.guidance_scale: context.shared(own_metrics)}
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
