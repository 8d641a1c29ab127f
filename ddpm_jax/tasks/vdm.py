"""Variational diffusion (Kingma et al. 2021): the bound itself is the loss, the schedule learned.

-log P(x0) <= prior + diffusion + decoder, in nats, where for z_t = x_t at time t          (1)

    prior      KL(q(z_1 | x0) || N(0, I))
    diffusion  E_t 1/2 (-dlogsnr/dt) |eps - eps_hat|^2     in continuous time, eq. 17
               T E_i KL(q(z_s | z_t, x0) || p(z_s | z_t))  in T steps, s = (i - 1) / T
    decoder    -log P(x0 | z_0), the mass of N(z_0 / alpha, sigma^2 / alpha^2) in x0's bin

and by the probability-flow ODE, with q(z_0 | x0) as its dequantisation,

    -log P(x0) <= E_q [log q(z_0 | x0) - log p(z_0)] + decoder                           (2)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax import plots
from ddpm_jax.data.types import UNBOUND, Batch, Data, DataInfo
from ddpm_jax.diffusion import elbo, grids, probability_flow, schedules
from ddpm_jax.diffusion.losses import stratified_times
from ddpm_jax.diffusion.prediction import Prediction, read
from ddpm_jax.diffusion.process import alpha_sigma, q_sample
from ddpm_jax.fields import BOUND, MAY_CHANGE, FieldError, Length, section
from ddpm_jax.metrics.averages import averages
from ddpm_jax.metrics.per_example import per_example, spread_times
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.dit import DiT
from ddpm_jax.nn.unet import UNet
from ddpm_jax.parallel.sharding import fetch
from ddpm_jax.task import Evaluation, Guide, Needs, Resources, Task, class_labels
from ddpm_jax.tasks.image_sampler import Sampling, drawing
from ddpm_jax.tasks.sample_figures import QUICK_IMAGES, Judging, SampleEvaluation, judging_of, show

ROUTES = ("continuous", "discrete", "ode")
EVALUATION_PURPOSES = 4  # of an image's draws: z_0, times, noise, the ODE's probe


def vdm_task(
    net: UNet | DiT,
    shape: tuple[int, int, int],
    levels: int,
    *,
    ends: tuple[float, float],
    sampling: Sampling,
    batch_size: int,
    eval_batch: int,
    eval_times: int,
    steps: int = 1000,
    ode_images: int = 1000,
    judging: Judging = Judging(),
    guide: Callable[[], Guide | None] = lambda: None,
) -> Task:
    """A diffusion model of v trained on the continuous bound, its schedule with it.

    Args:
      net: network, of v; conditional if it has classes (then the bound is of log P(x0 | y)).
      shape, levels: of the images.
      ends: logsnr at t = 0 and 1 that the schedule starts from.
      sampling: how images are drawn by default.
      batch_size: of training, over which times are spread evenly.
      eval_times: times of each test image, in the bounds.
      steps: T of the discrete bound.
      ode_images: of how many test images the ODE's likelihood is taken, in full evaluations.
      judging: what judges drawn images, the classes in turn.
      guide: loads what guides them; None: the labels do.

    Raises:
      FieldError: the network cannot be built for images of this shape.
    """
    with section("network"):
        net.check(shape)
    highest, lowest = ends
    classes, dims = net.classes, int(np.prod(shape))

    def init(key, batch: Batch):
        net_key, schedule_key = jax.random.split(key)
        labels = jnp.zeros(1, jnp.int32) if classes else None
        params = net.init(net_key, jnp.zeros((1, *shape)), jnp.zeros(1), labels)
        schedule = schedules.learned_init(schedule_key, lowest=lowest, highest=highest)
        return {"net": params, "schedule": schedule}, {}

    def schedule_of(params):
        return schedules.learned(params["schedule"])

    def predict(params, xt, logsnr, labels, keys=None) -> Prediction:
        """A batch, each image with its own logsnr, which is the network's time."""
        time = (highest - logsnr) / (highest - lowest)
        out: Any = net.apply(params["net"], xt, time, labels, keys)
        return jax.vmap(functools.partial(read, "v"))(out, xt, logsnr)

    draw = drawing(
        predict,
        schedule_of,
        shape,
        classes,
        sampling,
        guide=guide,
        untrained="sampling.guidance",
    )

    def split(keys, purposes):
        """Each purpose's own keys [B]."""
        apart = jax.vmap(lambda key: jax.random.split(key, purposes))(keys)
        return (apart[:, purpose] for purpose in range(purposes))

    def normal(keys):
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

    def ends_terms(schedule, x0, eps):
        """(prior, decoder, z_0): eq. (1)'s first and last terms."""
        prior = jax.vmap(lambda x0: elbo.prior_kl(x0, schedule.logsnr(jnp.ones(()))))(x0)
        logsnr = schedule.logsnr(jnp.zeros(()))
        z0 = jax.vmap(q_sample, (0, 0, None))(x0, eps, logsnr)
        decoder = jax.vmap(lambda z, x: rounding_nll(z, x, logsnr, levels))(z0, x0)
        return prior, decoder, z0

    def diffusion(params, schedule, x0, eps, t, labels, keys=None):
        """Eq. (1)'s middle term, of one time for each image."""
        logsnr, slope = jax.vmap(lambda t: jax.jvp(schedule.logsnr, (t,), (jnp.ones(()),)))(t)
        xt = jax.vmap(q_sample)(x0, eps, logsnr)
        found = predict(params, xt, logsnr, labels, keys)
        return jax.vmap(elbo.continuous_kl)(found, eps, slope)

    def loss(params, fixed, batch, keys, *, train, gather):
        del fixed, gather
        schedule, x0 = schedule_of(params), to_images(batch.images, levels)
        t_keys, drop_keys, end_keys, eps_keys = split(keys, 4)
        t = stratified_times(t_keys, batch.index % batch_size, batch_size)
        labels = class_labels(batch.labels, classes) if classes else None
        prior, decoder, _ = ends_terms(schedule, x0, normal(end_keys))
        drop = drop_keys if train else None
        inner = diffusion(params, schedule, x0, normal(eps_keys), t, labels, drop)
        parts = {"prior": prior, "diffusion": inner, "decoder": decoder}
        bits = {name: elbo.bits_per_dim(nats, dims) for name, nats in parts.items()}
        total = bits["prior"] + bits["diffusion"] + bits["decoder"]
        return total, {f"bits_{name}": value for name, value in bits.items()}, {}

    def bounds(params, batch, keys):
        """Nats of each image: what both bounds share, and each one's middle term."""
        schedule, x0 = schedule_of(params), to_images(batch.images, levels)
        labels = class_labels(batch.labels, classes) if classes else None
        end_keys, t_keys, eps_keys, _ = split(keys, EVALUATION_PURPOSES)
        prior, decoder, _ = ends_terms(schedule, x0, normal(end_keys))
        times = spread_times(batch.index, t_keys, eval_times)

        def at(number):
            eps = normal(jax.vmap(lambda key: jax.random.fold_in(key, number))(eps_keys))
            t = times[:, number]
            continuous = diffusion(params, schedule, x0, eps, t, labels)
            step = grids.step_number(t, steps)
            now, before = schedule.logsnr(step / steps), schedule.logsnr((step - 1) / steps)
            xt = jax.vmap(q_sample)(x0, eps, now)
            found = predict(params, xt, now, labels)
            discrete = steps * jax.vmap(elbo.step_kl)(found, x0, xt, now, before)
            return continuous, discrete

        continuous, discrete = jax.lax.map(at, jnp.arange(eval_times))
        ends = {"prior": prior, "decoder": decoder}
        return {**ends, "continuous": continuous.mean(0), "discrete": discrete.mean(0)}

    def by_ode(params, tolerance, batch, keys):
        """Nats of each image, eq. (2)."""
        schedule, x0 = schedule_of(params), to_images(batch.images, levels)
        labels = class_labels(batch.labels, classes) if classes else None
        end_keys, _, _, probe_keys = split(keys, EVALUATION_PURPOSES)
        eps = normal(end_keys)  # z_0 is that of the bounds
        probe = jax.vmap(lambda key: jax.random.rademacher(key, shape, eps.dtype))(probe_keys)
        _, decoder, z0 = ends_terms(schedule, x0, eps)
        clean, noisy = schedule.logsnr(jnp.zeros(())), schedule.logsnr(jnp.ones(()))

        def denoise(xt, logsnr):
            return predict(params, xt, jnp.full(len(xt), logsnr), labels)

        log_p, evaluations = probability_flow.log_density(
            denoise, z0, probe, clean, noisy, tolerance
        )
        _, sigma = alpha_sigma(clean)
        log_q = -0.5 * (jnp.square(eps) + jnp.log(2 * jnp.pi)).reshape(len(eps), -1).sum(-1)
        log_q -= dims * jnp.log(sigma)
        return {"ode": log_q - log_p + decoder, "calls": jnp.full(len(eps), evaluations)}

    def curve(params):
        return schedule_of(params).logsnr(jnp.linspace(0, 1, 101))

    def evaluate(params, fixed, data: Data, *, split, seed, full, spread):
        held_out = data.part(split) if full else data.part(split).first(QUICK_IMAGES)
        found = per_example(bounds, held_out, eval_batch, seed, spread, params)
        ends = found["prior"] + found["decoder"]
        nats = {name: ends + found[name] for name in ROUTES[:2]}
        metrics, scale = {}, 1 / (dims * np.log(2))
        if full:

            def solved(count, tolerance):
                images = held_out.first(count)
                return per_example(by_ode, images, eval_batch, seed, spread, params, tolerance)

            exact, checked = (
                solved(ode_images, probability_flow.TOLERANCE),
                min(ode_images, eval_batch),
            )
            nats["ode"] = exact["ode"]
            metrics["ode_calls"] = float(exact["calls"].mean())
            metrics["ode_images"] = float(len(exact["calls"]))
            # The solver's error is below its change from ten times the tolerance.
            change = (
                exact["ode"][:checked] - solved(checked, 10 * probability_flow.TOLERANCE)["ode"]
            )
            metrics["bits_per_dim_ode_numerical_error"] = float(np.abs(change * scale).mean())
        parts = {
            "prior": found["prior"],
            "diffusion": found["continuous"],
            "decoder": found["decoder"],
        }
        values = {"loss": nats["continuous"]}
        values |= {f"bits_per_dim_{name}": of_route for name, of_route in nats.items()}
        values |= {f"bits_{name}": of_part for name, of_part in parts.items()}
        metrics |= averages(values, scale)
        highest, lowest = (float(end) for end in fetch(params["schedule"]["ends"]))
        metrics |= {"logsnr_highest": highest, "logsnr_lowest": lowest}
        shown = show(draw, params, seed, data, split, full, judging, spread)
        pictures = dict(shown.pictures)
        if full:
            pictures["schedule"] = plots.lines(
                np.linspace(0, 1, 101),
                {"logsnr": fetch(spread.compile(curve)(params))},
                "t",
                "The learned schedule",
            )
        return Evaluation(metrics | shown.metrics, pictures, shown.about)

    return Task(
        init,
        loss,
        lambda fixed, statistics: fixed,
        evaluate,
        draw.sample,
        draw.guide,
        labels=draw.labels,
        denoiser=draw.denoiser,
    )


