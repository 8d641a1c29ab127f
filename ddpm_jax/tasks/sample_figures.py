"""Pictures of what a trained denoiser draws, and what judges say of it."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ddpm_jax import errors, plots
from ddpm_jax.data.types import Data, Split
from ddpm_jax.diffusion import samplers
from ddpm_jax.fields import MAY_CHANGE, OR_NONE, EvalBatch, EvalTimes, NumSamples, NumSamplesBetween
from ddpm_jax.metrics.features import Judge
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.metrics.quality import quality
from ddpm_jax.parallel.sharding import Parallel, fetch
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.task import Evaluation, Resources
from ddpm_jax.tasks.image_sampler import AT_ONCE, SHOWN, Drawing

EDIT_TIMES = (0.3, 0.5, 0.7)
BLEND_TIME = 0.5


class Judging(NamedTuple):
    """What loads the judges of drawn images, and how many they see: at the end, and before it."""

    judges: tuple[Callable[[], Judge], ...] = ()
    final: int = 1000
    between: int = 0


def trajectories(
    trace: samplers.Trace, images: Float[np.ndarray, "n h w c"]
) -> dict[str, np.ndarray | errors.NonFinite]:
    """A sheet and a movie [F, H, W, C] of x_t above the predicted x0.

    Both end at the first `images`.
    """
    xt, x0 = (np.concatenate([a, images[None, : a.shape[1]]]) for a in trace)
    moments = np.unique(np.linspace(0, len(xt) - 1, SHOWN).round().astype(int))
    rows = [a[moments, image] for image in range(4) for a in (xt, x0)]
    sheet = plots.attempt(plots.grid, np.concatenate(rows), columns=len(moments))
    frames = np.unique(np.linspace(0, len(xt) - 1, 50).round().astype(int))

    def movie():
        both = (np.concatenate([xt[f], x0[f]]) for f in frames)
        return np.stack([plots.grid(images, columns=SHOWN) for images in both])

    return {"trajectories": sheet, "trajectories_movie": plots.attempt(movie)}


def edits(
    draw: Drawing,
    params: Any,
    seed: int,
    data: Data,
    held_out: Split,
    conditional: bool,
    spread: Parallel,
) -> dict[str, np.ndarray | errors.NonFinite]:
    """What a denoiser makes of held-out images, by rows.

    Nothing that an edit should produce is among its inputs: a conditional network gets the label
    "no class", not the image's own, and of an image whose lower half is drawn only the upper half.

    inpainting: images; their upper halves alone; the rest drawn from noise alone, twice.
    image_to_image: images; noised to each of `EDIT_TIMES` and drawn again.
    interpolation: from one image to the next; both noised alike to `BLEND_TIME`, mixed, and
        drawn again (Ho et al. 2020, fig. 8).
    """
    images = to_images(held_out.first(SHOWN).images, data.levels)
    count = len(images)
    none = jnp.full(count, len(data.classes), jnp.int32) if conditional else None

    def keys(number):
        index = jnp.arange(number * count, (number + 1) * count)
        return example_keys(purpose_key(seed, SAMPLE), 1, index)

    free, upper = np.zeros_like(images), np.zeros_like(images)
    upper[:, : images.shape[1] // 2] = 1.0
    seen = images * upper
    rows = {
        "inpainting": [images, seen]
        + [
            draw.edit(params, keys(n), none, 1.0, seen, seen, upper, spread=spread)
            for n in range(2)
        ],
        "image_to_image": [images]
        + [
            draw.edit(params, keys(2), none, t, images, images, free, spread=spread)
            for t in EDIT_TIMES
        ],
        "interpolation": [],
    }
    share = np.linspace(0, 1, count, dtype=images.dtype)[:, None, None, None]
    for one in range(0, min(8, count - 1), 2):
        mixed = (1 - share) * images[one] + share * images[one + 1]
        same = jnp.broadcast_to(keys(3)[:1], (count,))
        rows["interpolation"].append(
            draw.edit(params, same, none, BLEND_TIME, mixed, mixed, free, spread=spread)
        )
    return {
        name: plots.attempt(plots.grid, np.concatenate(fetch(found)), columns=count)
        for name, found in rows.items()
        if found
    }


def show(
    draw: Drawing,
    params: Any,
    seed: int,
    data: Data,
    split: str,
    full: bool,
    judging: Judging,
    spread: Parallel,
) -> Evaluation:
    """A sheet of samples and what the judges say of more; trajectories in a full evaluation."""
    judged = (judging.final if full else judging.between) if judging.judges else 0
    images, labels, trace = draw.many(params, seed, max(judged, AT_ONCE), spread)
    pictures = {"samples": plots.attempt(plots.grid, images[:AT_ONCE], columns=10)}
    if full:
        pictures |= trajectories(trace, images)
        pictures |= edits(draw, params, seed, data, data.part(split), labels is not None, spread)
    metrics: dict[str, float] = {}
    if not judged:
        return Evaluation(metrics, pictures, draw.about())
    plots.check_finite(images[:judged])  # of which there are no figures
    meant = None if labels is None else labels[:judged]
    features: dict[str, str] = {}
    for number, load in enumerate(judging.judges):
        judge = load()
        found = quality(judge, images[:judged], meant, data, split, pixels=full and number == 0)
        metrics |= found.metrics
        features[judge.name] = judge.about
        if found.neighbours is not None:
            pictures["neighbours"] = found.neighbours
    about = {**draw.about(), "reference": f"{split} split", "features": features}
    return Evaluation(metrics, pictures, about)


QUICK_IMAGES = 1000  # test images that an evaluation before the last looks at


@dataclasses.dataclass(frozen=True)
class SampleEvaluation:
    """How a denoiser and its samples are evaluated.

    Attributes:
      batch_size: Images of one batch of an evaluation.
      times_per_image: Noise levels at which the loss and the bound of each image are averaged.
      num_samples: Samples of the final evaluation, the classes in turn.
      num_samples_between: The same of every evaluation before; 0: none.
      features: Networks in whose features samples are compared with images: the name of a
        classifier's experiment, which is trained once on the same data; a trained classifier's run
        directory; inception, for FID, whose weights the user has. Empty: none.
    """

    batch_size: EvalBatch = 256
    times_per_image: EvalTimes = 8
    num_samples: NumSamples = 1000
    num_samples_between: NumSamplesBetween = 0
    features: Annotated[tuple[str, ...], OR_NONE, MAY_CHANGE] = ()


def judging_of(evaluation: SampleEvaluation, resources: Resources) -> Judging:
    """Return what evaluates samples, and how many."""
    return Judging(resources.features, evaluation.num_samples, evaluation.num_samples_between)
