"""The task of a variational autoencoder: training, evaluation and samples."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ddpm_jax import plots
from ddpm_jax.data.types import UNBOUND, Batch, Data, DataInfo
from ddpm_jax.fields import BOUND, EvalBatch, Length, NonNegative, section
from ddpm_jax.metrics.averages import averages
from ddpm_jax.metrics.per_example import per_example
from ddpm_jax.nn.layers import inner_dtype
from ddpm_jax.nn.vae import VAENetwork, check_shape, with_data_moments
from ddpm_jax.parallel.sharding import fetch, placed
from ddpm_jax.progress import tell
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.task import Evaluation, Needs, Request, Resources, Task, refuse
from ddpm_jax.variational import vae
from ddpm_jax.variational.likelihoods import Bernoulli, Gaussian, Likelihood

SEEN = 1000  # images whose moments the first parameters are set by

IWAE_SAMPLES = (1, 64, 1000)

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016, sec. 4.2


def vae_task(
    net: VAENetwork, likelihood: Likelihood, *, beta: float, eval_batch: int, iwae_images: int
) -> Task:
    """A VAE with a standard normal prior.

    Args:
      net: encoder and decoder.
      likelihood: what the decoder's output means.
      beta: weight of the KL; 1 is the variational bound.
      eval_batch: examples at a time in evaluation.
      iwae_images: of how many test images the importance-weighted bounds are estimated
        (1,000 samples each, which is most of an evaluation's time).

    Raises:
      FieldError: the network cannot be built for images of this size.
    """

    with section("network"):
        check_shape(net)

    def init(key, batch: Batch):
        x = jax.vmap(likelihood.observe)(jax.random.split(key, len(batch.images)), batch.images)
        params = net.init(key, x[:1])
        mean = x.mean(0)
        logvar = jnp.log(jnp.mean(jnp.square(x - mean)))
        return with_data_moments(params, likelihood.bias(mean), logvar), {}

    def posterior(params, batch, keys):
        """x, q(z|x) and a draw of it."""
        observe_keys, z_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        x = jax.vmap(likelihood.observe)(observe_keys, batch.images)
        mean, logvar = net.apply(params, x, method="encode")
        eps = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(z_keys)
        return x, mean, logvar, jax.vmap(vae.reparameterize)(mean, logvar, eps)

    def nll_of(params, z, x):
        out, logvar = net.apply(params, z, method="decode")
        return jax.vmap(lambda out, x: likelihood.nll((out, logvar), x))(out, x)

    def loss(params, fixed, batch, keys, *, train, gather):
        del fixed, train, gather  # nothing is carried, dropped out or compared
        x, mean, logvar, z = posterior(params, batch, keys)
        nll = nll_of(params, z, x)
        kl = jax.vmap(vae.kl_to_standard_normal)(mean, logvar)
        return -vae.elbo(nll, kl, beta), {"nll": nll, "kl": kl, "neg_elbo": nll + kl}, {}

    def bound(params, batch, keys):
        x, mean, logvar, z = posterior(params, batch, keys)
        nll = nll_of(params, z, x)
        kl = jax.vmap(vae.kl_to_standard_normal)(mean, logvar)
        return {"nll": nll, "kl": kl, "mean": mean}

    def importance_weights(params, batch, keys):
        """[B, 1000] log weights of each image; x is the x of `bound`."""
        x, mean, logvar, _ = posterior(params, batch, keys)

        def draw(_, number):
            key = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
            eps = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(key)
            z = jax.vmap(vae.reparameterize)(mean, logvar, eps)
            return None, jax.vmap(vae.log_weight)(nll_of(params, z, x), z, mean, logvar)

        _, weights = jax.lax.scan(draw, None, 1000 + jnp.arange(max(IWAE_SAMPLES)))
        return {"log_weights": weights.T}

    def reconstruct(params, batch, keys):
        x, mean, *_ = posterior(params, batch, keys)
        again = likelihood.picture(net.apply(params, mean, method="decode"))
        return {"x": likelihood.show(x), "again": again}

    def decode(params, z):
        return likelihood.picture(net.apply(params, z, method="decode"))

    def evaluate(params, fixed, data: Data, *, split, seed, full, spread):
        held_out = data.part(split)
        found = per_example(bound, held_out, eval_batch, seed, spread, params)
        nll, kl = found["nll"], found["kl"]
        metrics = averages({"loss": nll + beta * kl, "neg_elbo": nll + kl, "nll": nll, "kl": kl})
        if len(nll) > 1:  # a variance over images
            metrics["active_units"] = float((found["mean"].var(0) > ACTIVE_VARIANCE).sum())
        else:
            tell("active_units is left out: it needs at least 2 images")
        if likelihood.bits_per_dim is not None:
            bits = likelihood.bits_per_dim(jnp.asarray(nll + kl), int(np.prod(data.shape)))
            metrics |= averages({"bits_per_dim": np.asarray(bits)})
        if full:
            some = held_out.first(iwae_images)
            weights = per_example(
                importance_weights,
                some,
                min(eval_batch, iwae_images, 100),
                seed,
                spread,
                params,
            )["log_weights"]
            metrics |= importance_weighted(weights)
        return Evaluation(metrics, pictures(params, fixed, held_out, seed, spread))

    def pictures(params, fixed, held_out, seed, spread):
        some = held_out.first(40)
        shown = per_example(reconstruct, some, 40, seed, spread, params)
        rows = []
        for start in range(0, len(shown["x"]), 10):  # originals above their reconstructions
            rows += [shown["x"][start : start + 10], shown["again"][start : start + 10]]
        found = {"reconstructions": plots.attempt(plots.grid, np.concatenate(rows), columns=10)}
        keys = example_keys(purpose_key(seed, SAMPLE), 0, jnp.arange(100))
        samples = fetch(sample(params, fixed, keys, Request(), spread))
        found["samples"] = plots.attempt(plots.grid, samples)
        if net.latents == 2:
            # The unit square through the inverse normal CDF: equal shares of the prior.
            axis = jax.scipy.stats.norm.ppf(jnp.linspace(0.02, 0.98, 20))
            plane = jnp.stack(jnp.meshgrid(axis, -axis), -1).reshape(-1, 2)
            plane = fetch(spread.compile(decode)(params, plane))
            found["latent_plane"] = plots.attempt(plots.grid, plane, columns=20)
        return found

    def draw(params, keys):
        return decode(params, jax.vmap(lambda key: jax.random.normal(key, (net.latents,)))(keys))

    def sample(params, fixed, keys, request, spread=None):
        del fixed
        refuse(request, *Request._fields)
        return (spread or placed(params)).compile(draw)(params, keys)

    return Task(init, loss, lambda fixed, statistics: fixed, evaluate, sample, sees=SEEN)


def importance_weighted(log_weights: Float[np.ndarray, "images samples"]) -> dict[str, float]:
    """-IWAE bounds for k = 1, 64 and all samples, and the gap between the first and last.

    Each k uses every sample it can: the bound of k is the mean over disjoint groups of k.
    """
    metrics: dict[str, float] = {}
    bounds = {}
    for k in IWAE_SAMPLES:
        groups = log_weights.shape[1] // k
        grouped = log_weights[:, : groups * k].reshape(len(log_weights), groups, k)
        peak = grouped.max(-1)  # log-mean-exp in float64
        means = peak + np.log(np.exp(grouped - peak[..., None]).mean(-1))
        bounds[k] = -means.mean(1)
        metrics |= averages({f"neg_iwae_{k}": bounds[k]})
    metrics |= averages({"gap": bounds[IWAE_SAMPLES[0]] - bounds[IWAE_SAMPLES[-1]]})
    return metrics | {"iwae_images": float(len(log_weights))}


@dataclasses.dataclass(frozen=True)
class VAE:
    """A variational autoencoder (Kingma & Welling 2014); see `vae_task`.

    Attributes:
      network: Encoder and decoder.
      likelihood: What the decoder's output means.
      beta: Weight of the KL; 1 is the variational bound.
      eval_batch_size: Images of one batch of an evaluation.
      iwae_images: Test images of which the importance-weighted bounds are estimated, with 1,000
        samples each.
      info: The data set.
    """

    network: VAENetwork = VAENetwork()
    likelihood: Bernoulli | Gaussian = Bernoulli()
    beta: NonNegative = 1.0
    eval_batch_size: EvalBatch = 500
    iwae_images: Length = 1000
    info: Annotated[DataInfo, BOUND] = UNBOUND

    provides: ClassVar[str] = "vae"

    def needs(self) -> Needs:
        """Return the names of other runs: none."""
        return Needs()

    def fit_to(self, data: Data) -> "VAE":
        """Return the settings as they fit a data set: as they are."""
        del data
        return self

    def adapt(self, data: Data) -> Data:
        """Return the data as the task is trained on them: as they are."""
        return data

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "VAE":
        """Return the task for a data set and a precision."""
        del batch_size
        network = self.network.clone(shape=info.shape, dtype=inner_dtype(precision), parent=None)
        return dataclasses.replace(self, network=network, info=info)

    def build(self, resources: Resources = Resources()) -> Task:
        """Return the functions of the bound task.

        Raises:
          FieldError: fields contradict each other or the data.
        """
        del resources
        return vae_task(
            self.network,
            self.likelihood.make(self.info.levels),
            beta=self.beta,
            eval_batch=self.eval_batch_size,
            iwae_images=self.iwae_images,
        )
