"""How a trained denoiser draws: samplers, guidance and requests, whatever its task."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ddpm_jax import task
from ddpm_jax.diffusion import guidance
from ddpm_jax.diffusion import samplers as sampler
from ddpm_jax.diffusion.prediction import Denoiser, Kind, Prediction, clip_x0, inpaint, threshold_x0
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.diffusion.schedules import NOISE, Schedule, Spacing, grid, grid_from
from ddpm_jax.errors import UserError, nearest
from ddpm_jax.parallel.sharding import Parallel, fetch, placed
from ddpm_jax.progress import tell_once
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.task import Request, refuse

FIRST_NOISE = 2**31 - 1  # the number of x_T's draw; the steps' are 0, 1, 2, ...
AT_ONCE = 100  # images in one call of a sampler, and on a sheet of samples
NOTHING_LEFT = -15.0  # logsnr below which an error of eps is 1,800 times one of x0
SHOWN = 10  # images whose trajectories are kept

Limit = Literal["clip", "dynamic", "none"]
LIMITS = {"clip": clip_x0, "dynamic": threshold_x0, "none": lambda denoise: denoise}


class Sampling(NamedTuple):
    """How images are drawn, unless the request says otherwise.

    sampler: a name that `samplers.named` knows; steps: of the grid; spacing: of it; guidance: its
    scale, 1: none, or 0 where a classifier guides; interval: the logsnr between which it acts;
    rescale: the share of x0's deviation that is set back to the unguided conditional one's;
    limit: what keeps x0 within the range of images.
    """

    sampler: str = "ancestral"
    steps: int = 250
    spacing: Spacing = "trailing"
    guidance: float = 1.0
    interval: tuple[float, float] = (-100.0, 100.0)
    rescale: float = 0.0
    limit: Limit = "clip"


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
    guide: how this denoiser guides a better one (autoguidance, Karras et al. 2024)
    """

    many: Callable[..., tuple[np.ndarray, np.ndarray | None, sampler.Trace]]
    sample: Callable[..., Any]
    labels: Callable[..., Any]
    edit: Callable[..., Float[Array, "batch h w c"]]
    told: Callable[..., Float[Array, "batch h w c"]]
    requested: Callable[[Request], Sampling]
    about: Callable[[], dict[str, Any]]
    guide: task.Guide


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
) -> Drawing:
    """Drawing with `predict(params, xt, logsnrs [B], labels) -> Prediction`.

    Args:
      nothing: where `labels` are no classes but a tree of what else a network is told: that tree
        -> what an unconditional network is told.
      schedule_of: the parameters' schedule (which they may hold).
      steps: of its table, if it has one.
      variance: whether the network has learned one.
      guide: loads what guides; None: the labels do (classifier-free guidance).  Its parameters
        are an argument of what is compiled.

    Raises:
      UserError: `sampling` makes no sense for this network.
    """
    check_sampling(sampling, "--config.sampler", "--config.sample_steps", steps, variance)

    def first_noise(keys):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, FIRST_NOISE), shape))(
            keys
        )

    def told(params, keys, labels, how: Sampling, spread: Parallel, trace: int = 0):
        """One compiled sampler for all scales of guidance, one without, of half the work."""
        run = spread.compile(walk, static_argnums=(0, 1))
        way = how._replace(guidance=1.0)
        return run(way, trace, params, guides_params(), scale_of(how), keys, labels)

    def walk(how: Sampling, trace: int, params, others, scale, keys, labels):
        one = sampler.named(how.sampler, how.steps)
        logsnrs = grid(schedule_of(params), how.steps, how.spacing)
        xT = first_noise(keys)
        denoise = LIMITS[how.limit](denoiser(params, others, labels, how, scale))
        return sampler.sample(one, denoise, logsnrs, keys, xT, trace)

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
        denoise = inpaint(LIMITS[sampling.limit](guided), known, mask)
        one = sampler.named(sampling.sampler, sampling.steps)
        return sampler.sample(one, denoise, logsnrs, keys, xt, first=first)

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
            if how.rescale:
                found = guidance.rescaled(found, conditional, xt, logsnr, how.rescale)
            return found

        if scale is None or (labels is None and not other):
            return plain
        if how.interval == Sampling().interval:
            return guided
        return guidance.limited(guided, plain, *how.interval)

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
            how = how._replace(sampler=request.sampler)
        if request.steps is not None:
            how = how._replace(steps=request.steps)
        check_sampling(how, "--sampler", "--steps", steps, variance)
        for flag, can in (
            ("guidance", choices() or guide() or nothing),
            ("label", choices()),
        ):
            if getattr(request, flag) is not None and not can:
                raise UserError(
                    f"--{flag} needs a class-conditional run, or --config.guide=DIR of a "
                    "classifier; this one has no classes"
                )
        if request.label is not None and request.label >= choices():
            raise UserError(f"--label={request.label}: there are {choices()} classes, from 0 on")
        if request.guidance is not None:
            how = how._replace(guidance=request.guidance)
        return how

    def about():
        other = guide()
        by = other.about if other else "labels"
        return {**sampling._asdict(), "guide": by}

    def as_worse(params, denoise, labels, scale):
        def worse(xt, logsnr):
            return predict(params, xt, jnp.full(len(xt), logsnr), labels)

        return guidance.classifier_free(denoise, worse, scale)

    def edit_with_guide(params, *rest, spread: Parallel | None = None):
        return (spread or placed(params)).compile(edit)(params, guides_params(), *rest)

    own = task.Guide("diffusion", as_worse, shape, classes)
    return Drawing(many, sample, labels_of, edit_with_guide, told, requested, about, own)


