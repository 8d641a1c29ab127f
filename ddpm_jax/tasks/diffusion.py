"""The diffusion task: train epsilon_theta, sample with it, bound the likelihood."""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax.data.types import UNBOUND, Batch, DataInfo
from ddpm_jax.diffusion import elbo
from ddpm_jax.diffusion import losses as loss
from ddpm_jax.diffusion.grids import step_time
from ddpm_jax.diffusion.prediction import Prediction, PredictionType, Variance, clip_x0
from ddpm_jax.diffusion.process import q_posterior
from ddpm_jax.diffusion.schedules import LinearBetas, NoiseSchedule, Schedule
from ddpm_jax.diffusion.times import TIMES, Times
from ddpm_jax.fields import BOUND, MAY_CHANGE, AtLeast, AtMost, FieldError, NonNegative, section
from ddpm_jax.metrics.averages import averages
from ddpm_jax.metrics.noise_levels import noise_levels
from ddpm_jax.metrics.per_example import evaluation_times
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.denoising_networks import DenoisingNetwork
from ddpm_jax.nn.unet import UNet
from ddpm_jax.rng import split_keys
from ddpm_jax.task import AllGather, Context, Evaluate, Evaluation, LossOutput, Variables
from ddpm_jax.tasks.denoising import Corrupted, corrupt, predict, weighted_error
from ddpm_jax.tasks.image_denoiser import ImageDenoiser, SampleEvaluation, bound_network
from ddpm_jax.tasks.image_sampler import Sampling, check_start
from ddpm_jax.tasks.sample_figures import SAMPLE_EVALUATIONS


