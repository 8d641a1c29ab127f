"""How a trained denoiser draws: samplers, guidance and requests, whatever its task."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ddpm_jax import task
from ddpm_jax.diffusion import guidance, samplers
from ddpm_jax.diffusion.grids import Spacing, grid, grid_from
from ddpm_jax.diffusion.prediction import (
    Denoiser,
    Prediction,
    PredictionType,
    clip_x0,
    inpaint,
    threshold_x0,
)
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.diffusion.schedules import NOISE, Schedule
from ddpm_jax.errors import UserError, nearest
from ddpm_jax.fields import PATH, AtLeast, AtMost, FieldError, SampleSteps, section
from ddpm_jax.parallel.sharding import Parallel, fetch, placed
from ddpm_jax.progress import tell_once
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.task import Request, refuse

FIRST_NOISE = 2**31 - 1  # the number of x_T's draw; the steps' are 0, 1, 2, ...
AT_ONCE = 100  # images in one call of a sampler, and on a sheet of samples
NOTHING_LEFT = -15.0  # logsnr below which an error of eps is 1,800 times one of x0
SHOWN = 10  # images whose trajectories are kept

Thresholding = Literal["clip", "dynamic", "none"]
THRESHOLDINGS = {"clip": clip_x0, "dynamic": threshold_x0, "none": lambda denoise: denoise}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are sampled, unless a request says otherwise.

    Attributes:
      sampler: Name of a sampler (`diffusion.samplers.SAMPLERS`), with its argument: ddim:0.5.
      steps: Steps of the sampler.
      spacing: Where the steps lie (`diffusion.grids.grid`).
      guidance: Scale of guidance; 1: none, or 0 where a classifier guides.
      guidance_interval: LOW,HIGH: logSNR between which guidance acts; none: everywhere.
      guidance_rescale: Share of the standard deviation of x0 that is set back to that of the
        conditional prediction without guidance.
      x0_thresholding: What keeps x0 within the range of images.
      guidance_model: labels: classifier-free guidance. A run's directory: that of a classifier of
        noisy images, or of a weaker diffusion model (autoguidance).
    """

    sampler: str = "ancestral"
    steps: SampleSteps = 250
    spacing: Spacing = "trailing"
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: Annotated[float, AtLeast(0.0), AtMost(1.0)] = 0.0
    x0_thresholding: Thresholding = "clip"
    guidance_model: Annotated[str, PATH] = "labels"

    def about(self) -> dict[str, Any]:
        """Return every field but the guidance model, for the record."""
        return {name: v for name, v in dataclasses.asdict(self).items() if name != "guidance_model"}


class Drawing(NamedTuple):
    """What draws with a task's parameters.

    many(params, seed, count, spread) -> (images, labels or None, Trace of the first), the classes
        in turn, the images spread over the devices
    sample(params, fixed, keys, request, spread=None) -> images, as a `Task`'s
    edit(params, keys, labels, t, images, known, mask, *, spread=None) -> images: noised to time t
        and drawn again, those pixels kept to `known` where `mask` is 1 (in [-1, 1]; [B, H, W, C]
        each); at t = 1 drawing starts from noise alone where `mask` is 0, whatever `images` are
        there
    labels(keys, request) -> the classes of the images that `sample` makes; None: they have none
    told(params, keys, told, how, spread) -> images of whatever else a network is told
    requested(request) -> how the request has it drawn
    about() -> how `many` draws, for the record
    denoiser(params, labels, request) -> the denoiser that sampling walks with, as a `Task`'s
    guide: how this denoiser guides a better one (autoguidance, Karras et al. 2024)
    """

    many: Callable[..., tuple[np.ndarray, np.ndarray | None, samplers.Trace]]
    sample: Callable[..., Any]
    labels: Callable[..., Any]
    edit: Callable[..., Float[Array, "batch h w c"]]
    told: Callable[..., Float[Array, "batch h w c"]]
    requested: Callable[[Request], Sampling]
    about: Callable[[], dict[str, Any]]
    guide: task.Guide
    denoiser: Callable[..., Denoiser]


