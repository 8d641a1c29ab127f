"""The diffusion task: training of a denoising network, and its variational bound."""

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
from ddpm_jax.tasks.image_denoiser import ImageDenoiser, SampleEvaluation, bind_network
from ddpm_jax.tasks.image_sampler import Sampling, check_start
from ddpm_jax.tasks.sample_figures import SAMPLE_EVALUATIONS


@dataclasses.dataclass(frozen=True)
class Diffusion(ImageDenoiser):
    """Denoising diffusion of images (Ho et al. 2020, alg. 1 and 2).

    Attributes:
      network: The denoising network.
      schedule: The noise schedule: discrete, with a table of betas, or continuous in time.
      prediction: Prediction type: the network predicts the noise eps, the image x0, or
        v = alpha eps - sigma x0.
      variance: Variance of p(x_s | x_t) in the variational bound; a learned variance is predicted
        by the network and needs a table of betas (Nichol & Dhariwal 2021).
      vlb_weight: Weight of the bound L_vlb in the loss; it has an effect only if variance=learned.
      times: Distribution of the training times t: uniform, stratified over the batch, or more
        frequent where past losses were large (importance sampling, which needs a table of betas).
      loss_weight: Weight of the squared error of eps as a function of logSNR: 1 (simple), or the
        weight of v-prediction (v), of Min-SNR, of a sigmoid, or of EDM.
      conditional: If True, the network is conditioned on class labels, if the data set has them.
      label_dropout: Share of labels, from 0 to 1, that training replaces by "no class";
        classifier-free guidance needs a value above 0.
      flip: If True, each training image is mirrored left to right with probability 1/2.
      sampling: Fields of sampling, such as the sampler and the guidance scale.
      evaluation: Fields of the evaluation, such as the number of samples.
      info: Description of the data set: image shape, number of classes and caption length.
      batch_size: Number of images in one training step, over all devices.
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
        """True if the network also predicts the variance of p(x_s | x_t)."""
        return self.variance == "learned"

    @property
    def no_label_dropout(self) -> str:
        """The text "label_dropout=0" if training never drops labels, else an empty string."""
        return "" if self.label_dropout else "label_dropout=0"

    @property
    def table_steps(self) -> int | None:
        """The number of steps T of a discrete noise schedule; None for a continuous one."""
        return self.schedule.make().steps

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "Diffusion":
        """Return the task with its network set up for the images, the classes and the precision."""
        network = bind_network(
            self.network,
            info,
            precision,
            conditional=self.conditional,
            learned=self.learned_variance,
        )
        return dataclasses.replace(self, network=network, info=info, batch_size=batch_size)

    def check(self) -> None:
        """Check that the fields fit each other and the data set.

        Raises:
          FieldError: If a field does not fit another field or the data set.
        """
        with section("schedule"):
            schedule = self.schedule.make()
        with section("network"):
            self.network.check(self.info.shape)
        if schedule.steps is None and (self.learned_variance or self.times == "importance"):
            field = "variance=learned" if self.learned_variance else "times=importance"
            raise FieldError(
                f"{field}: needs a table of betas, and this schedule is continuous; give "
                "schedule=linear_betas or schedule=cosine_betas",
                "schedule",
            )
        self.check_denoiser()
        check_start(self.prediction, schedule, self.sampling)

    def noise_schedule(self, params: PyTree = None) -> Schedule:
        """Return the noise schedule, which does not depend on `params`."""
        del params
        return self.schedule.make()

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return the initial variables, which do not depend on the batch."""
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
        """Return the network's prediction of x0 and eps for noisy images.

        Args:
          params: The parameters of the network.
          xt: Noisy images [B, H, W, C].
          logsnr: The log signal-to-noise ratio of each image [B].
          conditioning: Class labels [B]; if None, the network is not class-conditional.
          keys: Random keys of dropout, one for each example; if None, dropout is off.
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
        """Return the loss and its terms for every image, at one random time per image.

        Args:
          variables: The parameters; the extra variables are past losses if times=importance.
          batch: Images, labels and indices of B examples.
          keys: Random keys, one for each example, [B].
          train: If True, dropout, label dropout and random flips are on.
          all_gather: Not used.
        """
        del all_gather
        t_keys, eps_keys, label_keys, flip_keys, drop_keys = split_keys(keys, 5)
        if self.flip and train:
            batch = random_flip(batch, flip_keys)
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
        """Return the past losses of importance sampling, updated with those of a training step."""
        return TIMES[self.times].update(extra, statistics)

    def corrupted(
        self, batch: Batch, keys: Key[Array, "batch"], t: Float[Array, "batch"]
    ) -> Corrupted:
        """Return images with noise added, at the noise level of the time t of each image."""
        schedule = self.noise_schedule()
        images = to_images(batch.images, self.info.levels)
        return corrupt(images, keys, schedule.logsnr(step_time(schedule, t)))

    def objective(
        self, prediction: Prediction, noisy: Corrupted, t: Float[Array, "batch"]
    ) -> tuple[Float[Array, "batch"], dict[str, Float[Array, "batch"]]]:
        """Return the loss [B] of every image, and its terms [B] by name.

        The loss is the weighted L_simple (Ho et al. 2020, eq. 14), or L_hybrid if the variance is
        learned (Nichol & Dhariwal 2021, eq. 16).
        """
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
        """Return the logsnr one step of the noise schedule before t; +inf at the first step."""
        schedule = self.noise_schedule()
        assert schedule.steps is not None
        return schedule.logsnr(step_time(schedule, t) - 1 / schedule.steps)

    def min_log_variance(self) -> Float[Array, ""]:
        """Return the log of the posterior variance of the second step of the noise schedule.

        It replaces the posterior variance of the first step, which is 0.
        """
        schedule = self.noise_schedule()
        assert schedule.steps is not None
        first, second = (schedule.logsnr(jnp.asarray(i / schedule.steps)) for i in (1, 2))
        return jnp.log(q_posterior(jnp.zeros(()), jnp.zeros(()), second, first)[1])

    def step_nats(
        self, prediction: Prediction, noisy: Corrupted, t: Float[Array, "batch"]
    ) -> Float[Array, "batch"]:
        """Return the term L_{t-1} or L_0 of the variational bound for every image, in nats."""
        nats = functools.partial(elbo.step_nats, variance=self.variance, levels=self.info.levels)
        return jax.vmap(nats, (0, 0, 0, 0, 0, None))(prediction, *self._step(noisy, t))

    def _step(self, noisy: Corrupted, t: Float[Array, "batch"]) -> tuple[Array, ...]:
        """Return (x0, x_t, logsnr_t, logsnr_s, min_log_variance), inputs of `elbo.step_nats`."""
        return noisy.x0, noisy.xt, noisy.logsnr, self.logsnr_before(t), self.min_log_variance()

    def evaluations(self) -> "tuple[Evaluate[Diffusion], ...]":
        """Return the functions that compute the metrics and images of an evaluation."""
        return evaluate_loss, evaluate_bound, evaluate_noise_levels, *SAMPLE_EVALUATIONS


def random_flip(batch: Batch, keys: Key[Array, "batch"]) -> Batch:
    """Mirror each image of a batch left to right with probability 1/2."""
    flipped = jax.vmap(jax.random.bernoulli)(keys)[:, None, None, None]
    return batch._replace(images=jnp.where(flipped, batch.images[:, :, ::-1], batch.images))


def held_out_terms(
    task: Diffusion, params: PyTree, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return, by name, the loss and its terms at several times [B, times].

    For a schedule with T discrete steps, the result also contains "kl" (T times the term of the
    variational bound at each time, in nats) and "distortion" (the squared error of x0), both
    [B, times], and "prior" and "decoder" (L_T and L_0 of Ho et al. 2020, eq. 5, in nats), both [B].

    Args:
      task: The task, after `bind` has set the fields that depend on the data set.
      params: The parameters of the network.
      batch: A batch of images.
      keys: Random keys, one for each image.
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
            clipped = clip_prediction(prediction, noisy)
            error = jnp.square(clipped.x0 - noisy.x0)
            terms["distortion"] = error.reshape(len(t), -1).mean(-1)
            nats = task.step_nats(clipped, noisy, t)
            # The term of the first step is L_0, which is computed for every image below.
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
        prediction = task.predict(params, noisy.xt, noisy.logsnr, labels)
        prediction = clip_prediction(prediction, noisy)
        terms["decoder"] = task.step_nats(prediction, noisy, first)
    return terms


def clip_prediction(prediction: Prediction, noisy: Corrupted) -> Prediction:
    """Clip x0 of a prediction to [-1, 1], and compute eps from x_t and the clipped x0."""

    def clip_one(prediction: Prediction, xt: Array, logsnr: Array) -> Prediction:
        return clip_x0(lambda *_: prediction)(xt, logsnr)

    return jax.vmap(clip_one)(prediction, noisy.xt, noisy.logsnr)


def shared_terms(context: Context) -> dict[str, np.ndarray]:
    """Return `held_out_terms` of the split; during training, of its first 1,000 images."""
    task = context.task
    assert isinstance(task, Diffusion)
    split = context.examples()
    size = task.evaluation.batch_size
    return context.per_example(held_out_terms, split, size, context.variables.params)


def evaluate_loss(task: Diffusion, context: Context) -> Evaluation:
    """Return the loss and its terms, averaged over images and times."""
    terms = context.cached(shared_terms)
    names = ("loss", "mse", "vlb") if task.learned_variance else ("loss", "mse")
    return Evaluation(averages({name: terms[name] for name in names}))


def evaluate_bound(task: Diffusion, context: Context) -> Evaluation:
    """Return the variational bound in bits per dimension if the schedule has discrete steps."""
    if not task.table_steps:
        return Evaluation()
    terms = context.cached(shared_terms)
    bound = terms["kl"].mean(1) + terms["prior"] + terms["decoder"]
    ends = {f"bits_per_dim_{name}": terms[name] for name in ("decoder", "prior")}
    scale = 1 / (int(np.prod(task.info.shape)) * np.log(2))
    return Evaluation(averages({"bits_per_dim": bound, **ends}, scale))


def evaluate_noise_levels(task: Diffusion, context: Context) -> Evaluation:
    """In the final evaluation, return the error of eps and bits per dimension by noise level."""
    if not context.full:
        return Evaluation()
    metrics, images = noise_levels(context.cached(shared_terms), int(np.prod(task.info.shape)))
    return Evaluation(metrics, {**images})
