"""Variational diffusion (Kingma et al. 2021): the loss is a bound, and the schedule is learned.

-log P(x0) <= prior + diffusion + decoder, in nats, where z_t is x_t at time t             (1)
    prior      KL(q(z_1 | x0) || N(0, I))
    diffusion  E_t 1/2 (-dlogsnr/dt) |eps - eps_hat|^2     in continuous time, eq. 17
               T E_i KL(q(z_s | z_t, x0) || p(z_s | z_t))  in T steps, s = (i - 1) / T
    decoder    -log P(x0 | z_0), the mass of N(z_0 / alpha, sigma^2 / alpha^2) in x0's bin

The probability-flow ODE, where q(z_0 | x0) dequantises x0, gives a second bound:
    -log P(x0) <= E_q [log q(z_0 | x0) - log p(z_0)] + decoder                           (2)
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax import plots
from ddpm_jax.data.types import UNBOUND, Batch, DataInfo
from ddpm_jax.diffusion import elbo, grids, probability_flow, schedules
from ddpm_jax.diffusion.prediction import Prediction
from ddpm_jax.diffusion.process import alpha_sigma, q_sample
from ddpm_jax.diffusion.times import StratifiedTimes
from ddpm_jax.fields import BOUND, MAY_CHANGE, FieldError, Length, section
from ddpm_jax.metrics.averages import averages
from ddpm_jax.metrics.per_example import evaluation_times
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.denoising_networks import DenoisingNetwork
from ddpm_jax.nn.unet import UNet
from ddpm_jax.parallel.partitioner import fetch
from ddpm_jax.rng import split_keys
from ddpm_jax.task import AllGather, Context, Evaluate, Evaluation, LossOutput, Variables
from ddpm_jax.tasks.denoising import add_noise, normal, predict
from ddpm_jax.tasks.image_denoiser import ImageDenoiser, SampleEvaluation, bind_network
from ddpm_jax.tasks.image_sampler import Sampling
from ddpm_jax.tasks.sample_figures import SAMPLE_EVALUATIONS

STEPS = 1000  # number of steps T of the discrete bound
EVALUATION_PURPOSES = 4  # keys per image: noise of z_0, times, noise of z_t, probe of the ODE
CURVE_POINTS = 101  # number of points in the plot of the schedule


@dataclasses.dataclass(frozen=True)
class VDM(ImageDenoiser):
    """Variational diffusion, trained by eq. (1) in continuous time (Kingma et al. 2021).

    Attributes:
      network: The denoising network, which predicts v.
      logsnr_max: Initial logSNR of the learned schedule at t = 0, the end with the least noise.
      logsnr_min: Initial logSNR of the learned schedule at t = 1, less than `logsnr_max`.
      conditional: If True, the model is p(x0 | y), if the data set has class labels y.
      ode_images: Number of images whose likelihood is computed by the probability-flow ODE.
      sampling: Fields of sampling, such as the sampler and the guidance scale.
      evaluation: Fields of the evaluation, such as the number of samples.
      info: Description of the data set: image shape, number of classes and caption length.
      batch_size: Number of images in one training step, over all devices.
    """

    network: DenoisingNetwork = UNet()
    logsnr_max: float = 8.0
    logsnr_min: float = -6.0
    conditional: bool = False
    ode_images: Length = 1000
    sampling: Annotated[Sampling, MAY_CHANGE] = Sampling()
    evaluation: SampleEvaluation = SampleEvaluation()
    info: Annotated[DataInfo, BOUND] = UNBOUND
    batch_size: Annotated[int, BOUND] = 0

    @property
    def no_label_dropout(self) -> str:
        """The first words of the error about guidance, since training never drops labels."""
        return "sampling.guidance"

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "VDM":
        """Return the task with its network set up for the images, the classes and the precision."""
        network = bind_network(self.network, info, precision, conditional=self.conditional)
        return dataclasses.replace(self, network=network, info=info, batch_size=batch_size)

    def check(self) -> None:
        """Check that the fields fit each other and the data set.

        Raises:
          FieldError: If a field does not fit another field or the data set.
        """
        if not self.logsnr_min < self.logsnr_max:
            raise FieldError(
                f"logsnr_min={self.logsnr_min:g}: must be less than logsnr_max={self.logsnr_max:g}",
                "logsnr_max",
            )
        with section("network"):
            self.network.check(self.info.shape)
        self.check_denoiser()

    def noise_schedule(self, params: PyTree) -> schedules.Schedule:
        """Return the learned noise schedule, whose parameters are `params["schedule"]`."""
        return schedules.learned(params["schedule"])

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return the initial variables, which do not depend on the batch."""
        del batch
        net_key, schedule_key = jax.random.split(key)
        labels = jnp.zeros(1, jnp.int32) if self.classes else None
        images = jnp.zeros((1, *self.info.shape))
        params = self.network.init(net_key, images, jnp.zeros(1), labels)
        schedule = schedules.learned_init(
            schedule_key, lowest=self.logsnr_min, highest=self.logsnr_max
        )
        return Variables({"net": params, "schedule": schedule}, {})

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
          params: The parameters of the network and of the schedule.
          xt: Noisy images [B, H, W, C].
          logsnr: The log signal-to-noise ratio of each image [B]; it determines the input time.
          conditioning: Class labels [B]; if None, the network is not class-conditional.
          keys: Random keys of dropout, one for each example; if None, dropout is off.
        """
        time = (self.logsnr_max - logsnr) / (self.logsnr_max - self.logsnr_min)
        return predict(
            self.network, "v", params["net"], xt, logsnr, time, labels=conditioning, keys=keys
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
        """Return the bound of eq. (1) and its terms for every image, in bits per dimension.

        Args:
          variables: The parameters of the network and of the schedule.
          batch: Images, labels and indices of B examples.
          keys: Random keys, one for each example, [B].
          train: If True, dropout is on.
          all_gather: Not used.
        """
        del all_gather
        params, x0 = variables.params, to_images(batch.images, self.info.levels)
        t_keys, drop_keys, end_keys, eps_keys = split_keys(keys, 4)
        t, _ = StratifiedTimes().sample({}, t_keys, batch.index, self.batch_size)
        prior, decoder, _ = self.end_terms(params, x0, normal(end_keys, self.info.shape))
        labels = self.conditioning(batch.labels)
        eps = normal(eps_keys, self.info.shape)
        diffusion = self.diffusion_term(params, x0, eps, t, labels, drop_keys if train else None)
        parts = {"prior": prior, "diffusion": diffusion, "decoder": decoder}
        dims = int(np.prod(self.info.shape))
        bits = {f"bits_{name}": elbo.bits_per_dim(nats, dims) for name, nats in parts.items()}
        total = bits["bits_prior"] + bits["bits_diffusion"] + bits["bits_decoder"]
        return LossOutput(total, bits, {})

    def end_terms(
        self, params: PyTree, x0: Float[Array, "batch h w c"], eps: Float[Array, "batch h w c"]
    ) -> tuple[Float[Array, "batch"], Float[Array, "batch"], Float[Array, "batch h w c"]]:
        """Return the prior and decoder terms of eq. (1) in nats, both [B], and z_0 [B, H, W, C].

        Args:
          params: The parameters of the network and of the schedule.
          x0: Images [B, H, W, C] in [-1, 1].
          eps: The standard normal noise of z_0 [B, H, W, C].
        """
        schedule = self.noise_schedule(params)
        prior = jax.vmap(lambda x0: elbo.prior_kl(x0, schedule.logsnr(jnp.ones(()))))(x0)
        logsnr = schedule.logsnr(jnp.zeros(()))
        z0 = jax.vmap(q_sample, (0, 0, None))(x0, eps, logsnr)
        decoder = jax.vmap(lambda z, x: rounding_nll(z, x, logsnr, self.info.levels))(z0, x0)
        return prior, decoder, z0

    def diffusion_term(
        self,
        params: PyTree,
        x0: Float[Array, "batch h w c"],
        eps: Float[Array, "batch h w c"],
        t: Float[Array, "batch"],
        labels: Int[Array, "batch"] | None,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch"]:
        """Return an estimate, in nats, of the continuous diffusion term from one time per image.

        Args:
          params: The parameters of the network and of the schedule.
          x0: Images [B, H, W, C] in [-1, 1].
          eps: The standard normal noise of z_t [B, H, W, C].
          t: The time of each image [B] in [0, 1].
          labels: Class labels [B]; if None, the network is not class-conditional.
          keys: Random keys of dropout, one for each example; if None, dropout is off.
        """
        schedule = self.noise_schedule(params)
        logsnr, slope = jax.vmap(lambda t: jax.jvp(schedule.logsnr, (t,), (jnp.ones(()),)))(t)
        noisy = add_noise(x0, eps, logsnr)
        prediction = self.predict(params, noisy.xt, logsnr, labels, keys)
        return jax.vmap(elbo.continuous_kl)(prediction, noisy.eps, slope)

    def evaluations(self) -> "tuple[Evaluate[VDM], ...]":
        """Return the functions that compute the metrics and images of an evaluation."""
        return evaluate_bounds, evaluate_ode, evaluate_schedule, *SAMPLE_EVALUATIONS


def bounds(task: VDM, params: PyTree, batch: Batch, keys: Key[Array, "batch"]) -> dict[str, Array]:
    """Return the terms of eq. (1) in nats [B], by name; "discrete" is the term in `STEPS` steps.

    Args:
      task: The task, after `bind` has set the fields that depend on the data set.
      params: The parameters of the network and of the schedule.
      batch: Images, labels and indices of B examples.
      keys: Random keys, one for each example, [B].
    """
    x0, labels = to_images(batch.images, task.info.levels), task.conditioning(batch.labels)
    schedule, count = task.noise_schedule(params), task.evaluation.times_per_image
    end_keys, t_keys, eps_keys, _ = split_keys(keys, EVALUATION_PURPOSES)
    prior, decoder, _ = task.end_terms(params, x0, normal(end_keys, task.info.shape))
    times = evaluation_times(batch.index, t_keys, count)

    def at_time(number: Int[Array, ""]) -> tuple[Array, Array]:
        noise_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(eps_keys)
        eps, t = normal(noise_keys, task.info.shape), times[:, number]
        continuous = task.diffusion_term(params, x0, eps, t, labels)
        step = grids.step_number(t, STEPS)
        now, before = schedule.logsnr(step / STEPS), schedule.logsnr((step - 1) / STEPS)
        noisy = add_noise(x0, eps, now)
        prediction = task.predict(params, noisy.xt, now, labels)
        discrete = STEPS * jax.vmap(elbo.step_kl)(prediction, x0, noisy.xt, now, before)
        return continuous, discrete

    continuous, discrete = jax.lax.map(at_time, jnp.arange(count))
    ends = {"prior": prior, "decoder": decoder}
    return {**ends, "continuous": continuous.mean(0), "discrete": discrete.mean(0)}


def ode_nll(
    task: VDM,
    params: PyTree,
    tolerance: Float[Array, ""] | float,
    batch: Batch,
    keys: Key[Array, "batch"],
) -> dict[str, Array]:
    """Return "ode", the bound of eq. (2) in nats [B], and "calls" of the network [B].

    Args:
      task: The task, after `bind` has set the fields that depend on the data set.
      params: The parameters of the network and of the schedule.
      tolerance: The error tolerance of the ODE solver.
      batch: A batch of images.
      keys: Random keys, one for each image.
    """
    shape, schedule = task.info.shape, task.noise_schedule(params)
    x0, labels = to_images(batch.images, task.info.levels), task.conditioning(batch.labels)
    end_keys, _, _, probe_keys = split_keys(keys, EVALUATION_PURPOSES)
    eps = normal(end_keys, shape)  # z_0 is the same as in `bounds`
    probe = jax.vmap(lambda key: jax.random.rademacher(key, shape, eps.dtype))(probe_keys)
    _, decoder, z0 = task.end_terms(params, x0, eps)
    clean, noisy = schedule.logsnr(jnp.zeros(())), schedule.logsnr(jnp.ones(()))

    def denoise(xt: Array, logsnr: Array) -> Prediction:
        return task.predict(params, xt, jnp.full(len(xt), logsnr), labels)

    log_p, calls = probability_flow.log_density(denoise, z0, probe, clean, noisy, tolerance)
    _, sigma = alpha_sigma(clean)
    log_q = -0.5 * (jnp.square(eps) + jnp.log(2 * jnp.pi)).reshape(len(eps), -1).sum(-1)
    log_q -= int(np.prod(shape)) * jnp.log(sigma)
    return {"ode": log_q - log_p + decoder, "calls": jnp.full(len(eps), calls)}


def schedule_curve(task: VDM, params: PyTree) -> Float[Array, "points"]:
    """Return the logsnr of the learned noise schedule at evenly spaced times from 0 to 1."""
    return task.noise_schedule(params).logsnr(jnp.linspace(0, 1, CURVE_POINTS))


def shared_bounds(context: Context) -> dict[str, np.ndarray]:
    """Return `bounds` of the split; during training, of its first 1,000 images."""
    task = context.task
    assert isinstance(task, VDM)
    split, size = context.examples(), task.evaluation.batch_size
    return context.per_example(bounds, split, size, context.variables.params)


def bits_scale(task: VDM) -> float:
    """Return the factor 1 / (D log 2) that converts nats to bits per dimension, for D values."""
    return float(1 / (int(np.prod(task.info.shape)) * np.log(2)))


def evaluate_bounds(task: VDM, context: Context) -> Evaluation:
    """Return both bounds of eq. (1) and the terms of the continuous one, in bits per dimension."""
    nats = context.cached(shared_bounds)
    ends = nats["prior"] + nats["decoder"]
    values = {"loss": ends + nats["continuous"]}
    values |= {f"bits_per_dim_{name}": ends + nats[name] for name in ("continuous", "discrete")}
    parts = {"prior": "prior", "diffusion": "continuous", "decoder": "decoder"}
    values |= {f"bits_{name}": nats[part] for name, part in parts.items()}
    return Evaluation(averages(values, bits_scale(task)))


def evaluate_ode(task: VDM, context: Context) -> Evaluation:
    """In the final evaluation, return the bound of eq. (2) and the numerical error of the ODE."""
    if not context.full:
        return Evaluation()

    def solve(count: int, tolerance: float) -> dict[str, np.ndarray]:
        images, size = context.held_out.first(count), task.evaluation.batch_size
        return context.per_example(ode_nll, images, size, context.variables.params, tolerance)

    exact = solve(task.ode_images, probability_flow.TOLERANCE)
    checked = min(task.ode_images, task.evaluation.batch_size)
    # The difference between two tolerances is an upper estimate of the error of the solver.
    change = exact["ode"][:checked] - solve(checked, 10 * probability_flow.TOLERANCE)["ode"]
    metrics = averages({"bits_per_dim_ode": exact["ode"]}, bits_scale(task))
    metrics["ode_calls"] = float(exact["calls"].mean())
    metrics["ode_images"] = float(len(exact["calls"]))
    metrics["bits_per_dim_ode_numerical_error"] = float(np.abs(change * bits_scale(task)).mean())
    return Evaluation(metrics)


def evaluate_schedule(task: VDM, context: Context) -> Evaluation:
    """Return the largest and smallest logsnr; in the final evaluation, also plot the schedule."""
    highest, lowest = (float(end) for end in fetch(context.variables.params["schedule"]["ends"]))
    metrics = {"logsnr_highest": highest, "logsnr_lowest": lowest}
    if not context.full:
        return Evaluation(metrics)
    curve = fetch(context.compile(schedule_curve, static_argnums=0)(task, context.variables.params))
    t = np.linspace(0, 1, CURVE_POINTS)
    plot = plots.lines(t, {"logsnr": curve}, "t", "The learned schedule")
    return Evaluation(metrics, {"schedule": plot})


def rounding_nll(
    z0: Float[Array, "*event"], x0: Float[Array, "*event"], logsnr: Float[Array, ""], levels: int
) -> Float[Array, ""]:
    """Return -log P(x0 | z_0) of one image in nats, the decoder term of eq. (1).

    Args:
      z0: The noisy image z_0 [*event].
      x0: The image [*event] in [-1, 1].
      logsnr: The log signal-to-noise ratio of z_0.
      levels: The number of grey levels of x0, each of which has a bin.
    """
    alpha, sigma = alpha_sigma(logsnr)
    prediction = Prediction(z0 / alpha, jnp.zeros_like(z0))
    return elbo.decoder_nll(prediction, x0, sigma / alpha, levels)