def drawing(
    predict: Callable[..., Prediction],
    schedule_of: Callable[[Any], Schedule],
    shape: tuple[int, int, int],
    classes: int,
    sampling: Sampling,
    *,
    steps: int | None = None,
    variance: bool = False,
    guide: Callable[[], task.Guide | None] = lambda: None,
    nothing: Callable[[Any], Any] | None = None,
    untrained: str = "",
) -> Drawing:
    """Drawing with `predict(params, xt, logsnrs [B], labels) -> Prediction`.

    Args:
      nothing: where `labels` are no classes but a tree of what else a network is told: that tree
        -> what an unconditional network is told.
      schedule_of: the parameters' schedule (which they may hold).
      steps: of its table, if it has one.
      variance: whether the network has learned one.
      untrained: the field, with its value, by which the network was never trained without its
        labels or captions, so that they cannot guide it; "": it was.
      guide: loads what guides; None: the labels do (classifier-free guidance).  Its parameters
        are an argument of what is compiled.

    Raises:
      FieldError: `sampling` does not fit this network.
    """
    with section("sampling"):
        check_sampling(sampling, steps, variance)
    conditional = bool(classes) or nothing is not None
    if conditional and untrained and sampling.guidance_model == "labels":
        check_guidance_is_trained(untrained, sampling.guidance)

    def first_noise(keys):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, FIRST_NOISE), shape))(
            keys
        )

    def told(params, keys, labels, how: Sampling, spread: Parallel, trace: int = 0):
        """One compiled sampler for all scales of guidance, one without, of half the work."""
        run = spread.compile(walk, static_argnums=(0, 1))
        way = dataclasses.replace(how, guidance=1.0)
        return run(way, trace, params, guides_params(), scale_of(how), keys, labels)

    def walk(how: Sampling, trace: int, params, others, scale, keys, labels):
        one = samplers.named(how.sampler, how.steps)
        logsnrs = grid(schedule_of(params), how.steps, how.spacing)
        xT = first_noise(keys)
        denoise = THRESHOLDINGS[how.x0_thresholding](denoiser(params, others, labels, how, scale))
        return samplers.sample(one, denoise, logsnrs, keys, xT, trace)

    def edit(params, others, keys, labels, t, images, known, mask):
        schedule = schedule_of(params)
        start = schedule.logsnr(jnp.maximum(t, 1 / steps if steps else 0.0))  # step 1 at least
        noise = first_noise(keys)
        # At t = 1 x_t would still contain a little of the image, since logsnr is finite there.
        hidden = jnp.where(mask > 0, known, images)
        xt = jax.vmap(q_sample, (0, 0, None))(hidden, noise, start)
        xt = jnp.where((mask == 0) & (t >= 1), noise, xt)
        logsnrs = grid(schedule, sampling.steps, sampling.spacing)
        logsnrs, first = grid_from(logsnrs, jnp.asarray(start, logsnrs.dtype))
        guided = denoiser(params, others, labels, sampling, scale_of(sampling))
        denoise = inpaint(THRESHOLDINGS[sampling.x0_thresholding](guided), known, mask)
        one = samplers.named(sampling.sampler, sampling.steps)
        return samplers.sample(one, denoise, logsnrs, keys, xt, first=first)

    def guides_params():
        other = guide()
        return other.params if other else None

    def choices() -> int:
        """Classes that can be asked for: the network's, or those that its guide knows."""
        other = guide()
        return classes or (other.classes if other else 0)

    def scale_of(how: Sampling) -> float | None:
        """Of guidance; None: there is none."""
        other = guide()
        return None if how.guidance == (other.nothing if other else 1.0) else how.guidance

    def denoiser(params, others, labels, how: Sampling, scale: float | Array | None) -> Denoiser:
        """All images at one logsnr; guided by the labels on a doubled batch, or by another.

        `scale` stands in the place of `how`'s, as `scale_of` gives it.
        """
        other = guide()

        def plain(xt, logsnr):
            return predict(params, xt, jnp.full(len(xt), logsnr), labels)

        def by_labels(xt, logsnr):
            size = len(xt)
            none = nothing(labels) if nothing else jnp.full_like(labels, classes)
            both = predict(
                params,
                jnp.concatenate([xt, xt]),
                jnp.full(2 * size, logsnr),
                jax.tree.map(lambda a, b: jnp.concatenate([a, b]), labels, none),
            )
            conditional, unconditional = (
                jax.tree.map(lambda a, s=s: a[s], both) for s in (slice(size), slice(size, None))
            )
            return conditional, guidance.combine(conditional, unconditional, scale)

        def by_other(xt, logsnr):
            conditional = plain(xt, logsnr)
            pulled = other.guided(others, lambda *_: conditional, labels, scale)
            return conditional, pulled(xt, logsnr)

        def guided(xt, logsnr):
            conditional, found = by_other(xt, logsnr) if other else by_labels(xt, logsnr)
            if how.guidance_rescale:
                found = guidance.rescaled(found, conditional, xt, logsnr, how.guidance_rescale)
            return found

        if scale is None or (labels is None and not other):
            return plain
        if how.guidance_interval is None:
            return guided
        return guidance.limited(guided, plain, *how.guidance_interval)

    def many(params, seed: int, count: int, spread: Parallel):
        images, first, classes = [], None, choices()
        size = spread.round_up(AT_ONCE)
        for start in range(0, count, size):  # one shape, compiled once
            spread.breathe()
            index = spread.indices(start, size)
            keys = example_keys(purpose_key(seed, SAMPLE), 0, index)
            labels = index % classes if classes else None
            x, trace = told(params, keys, labels, sampling, spread, SHOWN)
            images.append(fetch(x))
            first = first or fetch(trace)
        meant = np.arange(count) % classes if classes else None
        return np.concatenate(images)[:count], meant, first

    def sample(
        params,
        fixed,
        keys: Key[Array, "batch"],
        request: Request,
        spread: Parallel | None = None,
    ) -> Float[Array, "..."]:
        del fixed
        how = requested(request)
        return told(params, keys, labels_of(keys, request), how, spread or placed(params))

    def labels_of(keys: Key[Array, "batch"], request: Request):
        classes = choices()
        if classes and request.label is not None:
            return jnp.full(len(keys), request.label)
        if not classes:
            return None

        def one(key):  # each image a class of its own draw
            return jax.random.randint(jax.random.fold_in(key, FIRST_NOISE - 1), (), 0, classes)

        return jax.vmap(one)(keys)

    def requested(request: Request) -> Sampling:
        if nothing is None:
            refuse(request, "prompt", "negative_prompt")
        how = sampling
        if request.sampler is not None:
            how = dataclasses.replace(how, sampler=request.sampler)
        if request.steps is not None:
            how = dataclasses.replace(how, steps=request.steps)
        try:
            check_sampling(how, steps, variance)
        except FieldError as error:
            raise UserError(f"--{error}") from None
        for flag, can in (
            ("guidance", choices() or guide() or nothing),
            ("label", choices()),
        ):
            if getattr(request, flag) is not None and not can:
                raise UserError(
                    f"--{flag} needs a class-conditional run, or a classifier as "
                    "--config.task.sampling.guidance_model=DIR; this one has no classes"
                )
        if request.label is not None and request.label >= choices():
            raise UserError(f"--label={request.label}: there are {choices()} classes, from 0 on")
        if request.guidance is not None:
            how = dataclasses.replace(how, guidance=request.guidance)
            if conditional and untrained and guide() is None:
                try:
                    check_guidance_is_trained(untrained, how.guidance)
                except FieldError as error:
                    raise UserError(f"--guidance={how.guidance:g}: {error}") from None
        return how

    def about():
        other = guide()
        by = other.about if other else "labels"
        return {**sampling.about(), "guide": by}

    def as_worse(params, denoise, labels, scale):
        def worse(xt, logsnr):
            return predict(params, xt, jnp.full(len(xt), logsnr), labels)

        return guidance.classifier_free(denoise, worse, scale)

    def edit_with_guide(params, *rest, spread: Parallel | None = None):
        return (spread or placed(params)).compile(edit)(params, guides_params(), *rest)

    def denoiser_of(params, labels, request: Request) -> Denoiser:
        how = requested(request)
        guided = denoiser(params, guides_params(), labels, how, scale_of(how))
        return THRESHOLDINGS[how.x0_thresholding](guided)

    own = task.Guide("diffusion", as_worse, shape, classes)
    return Drawing(
        many, sample, labels_of, edit_with_guide, told, requested, about, own, denoiser_of
    )