def rounding_nll(z0: Any, x0: Any, logsnr: Any, levels: int) -> Any:
    """-log P(x0 | z_0) in nats, eq. (1): z_0 / alpha rounded to a grey value, of one image."""
    alpha, sigma = alpha_sigma(logsnr)
    seen = Prediction(z0 / alpha, jnp.zeros_like(z0))
    return elbo.decoder_nll(seen, x0, sigma / alpha, levels)


@dataclasses.dataclass(frozen=True)
class VDM:
    """Variational diffusion in continuous time (Kingma et al. 2021); see `vdm_task`.

    Attributes:
      network: The denoising network, which predicts v.
      logsnr_max: logSNR at t = 0 from which the learned schedule starts.
      logsnr_min: logSNR at t = 1 from which the learned schedule starts.
      conditional: Condition the network on class labels, where the data set has them.
      ode_images: Test images whose likelihood the final evaluation computes by the ODE.
      sampling: How images are sampled.
      evaluation: What is evaluated.
      info: The data set.
      batch_size: Training images of one step.
    """

    network: UNet | DiT = UNet()
    logsnr_max: float = 8.0
    logsnr_min: float = -6.0
    conditional: bool = False
    ode_images: Length = 1000
    sampling: Annotated[Sampling, MAY_CHANGE] = Sampling()
    evaluation: SampleEvaluation = SampleEvaluation()
    info: Annotated[DataInfo, BOUND] = UNBOUND
    batch_size: Annotated[int, BOUND] = 0

    provides: ClassVar[str] = "diffusion"

    def needs(self) -> Needs:
        """Return the names of other runs: feature networks and a guidance model."""
        return Needs(self.evaluation.features, self.sampling.guidance_model)

    def fit_to(self, data: Data) -> "VDM":
        """Return the settings as they fit a data set: as they are."""
        del data
        return self

    def adapt(self, data: Data) -> Data:
        """Return the data as the task is trained on them: as they are."""
        return data

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "VDM":
        """Return the task for a data set, a precision and a batch size."""
        network = self.network.clone(
            outputs=info.shape[-1],
            classes=info.classes if self.conditional else 0,
            dtype=jnp.dtype(precision),
            parent=None,
        )
        return dataclasses.replace(self, network=network, info=info, batch_size=batch_size)

    def build(self, resources: Resources = Resources()) -> Task:
        """Return the functions of the bound task.

        Raises:
          FieldError: fields contradict each other or the data.
        """
        if not self.logsnr_min < self.logsnr_max:
            raise FieldError(
                f"logsnr_min={self.logsnr_min:g}: must be less than logsnr_max={self.logsnr_max:g}",
                "logsnr_max",
            )
        return vdm_task(
            self.network,
            self.info.shape,
            self.info.levels,
            ends=(self.logsnr_max, self.logsnr_min),
            sampling=self.sampling,
            batch_size=self.batch_size,
            eval_batch=self.evaluation.batch_size,
            eval_times=self.evaluation.times_per_image,
            ode_images=self.ode_images,
            judging=judging_of(self.evaluation, resources),
            guide=resources.guidance,
        )
