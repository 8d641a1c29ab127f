"""Evaluate a denoiser by what it samples: sheets, trajectories, edits, and measures of quality.

The samples of an evaluation are made once, by `Context.samples`, and shared.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from ddpm_jax import errors, plots
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.metrics.quality import quality
from ddpm_jax.parallel.partitioner import fetch
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.task import Context, Evaluation, Samples
from ddpm_jax.tasks.image_denoiser import TRACED, ImageDenoiser
from ddpm_jax.tasks.image_sampler import ImageSampler

SHEET = 100  # samples on a sheet
EDIT_TIMES = (0.3, 0.5, 0.7)
BLEND_TIME = 0.5
ANIMATION_FRAMES = 50

Images = dict[str, np.ndarray | errors.NonFinite]


def number_compared(task: ImageDenoiser, context: Context) -> int:
    """Return how many samples the evaluation compares with images."""
    if not context.resources.features:
        return 0
    evaluation = task.evaluation
    return evaluation.num_samples if context.full else evaluation.num_samples_between


def sample_sheet(task: ImageDenoiser, context: Context) -> Evaluation:
    """Return a sheet of samples, and how they were sampled."""
    images = context.samples(SHEET).images
    model = context.guidance_model
    about = {**task.sampling.about(), "guide": model.about if model else "labels"}
    return Evaluation({}, {"samples": plots.attempt(plots.grid, images, columns=10)}, about)


def trajectories(task: ImageDenoiser, context: Context) -> Evaluation:
    """Return how the first samples came about, at the end of a training."""
    del task
    return Evaluation(images=draw_trajectories(context.samples(SHEET)) if context.full else {})


def draw_trajectories(samples: Samples) -> Images:
    """Return a sheet and an animation [F, H, W, C] of x_t above the predicted x0.

    Both end at the samples.
    """
    assert samples.trace is not None
    xt, x0 = (
        np.concatenate([steps, samples.images[None, : steps.shape[1]]]) for steps in samples.trace
    )
    moments = np.unique(np.linspace(0, len(xt) - 1, TRACED).round().astype(int))
    rows = [steps[moments, image] for image in range(4) for steps in (xt, x0)]
    sheet = plots.attempt(plots.grid, np.concatenate(rows), columns=len(moments))
    frames = np.unique(np.linspace(0, len(xt) - 1, ANIMATION_FRAMES).round().astype(int))

    def animation() -> np.ndarray:
        both = (np.concatenate([xt[frame], x0[frame]]) for frame in frames)
        return np.stack([plots.grid(images, columns=TRACED) for images in both])

    return {"trajectories": sheet, "trajectories_animation": plots.attempt(animation)}


def edits(task: ImageDenoiser, context: Context) -> Evaluation:
    """Return what a denoiser makes of held-out images, by rows, at the end of a training.

    Nothing that an edit should produce is among its inputs: a conditional network gets the label
    "no class", not the image's own, and of an image whose lower half is sampled only the upper one.

    inpainting: images; their upper halves alone; the rest sampled from noise alone, twice.
    image_to_image: images; noised to each of `EDIT_TIMES` and sampled from there.
    interpolation: from one image to the next; both noised alike to `BLEND_TIME`, mixed, and
        sampled from there (Ho et al. 2020, fig. 8).
    """
    if not context.full:
        return Evaluation()
    images = to_images(context.held_out.first(TRACED).images, context.data.levels)
    count = len(images)
    labels = jnp.full(count, len(context.data.classes), jnp.int32) if context.classes else None
    sdedit, sampler = context.compile(ImageSampler.sdedit, static_argnums=0), task.sampler()

    def edit(
        keys: Key[Array, "n"], t: float, images: np.ndarray, known: np.ndarray, mask: np.ndarray
    ) -> Array:
        return sdedit(
            sampler,
            context.variables.params,
            context.guidance,
            keys,
            labels,
            task.null(labels),
            t,
            jnp.asarray(images),
            jnp.asarray(known),
            jnp.asarray(mask),
        )

    def keys(number: int) -> Key[Array, "n"]:
        index = jnp.arange(number * count, (number + 1) * count)
        return example_keys(purpose_key(context.seed, SAMPLE), 1, index)

    free, upper = np.zeros_like(images), np.zeros_like(images)
    upper[:, : images.shape[1] // 2] = 1.0
    seen = images * upper
    share = np.linspace(0, 1, count, dtype=images.dtype)[:, None, None, None]
    same = jnp.broadcast_to(keys(3)[:1], (count,))
    mixed = [
        (1 - share) * images[i] + share * images[i + 1] for i in range(0, min(8, count - 1), 2)
    ]
    rows = {
        "inpainting": [images, seen, *(edit(keys(n), 1.0, seen, seen, upper) for n in range(2))],
        "image_to_image": [images, *(edit(keys(2), t, images, images, free) for t in EDIT_TIMES)],
        "interpolation": [edit(same, BLEND_TIME, row, row, free) for row in mixed],
    }
    sheets: Images = {
        name: plots.attempt(plots.grid, np.concatenate(fetch(parts)), columns=count)
        for name, parts in rows.items()
        if parts
    }
    return Evaluation(images=sheets)


def sample_quality(task: ImageDenoiser, context: Context) -> Evaluation:
    """Return how samples compare with images, in the features of networks and in pixels."""
    count = number_compared(task, context)
    if not count:
        return Evaluation()
    samples = context.samples(count)
    plots.check_finite(samples.images)
    metrics: dict[str, float] = {}
    images: Images = {}
    features: dict[str, str] = {}
    for number, load in enumerate(context.resources.features):
        network = load()
        pixels = context.full and number == 0
        result = quality(
            network, samples.images, samples.labels, context.data, context.split, pixels
        )
        metrics |= result.metrics
        features[network.name] = network.about
        if result.neighbours is not None:
            images["neighbours"] = result.neighbours
    about = {"reference": f"{context.split} split", "features": features}
    return Evaluation(metrics, images, about)


SAMPLE_EVALUATIONS = (sample_sheet, trajectories, edits, sample_quality)