def check_start(kind: Kind, schedule: Schedule, how: Sampling) -> None:
    """Raises UserError where drawing starts at so much noise that eps says nothing of x0.

    A schedule that does not end in noise, from which drawing starts, is logged.

    x0 = (x_t - sigma eps) / alpha is then the network's error divided by next to nothing (Lin et
    al. 2024, sec. 3.2); what keeps x0 within a range keeps that from mattering.
    """
    end = float(schedule.logsnr(jnp.asarray(1.0)))
    if end > NOISE:
        tell_once(
            f"the noise schedule ends at logsnr {end:.1f}, which is above {NOISE:g} and not pure "
            "noise, but drawing starts with pure noise: images will be worse than the network's"
        )
    if kind != "eps" or how.limit != "none":
        return
    start = float(grid(schedule, how.steps, how.spacing)[0])
    if start < NOTHING_LEFT:
        raise UserError(
            f"--config.prediction=eps: this schedule starts at logsnr {start:.0f}, where eps says "
            "nothing of the image; give --config.prediction=v, --config.noise=linear_betas or "
            "--config.spacing=leading"
        )


def check_sampling(
    how: Sampling, sampler_flag: str, steps_flag: str, steps: int | None, variance: bool
) -> None:
    """Raises UserError unless there is such a sampler, for such a network and schedule."""
    name = how.sampler
    base = name.partition(":")[0]
    if base not in sampler.SAMPLERS:
        raise UserError(f'{sampler_flag}: there is no "{base}"{nearest(base, sampler.SAMPLERS)}')
    try:
        sampler.named(name, how.steps)
    except ValueError as error:
        raise UserError(f"{sampler_flag}={name}: {error}") from None
    if base == "ancestral_learned" and not variance:
        raise UserError(
            f"{sampler_flag}={name}: this run's network has not learned a variance; use ancestral "
            "or ancestral_beta"
        )
    if how.interval[0] > how.interval[1]:
        low, high = how.interval
        raise UserError(f"--config.guidance_interval={low:g},{high:g}: must rise; it is of logsnr")
    if steps is not None and how.steps > steps:
        raise UserError(f"{steps_flag}={how.steps}: this run's schedule has {steps} steps")
