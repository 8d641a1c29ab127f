"""The diffusion task: train epsilon_theta, sample with it, bound the likelihood."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ddpm_jax import elbo, guidance, loss, report, sampler
from ddpm_jax.classifier import Judge
from ddpm_jax.data.loader import Batch, Data
from ddpm_jax.errors import UserError, nearest
from ddpm_jax.evaluate import average, per_example
from ddpm_jax.keys import SAMPLE, example_keys, purpose_key
from ddpm_jax.metrics.quality import quality
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.unet import UNet
from ddpm_jax.prediction import Denoiser, Kind, Prediction, Variance, clip_x0, read
from ddpm_jax.process import q_posterior, q_sample
from ddpm_jax.schedule import Schedule, Spacing, grid
from ddpm_jax.tasks import Evaluation, Request, Task, refuse, to_images

FIRST_NOISE = 2**31 - 1  # the number of x_T's draw; the steps' are 0, 1, 2, ...
NOISE_LEVELS = 10  # of the table of errors
DRAWN_AT_ONCE = 100  # images in one call of a sampler, and on a sheet of samples


class Sampling(NamedTuple):
    """How images are drawn, unless the request says otherwise.

    sampler: a name in `sampler.SAMPLERS`; steps: of the grid; spacing: of it; guidance: the
    scale of classifier-free guidance, 1: none.
    """

    sampler: str = "ancestral"
    steps: int = 250
    spacing: Spacing = "trailing"
    guidance: float = 1.0


def step_time(schedule: Schedule, t: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Uniform t in [0, 1) -> a uniform step i / T, i = 1 ... T, of a table; else t itself."""
    if schedule.steps is None:
        return t
    return (jnp.floor(t * schedule.steps) + 1) / schedule.steps