@dataclasses.dataclass(frozen=True)
class Diffusion(ImageDenoiser):
    """Denoising diffusion of images (Ho et al. 2020, alg. 1 and 2).

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

    network: DenoisingNetwork = UNet()
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

    @property
    def learned_variance(self) -> bool:
        """Whether the network has learned the variance of a step."""
        return self.variance == "learned"

    @property
    def only_conditional(self) -> str:
        """The field by which the network is never trained without its labels; "": it is."""
        return "" if self.label_dropout else "label_dropout=0"

    @property
    def table_steps(self) -> int | None:
        """Steps of the schedule's table; None: it is continuous."""
        return self.schedule.make().steps

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "Diffusion":
        """Return the task for a data set, a precision and a batch size."""
        network = bound_network(
            self.network,
            info,
            precision,
            conditional=self.conditional,
            learned=self.learned_variance,
        )
        return dataclasses.replace(self, network=network, info=info, batch_size=batch_size)

    def check(self) -> None:
        """Check that the fields fit each other and the data.

        Raises:
          FieldError: they do not.
        """
        with section("schedule"):
            schedule = self.schedule.make()
        with section("network"):
            self.network.check(self.info.shape)
        if schedule.steps is None and (self.learned_variance or self.times == "importance"):
            field = "variance=learned" if self.learned_variance else "times=importance"
            raise FieldError(
                f"{field}: needs a table of betas; give schedule=linear_betas or cosine_betas",
                "schedule",
            )
        self.check_denoiser()
        check_start(self.prediction, schedule, self.sampling)

    def noise_schedule(self, params: PyTree = None) -> Schedule:
        """Return the schedule, of which the parameters hold nothing."""
        del params
        return self.schedule.make()

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return the first variables."""
        del batch
        labels = jnp.zeros(1, jnp.int32) if self.classes else None
        images = jnp.zeros((1, *self.info.shape))
        params = self.network.init(key, images, jnp.zeros(1), labels)
        return Variables(params, TIMES[self.times].init(self.table_steps))

    def predict(
        self,
        params: PyTree,
        xt: Float[Array, "batch h w c"],
        logsnr: Float[Array, "batch"],
        conditioning: Int[Array, "batch"] | None,
        keys: Key[Array, "batch"] | None = None,
    ) -> Prediction:
        """Return the prediction for noisy images, each with its own logsnr.

        Args:
          params: of the network.
          xt: noisy images.
          logsnr: of every image.
          conditioning: labels; None: the network has no classes.
          keys: of dropout; None: there is none.
        """
        time = self.noise_schedule().time(logsnr)
        return predict(
            self.network, self.prediction, params, xt, logsnr, time, labels=conditioning, keys=keys
        )

    def loss(
        self,
        variables: Variables,
        batch: Batch,
        keys: Key[Array, "batch"],
        *,
        train: bool,
        all_gather: AllGather,
    ) -> LossOutput:
        """Return the loss of every example at one time each.

        Args:
          variables, batch, keys, train, all_gather: see `Task.loss`.
        """
        del all_gather
        t_keys, eps_keys, label_keys, flip_keys, drop_keys = split_keys(keys, 5)
        if self.flip and train:
            batch = mirrored(batch, flip_keys)
        times = TIMES[self.times]
        t, weight = times.sample(variables.extra, t_keys, batch.index, self.batch_size)
        labels = self.conditioning(batch.labels)
        if labels is not None:
            dropout = self.label_dropout if train else 0.0
            dropped = jax.vmap(lambda key: jax.random.bernoulli(key, dropout))(label_keys)
            labels = jnp.where(dropped, self.classes, labels)
        noisy = self.corrupted(batch, eps_keys, t)
        prediction = self.predict(
            variables.params, noisy.xt, noisy.logsnr, labels, drop_keys if train else None
        )
        losses, metrics = self.objective(prediction, noisy, t)
        metrics = {name: weight * values for name, values in metrics.items()}
        return LossOutput(weight * losses, metrics, times.statistics(t, losses))

    def update_extra(self, extra: PyTree, statistics: PyTree) -> PyTree:
        """Return what the sampler of times remembers after a step."""
        return TIMES[self.times].update(extra, statistics)

    def corrupted(
        self, batch: Batch, keys: Key[Array, "batch"], t: Float[Array, "batch"]
    ) -> Corrupted:
        """Return the images of a batch, noised to their times."""
        schedule = self.noise_schedule()
        images = to_images(batch.images, self.info.levels)
        return corrupt(images, keys, schedule.logsnr(step_time(schedule, t)))

    def objective(
        self, prediction: Prediction, noisy: Corrupted, t: Float[Array, "batch"]
    ) -> tuple[Float[Array, "batch"], dict[str, Float[Array, "batch"]]]:
        """Return L_simple, weighted, or L_hybrid of every image, and its parts by name."""
        losses, mse = weighted_error(prediction, noisy, loss.WEIGHTS[self.loss_weight])
        if not self.learned_variance:
            return losses, {"mse": mse}
        assert self.table_steps is not None
        bound = functools.partial(
            loss.variance_bound, steps=self.table_steps, levels=self.info.levels
        )
        vlb = jax.vmap(bound, (0, 0, 0, 0, 0, None))(prediction, *self._step(noisy, t))
        return loss.hybrid(losses, vlb, self.vlb_weight), {"mse": mse, "vlb": vlb}

    def logsnr_before(self, t: Float[Array, "batch"]) -> Float[Array, "batch"]:
        """Return logsnr a step of the table earlier: +inf, the clean data, before the first."""
        schedule = self.noise_schedule()
        assert schedule.steps is not None
        return schedule.logsnr(step_time(schedule, t) - 1 / schedule.steps)

    def least_log_variance(self) -> Float[Array, ""]:
        """Return the log of the posterior's variance in the table's second step."""
        schedule = self.noise_schedule()
        assert schedule.steps is not None
        first, second = (schedule.logsnr(jnp.asarray(i / schedule.steps)) for i in (1, 2))
        return jnp.log(q_posterior(jnp.zeros(()), jnp.zeros(()), second, first)[1])

    def step_nats(
        self, prediction: Prediction, noisy: Corrupted, t: Float[Array, "batch"]
    ) -> Float[Array, "batch"]:
        """Return the part of the bound of every image's step, in nats."""
        nats = functools.partial(elbo.step_nats, variance=self.variance, levels=self.info.levels)
        return jax.vmap(nats, (0, 0, 0, 0, 0, None))(prediction, *self._step(noisy, t))

    def _step(self, noisy: Corrupted, t: Float[Array, "batch"]) -> tuple[Array, ...]:
        """Return (x0, x_t, logsnr_t, logsnr_s, least log variance) of each image's step."""
        before, least = self.logsnr_before(t), self.least_log_variance()
        return noisy.x0, noisy.xt, noisy.logsnr, before, least

    def evaluations(self) -> "tuple[Evaluate[Diffusion], ...]":
        """Return the functions that evaluate the task."""
        return evaluate_loss, evaluate_bound, evaluate_noise_levels, *SAMPLE_EVALUATIONS


