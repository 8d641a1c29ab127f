"""The diffusion task: train epsilon_theta, sample with it, bound the likelihood."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ddpm_jax import plots
from ddpm_jax.data.types import UNBOUND, Batch, Data, DataInfo
from ddpm_jax.diffusion import elbo
from ddpm_jax.diffusion import losses as loss
from ddpm_jax.diffusion.grids import step_time
from ddpm_jax.diffusion.prediction import Prediction, PredictionType, Variance, clip_x0, read
from ddpm_jax.diffusion.process import q_posterior, q_sample
from ddpm_jax.diffusion.schedules import LinearBetas, NoiseSchedule, Schedule
from ddpm_jax.fields import BOUND, MAY_CHANGE, AtLeast, AtMost, FieldError, NonNegative, section
from ddpm_jax.metrics.averages import averages, figures, ratio_of_sums
from ddpm_jax.metrics.per_example import per_example, spread_times
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.unet import UNet
from ddpm_jax.task import Guide, Needs, Resources, Task, class_labels
from ddpm_jax.tasks.image_sampler import Sampling, check_start, drawing
from ddpm_jax.tasks.sample_figures import QUICK_IMAGES, Judging, SampleEvaluation, judging_of, show

Times = Literal["uniform", "stratified", "importance"]

NOISE_LEVELS = 10  # of the table of errors

RATES = 50  # points at most of the rate-distortion curve


def diffusion_task(
    net: UNet | DiT,
    schedule: Schedule,
    shape: tuple[int, int, int],
    levels: int,
    *,
    kind: PredictionType = "eps",
    weight: Callable[[Array], Array] = loss.one,
    label_dropout: float = 0.1,
    flip: bool = False,
    variance: Variance = "beta",
    bound_scale: float = 1e-3,
    times: Times = "stratified",
    sampling: Sampling = Sampling(),
    batch_size: int,
    eval_batch: int = 256,
    eval_times: int = 8,
    judging: Judging = Judging(),
    guide: Callable[[], Guide | None] = lambda: None,
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
      variance: of p(x_s | x_t) in the bound; "learned": the network has twice the outputs,
        and is trained on L_simple + bound_scale L_vlb (Nichol & Dhariwal 2021).
      times: how training draws t: "uniform", "stratified" or by the loss's "importance".
      sampling: how images are drawn by default.
      batch_size: of training, over which times are spread evenly.
      eval_times: noise levels of each test image that the test figures average over.
      judging: what judges drawn images, the classes in turn.
      guide: loads what guides them; None: the labels do.

    Raises:
      FieldError: the network cannot be built for images of this shape, or its prediction determines
        nothing of them where sampling starts.
    """
    with section("network"):
        net.check(shape)
    classes, steps, learned = net.classes, schedule.steps, variance == "learned"
    if net.outputs != shape[-1] * (2 if learned else 1):
        raise ValueError(f"{net.outputs} outputs for images of {shape} and a {variance} variance")
    if steps is None and (learned or times == "importance"):
        field = "variance=learned" if learned else "times=importance"
        raise FieldError(
            f"{field}: needs a table of betas; give schedule=linear_betas or cosine_betas",
            "schedule",
        )
    step_nats = jax.vmap(
        functools.partial(elbo.step_nats, variance=variance, levels=levels),
        (0, 0, 0, 0, 0, None),
    )

    def least():
        """log of the posterior's variance in the table's second step."""
        first, second = (schedule.logsnr(jnp.asarray(i / steps)) for i in (1, 2))
        return jnp.log(q_posterior(jnp.zeros(()), jnp.zeros(()), second, first)[1])

    def init(key, batch: Batch):
        zeros = jnp.zeros((1, *shape))
        labels = jnp.zeros(1, jnp.int32) if classes else None
        fixed = {"history": loss.empty_history(steps)} if steps and times == "importance" else {}
        return net.init(key, zeros, jnp.zeros(1), labels), fixed

    def predict(params, xt, logsnr, labels, keys=None) -> Prediction:
        """A batch, each image with its own logsnr."""
        out: Any = net.apply(params, xt, schedule.time(logsnr), labels, keys)
        if not learned:
            return jax.vmap(functools.partial(read, kind))(out, xt, logsnr)
        out, between = jnp.split(out, 2, -1)
        found = jax.vmap(functools.partial(read, kind))(out, xt, logsnr)
        return found._replace(variance_fraction=(between + 1) / 2)

    draw = drawing(
        predict,
        lambda params: schedule,
        shape,
        classes,
        sampling,
        steps=steps,
        variance=learned,
        guide=guide,
        untrained="" if label_dropout else "label_dropout=0",
    )
    check_start(kind, schedule, sampling)

    def noisy(batch, keys, t):
        """x0, eps, x_t and logsnr of each example."""
        x0 = to_images(batch.images, levels)
        logsnr = schedule.logsnr(step_time(schedule, t))
        eps = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        return x0, eps, jax.vmap(q_sample)(x0, eps, logsnr), logsnr

    def before(t):
        """logsnr a step of the table earlier: +inf, the clean data, before the first."""
        return schedule.logsnr(step_time(schedule, t) - 1 / steps)

    def objective(found, x0, eps, xt, logsnr, t):
        """The loss of each image and its parts, at one time each, for training and evaluation."""
        mse = jax.vmap(loss.simple)(found, eps)
        losses, parts = jax.vmap(weight)(logsnr) * mse, {"mse": mse}
        if learned:
            bound = functools.partial(loss.variance_bound, steps=steps, levels=levels)
            parts["vlb"] = jax.vmap(bound, (0, 0, 0, 0, 0, None))(
                found, x0, xt, logsnr, before(t), least()
            )
            losses += bound_scale * parts["vlb"]
        return losses, parts

    def loss_of(params, fixed, batch, keys, *, train, gather):
        del gather
        split = jax.vmap(lambda key: jax.random.split(key, 5))(keys)
        t_keys, eps_keys, label_keys, flip_keys, drop_keys = (split[:, i] for i in range(5))
        if flip and train:
            mirrored = jax.vmap(jax.random.bernoulli)(flip_keys)[:, None, None, None]
            images = jnp.where(mirrored, batch.images[:, :, ::-1], batch.images)
            batch = batch._replace(images=images)
        share = jnp.ones(len(keys))
        if times == "importance":
            t, share = loss.importance_times(fixed["history"], t_keys)
        elif times == "stratified":
            t = loss.stratified_times(t_keys, batch.index % batch_size, batch_size)
        else:
            t = loss.uniform_times(t_keys, batch.index, batch_size)
        x0, eps, xt, logsnr = noisy(batch, eps_keys, t)
        labels = None
        if classes:
            dropout = label_dropout if train else 0.0
            dropped = jax.vmap(lambda key: jax.random.bernoulli(key, dropout))(label_keys)
            labels = jnp.where(dropped, classes, class_labels(batch.labels, classes))
        found = predict(params, xt, logsnr, labels, drop_keys if train else None)
        losses, metrics = objective(found, x0, eps, xt, logsnr, t)
        statistics = {"t": t, "losses": losses} if times == "importance" else {}
        # Weighted by their share, means over a batch are unbiased however t was drawn.
        return share * losses, {name: share * v for name, v in metrics.items()}, statistics

    def update(fixed, statistics):
        if times != "importance":
            return fixed
        return {"history": loss.record(fixed["history"], statistics["t"], statistics["losses"])}

    # Evaluation: the loss and its parts at evenly spread times, and the bound.

    def test_terms(params, batch, keys):
        labels = class_labels(batch.labels, classes) if classes else None
        split = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
        t_keys, noise_keys, decoder_keys = (split[:, i] for i in range(3))
        times = spread_times(batch.index, t_keys, eval_times)

        def at(number):
            t = times[:, number]
            eps_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(noise_keys)
            x0, eps, xt, logsnr = noisy(batch, eps_keys, t)
            found = predict(params, xt, logsnr, labels)
            losses, parts = objective(found, x0, eps, xt, logsnr, t)
            terms = {"loss": losses, **parts, "t": t}
            if steps:
                found = clipped(found, xt, logsnr)
                terms["distortion"] = jnp.square(found.x0 - x0).reshape(len(x0), -1).mean(-1)
                cleaner = before(t)
                nats = step_nats(found, x0, xt, logsnr, cleaner, least())
                # The first step is the decoder's, which is taken of every image below.
                terms["kl"] = jnp.where(jnp.isposinf(cleaner), 0.0, nats) * steps
            return terms

        found = jax.lax.map(at, jnp.arange(eval_times))
        found = {name: jnp.moveaxis(values, 0, 1) for name, values in found.items()}
        if steps:
            x0 = to_images(batch.images, levels)
            found["prior"] = jax.vmap(lambda x0: elbo.prior_kl(x0, schedule.logsnr(1.0)))(x0)
            found["decoder"] = decoder(params, batch, decoder_keys, labels)
        return found

    def clipped(found, xt, logsnr):
        return jax.vmap(lambda p, x, s: clip_x0(lambda *_: p)(x, s))(found, xt, logsnr)

    def decoder(params, batch, keys, labels):
        """L_0, of the first step."""
        t = jnp.zeros(len(batch.images))
        x0, _, xt, logsnr = noisy(batch, keys, t)
        found = clipped(predict(params, xt, logsnr, labels), xt, logsnr)
        return step_nats(found, x0, xt, logsnr, before(t), least())

    def evaluate(params, fixed, data: Data, *, split, seed, full, spread):
        held_out = data.part(split) if full else data.part(split).first(QUICK_IMAGES)
        found = per_example(test_terms, held_out, eval_batch, seed, spread, params)
        names = ("loss", "mse", "vlb") if learned else ("loss", "mse")
        metrics = averages({name: found[name] for name in names})
        dims = int(np.prod(shape))
        if steps:
            ends = {f"bits_per_dim_{name}": found[name] for name in ("decoder", "prior")}
            bound = found["kl"].mean(1) + found["prior"] + found["decoder"]
            metrics |= averages({"bits_per_dim": bound, **ends}, 1 / (dims * np.log(2)))
        pictures: dict[str, Any] = {}
        if full:
            by_level, pictures = noise_levels(found, dims)
            metrics |= by_level
        shown = show(draw, params, seed, data, split, full, judging, spread)
        return shown._replace(metrics=metrics | shown.metrics, pictures=pictures | shown.pictures)

    return Task(
        init,
        loss_of,
        update,
        evaluate,
        draw.sample,
        draw.guide,
        labels=draw.labels,
        denoiser=draw.denoiser,
    )