def check_guidance_is_trained(untrained: str, scale: float) -> None:
    """Check that a scale of classifier-free guidance is neutral where it was not trained.

    Raises:
      FieldError: it is not; the message begins with `untrained`.
    """
    if scale != 1.0:
        raise FieldError(
            f"{untrained}: the network is never trained without labels or captions, so that they "
            "cannot guide it; give sampling.guidance=1, or a dropout above 0",
            "sampling.guidance",
        )


def check_start(prediction: PredictionType, schedule: Schedule, how: Sampling) -> None:
    """Check that the network's prediction means something where sampling starts.

    x0 = (x_t - sigma eps) / alpha is the network's error divided by next to nothing where there is
    nearly no signal (Lin et al. 2024, sec. 3.2); thresholding of x0 keeps that from mattering. A
    schedule that does not end in noise, from which sampling starts, is logged.

    Raises:
      FieldError: sampling starts at so much noise that eps determines nothing of x0.
    """
    end = float(schedule.logsnr(jnp.asarray(1.0)))
    if end > NOISE:
        tell_once(
            f"the noise schedule ends at logsnr {end:.1f}, which is above {NOISE:g} and not pure "
            "noise, but sampling starts with pure noise: images will be worse than the network's"
        )
    if prediction != "eps" or how.x0_thresholding != "none":
        return
    start = float(grid(schedule, how.steps, how.spacing)[0])
    if start < NOTHING_LEFT:
        raise FieldError(
            f"prediction=eps: sampling starts at logsnr {start:.0f}, where eps determines nothing "
            "of the image; give prediction=v, schedule=linear_betas or sampling.spacing=leading",
            "schedule",
            "sampling.spacing",
            "sampling.x0_thresholding",
        )