def mirrored(batch: Batch, keys: Key[Array, "batch"]) -> Batch:
    """Return a batch with half of its images mirrored."""
    flipped = jax.vmap(jax.random.bernoulli)(keys)[:, None, None, None]
    return batch._replace(images=jnp.where(flipped, batch.images[:, :, ::-1], batch.images))


def held_out_terms(
    task: Diffusion, params: PyTree, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return the loss and its parts at evenly spread times [B, times], and the bound's ends [B].

    If the schedule has a table, also: kl (nats, times T) and distortion, the squared error of x0,
    at every time; prior and decoder, L_T and L_0 of the bound (Ho et al. 2020, eq. 5).

    Args:
      task: the task.
      params: of the network.
      batch: images.
      keys: one for every image.
    """
    labels = task.conditioning(batch.labels)
    t_keys, noise_keys, decoder_keys = split_keys(keys, 3)
    count, steps = task.evaluation.times_per_image, task.table_steps
    times = evaluation_times(batch.index, t_keys, count)

    def at_time(number: Int[Array, ""]) -> dict[str, Array]:
        t = times[:, number]
        eps_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(noise_keys)
        noisy = task.corrupted(batch, eps_keys, t)
        prediction = task.predict(params, noisy.xt, noisy.logsnr, labels)
        losses, parts = task.objective(prediction, noisy, t)
        terms = {"loss": losses, **parts, "t": t}
        if steps:
            clipped = clip(prediction, noisy)
            error = jnp.square(clipped.x0 - noisy.x0)
            terms["distortion"] = error.reshape(len(t), -1).mean(-1)
            nats = task.step_nats(clipped, noisy, t)
            # The first step is the decoder's, which is computed of every image below.
            terms["kl"] = jnp.where(jnp.isposinf(task.logsnr_before(t)), 0.0, nats) * steps
        return terms

    terms = jax.lax.map(at_time, jnp.arange(count))
    terms = {name: jnp.moveaxis(values, 0, 1) for name, values in terms.items()}
    if steps:
        noisiest = task.noise_schedule().logsnr(1.0)
        x0 = to_images(batch.images, task.info.levels)
        terms["prior"] = jax.vmap(lambda x0: elbo.prior_kl(x0, noisiest))(x0)
        first = jnp.zeros(len(batch.images))
        noisy = task.corrupted(batch, decoder_keys, first)
        prediction = clip(task.predict(params, noisy.xt, noisy.logsnr, labels), noisy)
        terms["decoder"] = task.step_nats(prediction, noisy, first)
    return terms


def clip(prediction: Prediction, noisy: Corrupted) -> Prediction:
    """Return the prediction with x0 within the range of images, each at its own logsnr."""

    def clip_one(prediction: Prediction, xt: Array, logsnr: Array) -> Prediction:
        return clip_x0(lambda *_: prediction)(xt, logsnr)

    return jax.vmap(clip_one)(prediction, noisy.xt, noisy.logsnr)


def terms_of(context: Context) -> dict[str, np.ndarray]:
    """Return `held_out_terms` of the split, or of its first images before the end."""
    task = context.task
    assert isinstance(task, Diffusion)
    split = context.examples()
    size = task.evaluation.batch_size
    return context.per_example(held_out_terms, split, size, context.variables.params)


def evaluate_loss(task: Diffusion, context: Context) -> Evaluation:
    """Return the loss and its parts, at evenly spread times."""
    terms = context.shared(terms_of)
    names = ("loss", "mse", "vlb") if task.learned_variance else ("loss", "mse")
    return Evaluation(averages({name: terms[name] for name in names}))


def evaluate_bound(task: Diffusion, context: Context) -> Evaluation:
    """Return the variational bound in bits per dimension, where the schedule is a table."""
    if not task.table_steps:
        return Evaluation()
    terms = context.shared(terms_of)
    bound = terms["kl"].mean(1) + terms["prior"] + terms["decoder"]
    ends = {f"bits_per_dim_{name}": terms[name] for name in ("decoder", "prior")}
    scale = 1 / (int(np.prod(task.info.shape)) * np.log(2))
    return Evaluation(averages({"bits_per_dim": bound, **ends}, scale))


def evaluate_noise_levels(task: Diffusion, context: Context) -> Evaluation:
    """Return errors and rates by noise level, at the end of a training."""
    if not context.full:
        return Evaluation()
    metrics, images = noise_levels(context.shared(terms_of), int(np.prod(task.info.shape)))
    return Evaluation(metrics, {**images})