def noise_levels(
    found: dict[str, np.ndarray], dims: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The error of eps and the bits per dimension of each tenth of t, and their pictures.

    A standard error is over images, each with all of its times (`ratio_of_sums`).

    Progressive coding (Ho et al. 2020, sec. 4.3): sent from noise to data, after the bits of
    all times above t, the predicted x0 differs from the image by its root mean squared error.

    Args:
      found: [images, times] t, mse and, of a table, kl (nats, times T) and distortion.
    """
    rows = np.minimum((found["t"] * NOISE_LEVELS).astype(int), NOISE_LEVELS - 1)
    seen = np.unique(rows)  # all of them, but for a handful of images
    levels = seen / NOISE_LEVELS
    metrics: dict[str, float] = {}

    def of(name: str, metric: str = "", scale: float = 1.0) -> np.ndarray:
        means = []
        for row in seen:
            mean, error = ratio_of_sums(found[name], rows == row)
            means.append(mean * scale)
            if metric:
                metrics.update(
                    figures(f"{metric}_t_{row / NOISE_LEVELS:.1f}", (mean, error), scale)
                )
        return np.array(means)

    curves: dict[str, np.ndarray] = {"error of eps": of("mse", "mse")}
    pictures = {}
    if "kl" in found:
        bits = of("kl", "bits", 1 / (NOISE_LEVELS * dims * np.log(2)))
        curves["bits/dim"] = bits
        rate, rmse = rate_distortion(found["t"], found["kl"], found["distortion"], dims)
        pictures["rate_distortion"] = plots.lines(
            rate, {"RMSE of 255": rmse}, "bits/dim sent", "Progressive coding"
        )
    pictures["levels"] = plots.lines(levels, curves, "t", "By noise level")
    return metrics, pictures


def rate_distortion(
    t: np.ndarray, kl: np.ndarray, distortion: np.ndarray, dims: int
) -> tuple[np.ndarray, np.ndarray]:
    """(bits per dimension sent, root mean squared error of 255) where t falls, at equal times.

    rate(t) = integral of kl from t to 1: over draws of t, sorted, the sum of all above it and of
    half its own.  Both are averaged over the same neighbouring draws (Ho et al. 2020, sec. 4.3).

    Args:
      t: uniform times [...].
      kl: nats times T at each of them.
      distortion: mean squared error of the predicted x0, of values in [-1, 1], at each of them.
    """
    order = np.argsort(-t.ravel(), kind="stable")
    nats, error = kl.ravel()[order], distortion.ravel()[order]
    rate = (np.cumsum(nats) - nats / 2) / len(nats) / (dims * np.log(2))
    parts = min(len(nats), max(NOISE_LEVELS, min(RATES, len(nats) // 20)))
    rate, error = (
        np.array([part.mean() for part in np.array_split(a, parts)]) for a in (rate, error)
    )
    return rate, 127.5 * np.sqrt(error)


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Denoising diffusion of images (Ho et al. 2020); see `diffusion_task`.

    Attributes:
      network: The denoising network.
      schedule: The noise schedule: a table of betas, or logsnr in continuous time.
      prediction: What the network predicts.
      variance: Variance of p(x_s | x_t) in the bound; a learned one is trained (Nichol & Dhariwal
        2021).
      vlb_weight: Weight of L_vlb beside L_simple, with a learned variance.
      times: How training samples t.
      loss_weight: Weight of the squared error of eps, a function of logsnr.
      conditional: Condition the network on class labels, where the data set has them.
      label_dropout: Share of labels that training replaces by "no class".
      flip: Mirror half of the training images.
      sampling: How images are sampled.
      evaluation: What is evaluated.
      info: The data set.
      batch_size: Training images of one step.
    """

    network: UNet | DiT = UNet()
    schedule: NoiseSchedule = LinearBetas()
    prediction: PredictionType = "eps"
    variance: Variance = "beta"
    vlb_weight: NonNegative = 1e-3
    times: Times = "stratified"
    loss_weight: loss.Weight = "simple"
    conditional: bool = True
    label_dropout: Annotated[float, AtLeast(0.0), AtMost(1.0)] = 0.1
    flip: bool = False
    sampling: Annotated[Sampling, MAY_CHANGE] = Sampling()
    evaluation: SampleEvaluation = SampleEvaluation()
    info: Annotated[DataInfo, BOUND] = UNBOUND
    batch_size: Annotated[int, BOUND] = 0

    provides: ClassVar[str] = "diffusion"

    def needs(self) -> Needs:
        """Return the names of other runs: feature networks and a guidance model."""
        return Needs(self.evaluation.features, self.sampling.guidance_model)

    def fit_to(self, data: Data) -> "Diffusion":
        """Return the settings as they fit a data set: as they are."""
        del data
        return self

    def adapt(self, data: Data) -> Data:
        """Return the data as the task is trained on them: as they are."""
        return data

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "Diffusion":
        """Return the task for a data set, a precision and a batch size."""
        outputs = info.shape[-1] * (2 if self.variance == "learned" else 1)
        classes = info.classes if self.conditional else 0
        network = self.network.clone(
            outputs=outputs, classes=classes, dtype=jnp.dtype(precision), parent=None
        )
        return dataclasses.replace(self, network=network, info=info, batch_size=batch_size)

    def build(self, resources: Resources = Resources()) -> Task:
        """Return the functions of the bound task.

        Raises:
          FieldError: fields contradict each other or the data.
        """
        with section("schedule"):
            schedule = self.schedule.make()
        return diffusion_task(
            self.network,
            schedule,
            self.info.shape,
            self.info.levels,
            kind=self.prediction,
            weight=loss.WEIGHTS[self.loss_weight],
            label_dropout=self.label_dropout,
            flip=self.flip,
            variance=self.variance,
            bound_scale=self.vlb_weight,
            times=self.times,
            sampling=self.sampling,
            batch_size=self.batch_size,
            eval_batch=self.evaluation.batch_size,
            eval_times=self.evaluation.times_per_image,
            judging=judging_of(self.evaluation, resources),
            guide=resources.guidance,
        )