def check_sampling(how: Sampling, steps: int | None, learned_variance: bool) -> None:
    """Check that there is such a sampler, for such a network and schedule.

    Args:
      how: sampler, steps and the interval of guidance.
      steps: of the schedule's table; None: it is continuous.
      learned_variance: whether the network predicts a variance.

    Raises:
      FieldError: there is not.
    """
    name = how.sampler
    base = name.partition(":")[0]
    if base not in samplers.SAMPLERS:
        raise FieldError(f'sampler: there is no "{base}"{nearest(base, samplers.SAMPLERS)}')
    try:
        samplers.named(name, how.steps)
    except ValueError as error:
        raise FieldError(f"sampler={name}: {error}") from None
    if base == "ancestral_learned" and not learned_variance:
        raise FieldError(
            f"sampler={name}: this run's network has not learned a variance; use ancestral or "
            "ancestral_beta"
        )
    if how.guidance_interval is not None and how.guidance_interval[0] > how.guidance_interval[1]:
        low, high = how.guidance_interval
        raise FieldError(
            f"guidance_interval={low:g},{high:g}: must be LOW,HIGH with LOW <= HIGH, in logSNR"
        )
    if steps is not None and how.steps > steps:
        raise FieldError(f"steps={how.steps}: this run's schedule has {steps} steps", "sampler")
