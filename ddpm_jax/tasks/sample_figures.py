"""Evaluations of the samples of a denoising network: image grids, trajectories, edits, metrics.

`Context.samples` samples the images once per evaluation; all functions in this file use them.
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

SHEET = 100  # number of samples in the image grid
EDIT_TIMES = (0.3, 0.5, 0.7)  # times t at which edits of images start
BLEND_TIME = 0.5  # time t at which sampling from mixtures of two images starts
ANIMATION_FRAMES = 50  # maximum number of frames of an animation

Images = dict[str, np.ndarray | errors.NonFinite]


def number_compared(task: ImageDenoiser, context: Context) -> int:
    """Return the number of samples to compare with held-out images; 0 without feature networks."""
    if not context.resources.features:
        return 0
    evaluation = task.evaluation
    return evaluation.num_samples if context.full else evaluation.num_samples_between


def sample_sheet(task: ImageDenoiser, context: Context) -> Evaluation:
    """Return a grid of 100 samples, and the fields of sampling with which they were sampled."""
    images = context.samples(SHEET).images
    model = context.guidance_model
    about = {**task.sampling.about(), "guidance_model": model.about if model else "labels"}
    return Evaluation({}, {"samples": plots.image_or_error(plots.grid, images, columns=10)}, about)


def trajectories(task: ImageDenoiser, context: Context) -> Evaluation:
    """In the final evaluation, return images of the sampling trajectories of the first samples."""
    del task
    return Evaluation(images=plot_trajectories(context.samples(SHEET)) if context.full else {})


def plot_trajectories(samples: Samples) -> Images:
    """Return an image grid and an animation [F, H, W, C]: rows of x_t above rows of predicted x0.

    The columns of the grid are steps from noise to data. The last column and the last frame show
    the finished samples.
    """
    assert samples.trace is not None
    xt, x0 = (
        np.concatenate([steps, samples.images[None, : steps.shape[1]]]) for steps in samples.trace
    )
    columns = np.unique(np.linspace(0, len(xt) - 1, TRACED).round().astype(int))
    rows = [steps[columns, image] for image in range(4) for steps in (xt, x0)]
    sheet = plots.image_or_error(plots.grid, np.concatenate(rows), columns=len(columns))
    frames = np.unique(np.linspace(0, len(xt) - 1, ANIMATION_FRAMES).round().astype(int))

    def animation() -> np.ndarray:
        images = (np.concatenate([xt[frame], x0[frame]]) for frame in frames)
        return np.stack([plots.grid(rows, columns=TRACED) for rows in images])

    return {"trajectories": sheet, "trajectories_animation": plots.image_or_error(animation)}


def edits(task: ImageDenoiser, context: Context) -> Evaluation:
    """In the final evaluation, return three image grids of edited held-out images.

    A class-conditional network gets the label "no class", and inpainting gets only the upper half
    of an image, so that no input contains the content to be sampled. The rows of the grids are:

    inpainting: the images; their upper halves; two rows with sampled lower halves.
    image_to_image: the images; samples that start from noisy images at each of `EDIT_TIMES`.
    interpolation: samples that start from (1 - s) a + s b of two images a and b, with the same
        noise of `BLEND_TIME` added; s increases from 0 to 1 (Ho et al. 2020, fig. 8).
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

    no_mask, upper = np.zeros_like(images), np.zeros_like(images)
    upper[:, : images.shape[1] // 2] = 1.0
    halves = images * upper
    share = np.linspace(0, 1, count, dtype=images.dtype)[:, None, None, None]
    same_keys = jnp.broadcast_to(keys(3)[:1], (count,))
    mixed = [
        (1 - share) * images[i] + share * images[i + 1] for i in range(0, min(8, count - 1), 2)
    ]
    rows = {
        "inpainting": [
            images,
            halves,
            *(edit(keys(number), 1.0, halves, halves, upper) for number in range(2)),
        ],
        "image_to_image": [
            images,
            *(edit(keys(2), t, images, images, no_mask) for t in EDIT_TIMES),
        ],
        "interpolation": [edit(same_keys, BLEND_TIME, row, row, no_mask) for row in mixed],
    }
    sheets: Images = {
        name: plots.image_or_error(plots.grid, np.concatenate(fetch(parts)), columns=count)
        for name, parts in rows.items()
        if parts
    }
    return Evaluation(images=sheets)


def sample_quality(task: ImageDenoiser, context: Context) -> Evaluation:
    """Return metrics that compare samples with images, in network features and in pixels."""
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
        if result.nearest_training_images is not None:
            images["nearest_training_images"] = result.nearest_training_images
    about = {"reference": f"{context.split} split", "features": features}
    return Evaluation(metrics, images, about)


SAMPLE_EVALUATIONS = (sample_sheet, trajectories, edits, sample_quality)