def diffusion_task(
    net: UNet | DiT,
    schedule: Schedule,
    shape: tuple[int, int, int],
    levels: int,
    *,
    kind: Kind = "eps",
    weight: Callable[[Array], Array] = loss.one,
    label_dropout: float = 0.1,
    flip: bool = False,
    variance: Variance = "beta",
    sampling: Sampling = Sampling(),
    batch_size: int,
    eval_batch: int = 256,
    eval_times: int = 8,
    judge: Callable[[], Judge] | None = None,
    judged: int = 1000,
) -> Task:
    """Denoising diffusion of images (Ho et al. 2020, alg. 1-2).

    Args:
      net: network; its `classes`, if any, make it class-conditional.
      schedule: logsnr of t.
      shape, levels: of the images.
      kind: what the network predicts.
      weight: of the squared error of eps, by logsnr.
      label_dropout: share of labels replaced by "no class" in training.
      flip: mirror half of the training images.
      variance: of p(x_s | x_t) in the bound.
      sampling: how images are drawn by default.
      batch_size: of training, over which times are spread evenly.
      eval_times: noise levels of each test image that the test figures average over.
      judge: gives the classifier that judges drawn images, in a full evaluation.
      judged: how many images are drawn for it, the classes in turn.

    Raises:
      UserError: the network cannot be built for images of this shape.
    """
    net.check(shape)
    check_sampler(sampling.sampler, "--config.sampler")
    classes = net.classes

    def init(key, batch: Batch):
        zeros = jnp.zeros((1, *shape))
        labels = jnp.zeros(1, jnp.int32) if classes else None
        return net.init(key, zeros, jnp.zeros(1), labels), {}

    def predict(params, xt, logsnr, labels, keys=None) -> Prediction:
        """A batch, each image with its own logsnr."""
        out: Any = net.apply(params, xt, schedule.time(logsnr), labels, keys)
        return jax.vmap(functools.partial(read, kind))(out, xt, logsnr)

    def noisy(batch, keys, t):
        """x0, eps, x_t and logsnr of each example."""
        x0 = to_images(batch.images, levels)
        logsnr = schedule.logsnr(step_time(schedule, t))
        eps = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        return x0, eps, jax.vmap(q_sample)(x0, eps, logsnr), logsnr

    def loss_of(params, fixed, batch, keys, *, train, gather):
        del fixed, gather
        split = jax.vmap(lambda key: jax.random.split(key, 5))(keys)
        t_keys, eps_keys, label_keys, flip_keys, drop_keys = (split[:, i] for i in range(5))
        if flip and train:
            mirrored = jax.vmap(jax.random.bernoulli)(flip_keys)[:, None, None, None]
            images = jnp.where(mirrored, batch.images[:, :, ::-1], batch.images)
            batch = batch._replace(images=images)
        t = loss.stratified_times(t_keys, batch.index % batch_size, batch_size)
        _, eps, xt, logsnr = noisy(batch, eps_keys, t)
        labels = None
        if classes:
            dropped = jax.vmap(lambda key: jax.random.bernoulli(key, label_dropout))(label_keys)
            labels = jnp.where(dropped, classes, batch.labels)
        found = predict(params, xt, logsnr, labels, drop_keys if train else None)
        mse = jax.vmap(loss.simple)(found, eps)
        return jax.vmap(weight)(logsnr) * mse, {"mse": mse}, {}

    # Evaluation: the error at evenly spread times, and the bound.

    def time_of(place, keys):
        """`eval_times` times for each image, together evenly spread over all images."""
        draws = jax.vmap(lambda key: jax.random.uniform(key, (eval_times,)))(keys)
        offset = (place * 0.6180339887) % 1  # a low-discrepancy start of each image's comb
        return (jnp.arange(eval_times) + (offset[:, None] + draws / 997) % 1) / eval_times

    @jax.jit
    def test_terms(params, batch, keys):
        labels = batch.labels if classes else None
        times = time_of(batch.index, keys)

        def at(number):
            t = times[:, number]
            eps_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
            x0, eps, xt, logsnr = noisy(batch, eps_keys, t)
            found = predict(params, xt, logsnr, labels)
            terms = {"mse": jax.vmap(loss.simple)(found, eps), "t": t}
            if schedule.steps:
                found = clipped(found, xt, logsnr)
                before = schedule.logsnr(step_time(schedule, t) - 1 / schedule.steps)
                kl = jax.vmap(functools.partial(elbo.step_kl, variance=variance))
                inner = kl(found, x0, xt, logsnr, before)
                # The first step is the decoder's: its KL is not part of the bound.
                terms["kl"] = jnp.where(jnp.isposinf(before), 0.0, inner) * schedule.steps
            return terms

        found = jax.lax.map(at, jnp.arange(eval_times))
        found = {name: jnp.moveaxis(values, 0, 1) for name, values in found.items()}
        if schedule.steps:
            x0 = to_images(batch.images, levels)
            found["prior"] = jax.vmap(lambda x0: elbo.prior_kl(x0, schedule.logsnr(1.0)))(x0)
            found["decoder"] = decoder(params, batch, keys, labels)
        return found

    def clipped(found, xt, logsnr):
        return jax.vmap(lambda p, x, s: clip_x0(lambda *_: p)(x, s))(found, xt, logsnr)

    def decoder(params, batch, keys, labels):
        """L_0, of the first step, with the second step's posterior deviation at least."""
        first, second = (schedule.logsnr(jnp.asarray(i / schedule.steps)) for i in (1, 2))
        zero = jnp.zeros(())
        std = jnp.sqrt(q_posterior(zero, zero, second, first)[1])
        size = len(batch.images)
        t = jnp.zeros(size)
        x0, _, xt, logsnr = noisy(batch, keys, t)
        found = clipped(predict(params, xt, logsnr, labels), xt, logsnr)
        nll = functools.partial(elbo.decoder_nll, std=std, levels=levels)
        return jax.vmap(nll)(found, x0)

    def evaluate(params, fixed, data: Data, *, seed, full, shard):
        found = per_example(
            lambda batch, keys: test_terms(params, batch, keys), data.test, eval_batch, seed, shard
        )
        mse = average(found["mse"].mean(1))
        metrics = {"test/loss": mse.mean, "test/loss_error": mse.error}
        dims = int(np.prod(shape))
        if schedule.steps:
            bound = average(found["kl"].mean(1) + found["prior"] + found["decoder"])
            scale = 1 / (dims * np.log(2))
            metrics["test/bits_per_dim"] = bound.mean * scale
            metrics["test/bits_per_dim_error"] = bound.error * scale
            metrics["test/bits_per_dim_decoder"] = average(found["decoder"]).mean * scale
            metrics["test/bits_per_dim_prior"] = average(found["prior"]).mean * scale
        if full:
            rows = np.minimum((found["t"] * NOISE_LEVELS).astype(int), NOISE_LEVELS - 1)
            for row in range(NOISE_LEVELS):
                name = f"test/mse_t_{row / NOISE_LEVELS:.1f}"
                metrics[name] = float(found["mse"][rows == row].mean())
        count = max(judged, DRAWN_AT_ONCE) if full and judge else DRAWN_AT_ONCE
        images, labels = draw_many(params, seed, count)
        pictures = {"samples": report.grid(images[:DRAWN_AT_ONCE], columns=10)}
        about = {**sampling._asdict(), "parameters": "averaged (EMA)", "reference": "test split"}
        if full and judge:
            meant = None if labels is None else labels[:judged]
            judgement = quality(judge(), images[:judged], meant, data)
            metrics |= judgement.metrics
            pictures["neighbours"] = judgement.neighbours
        return Evaluation(metrics, pictures, about)

    def draw_many(params, seed, count):
        """Images 0 ... count - 1, their labels in turn; a sheet of 100 has a class a column."""
        images = []
        for start in range(0, count, DRAWN_AT_ONCE):  # one shape, compiled once
            index = jnp.arange(start, start + DRAWN_AT_ONCE)
            keys = example_keys(purpose_key(seed, SAMPLE), 0, index)
            images.append(
                np.asarray(draw(params, keys, index % classes if classes else None, sampling))
            )
        return np.concatenate(images)[:count], np.arange(count) % classes if classes else None

    # Sampling.

    @functools.lru_cache
    def drawer(how: Sampling):
        """The compiled sampler of one way to draw; scale 1 needs no second half."""
        logsnrs = grid(schedule, how.steps, how.spacing)
        one = sampler.SAMPLERS[how.sampler](how.steps)

        @jax.jit
        def run(params, keys, labels):
            xT = jax.vmap(
                lambda key: jax.random.normal(jax.random.fold_in(key, FIRST_NOISE), shape)
            )(keys)
            denoise = clip_x0(denoiser(params, labels, how.guidance))
            return sampler.sample(one, denoise, logsnrs, keys, xT)

        return run

    def denoiser(params, labels, scale: float) -> Denoiser:
        """All images at one logsnr; guided, on a doubled batch."""

        def denoise(xt, logsnr):
            size = len(xt)
            if scale == 1.0 or labels is None:
                return predict(params, xt, jnp.full(size, logsnr), labels)
            none = jnp.full_like(labels, classes)
            both = predict(
                params,
                jnp.concatenate([xt, xt]),
                jnp.full(2 * size, logsnr),
                jnp.concatenate([labels, none]),
            )
            halves = (
                jax.tree.map(lambda a, s=s: a[s], both) for s in (slice(size), slice(size, None))
            )
            return guidance.combine(*halves, scale)

        return denoise

    def draw(params, keys: Key[Array, "batch"], labels: Array | None, how: Sampling) -> Array:
        return drawer(how)(params, keys, labels)

    def sample(params, fixed, keys, request: Request):
        del fixed
        how = requested(request)
        labels = None
        if classes and request.label is not None:
            labels = jnp.full(len(keys), request.label)
        elif classes:  # each image a class of its own draw
            labels = jax.vmap(
                lambda key: jax.random.randint(
                    jax.random.fold_in(key, FIRST_NOISE - 1), (), 0, classes
                )
            )(keys)
        return draw(params, keys, labels, how)

    def requested(request: Request) -> Sampling:
        refuse(request, "prompt")
        how = sampling
        if request.sampler is not None:
            check_sampler(request.sampler, "--sampler")
            how = how._replace(sampler=request.sampler)
        if request.steps is not None:
            if schedule.steps is not None and request.steps > schedule.steps:
                raise UserError(
                    f"--steps={request.steps}: this run's schedule has {schedule.steps} steps"
                )
            how = how._replace(steps=request.steps)
        if not classes and (request.guidance is not None or request.label is not None):
            flag = "guidance" if request.guidance is not None else "label"
            raise UserError(f"--{flag} needs a class-conditional run; this one has no classes")
        if request.label is not None and request.label >= classes:
            raise UserError(f"--label={request.label}: there are {classes} classes, from 0 on")
        if request.guidance is not None:
            how = how._replace(guidance=request.guidance)
        return how

    return Task(init, loss_of, lambda fixed, statistics: fixed, evaluate, sample)


def check_sampler(name: str, flag: str) -> None:
    """Raises UserError unless there is such a sampler, for a network without a variance."""
    if name not in sampler.SAMPLERS:
        raise UserError(f'{flag}: there is no "{name}"{nearest(name, sampler.SAMPLERS)}')
    if name == "ancestral_learned":
        raise UserError(
            f"{flag}={name}: this run's network has not learned a variance; use ancestral or "
            "ancestral_beta"
        )
