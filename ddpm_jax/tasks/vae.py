"""The task of a variational autoencoder: its loss, evaluation and samples."""

import dataclasses
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from ddpm_jax import plots
from ddpm_jax.data.types import UNBOUND, Batch, DataInfo
from ddpm_jax.fields import BOUND, EvalBatch, Length, NonNegative, section
from ddpm_jax.metrics.averages import averages
from ddpm_jax.nn.layers import inner_dtype
from ddpm_jax.nn.vae import VAENetwork, check_shape, with_data_moments
from ddpm_jax.progress import log
from ddpm_jax.rng import split_keys
from ddpm_jax.task import (
    AllGather,
    Compile,
    Context,
    Evaluate,
    Evaluation,
    LossOutput,
    SampleRequest,
    SamplingTask,
    Variables,
)
from ddpm_jax.variational import vae
from ddpm_jax.variational.likelihoods import Bernoulli, Gaussian, Likelihood

IWAE_SAMPLES = (1, 64, 1000)  # numbers k of samples of z in the importance-weighted bounds

ACTIVE_VARIANCE = 0.01  # minimum variance of an active unit of z (Burda et al. 2016, sec. 4.2)


class Posterior(NamedTuple):
    """The approximate posterior q(z|x) of a batch.

    Attributes:
      x: The binarised or dequantised images [B, H, W, C].
      mean: The mean of q(z|x) [B, Z].
      logvar: The log variance of q(z|x) [B, Z].
      z: One sample of q(z|x) per image [B, Z].
    """

    x: Float[Array, "batch h w c"]
    mean: Float[Array, "batch latent"]
    logvar: Float[Array, "batch latent"]
    z: Float[Array, "batch latent"]


@dataclasses.dataclass(frozen=True)
class VAE(SamplingTask):
    """A variational autoencoder with a standard normal prior (Kingma & Welling 2014).

    Attributes:
      network: The network of the encoder and the decoder.
      likelihood: The likelihood p(x|z): Bernoulli for binarised pixels, or Gaussian for
        dequantised pixels.
      beta: Weight of the KL term in the loss, at least 0; with 1, the loss is the negative evidence
        lower bound (ELBO).
      eval_batch_size: Number of images in one batch of an evaluation; it does not change results.
      iwae_images: Number of test images for which the final evaluation estimates the
        importance-weighted bounds, with 1,000 samples of z per image.
      info: Description of the data set: image shape, number of classes and caption length.
    """

    network: VAENetwork = VAENetwork()
    likelihood: Bernoulli | Gaussian = Bernoulli()
    beta: NonNegative = 1.0
    eval_batch_size: EvalBatch = 500
    iwae_images: Length = 1000
    info: Annotated[DataInfo, BOUND] = UNBOUND

    run_type: ClassVar[str] = "vae"
    init_examples: ClassVar[int] = 1000  # examples in the batch of `init`

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "VAE":
        """Return the task with its network set up for the image shape and the precision."""
        del batch_size
        network = self.network.clone(shape=info.shape, dtype=inner_dtype(precision), parent=None)
        return dataclasses.replace(self, network=network, info=info)

    def check(self) -> None:
        """Raise FieldError if a field of the network does not fit the size of the images."""
        with section("network"):
            check_shape(self.network)

    @property
    def pixels(self) -> Likelihood:
        """The likelihood p(x|z), for the number of grey levels in the data set."""
        return self.likelihood.make(self.info.levels)

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return initial parameters; the decoder outputs the mean and the variance of the batch."""
        x = jax.vmap(self.pixels.observe)(jax.random.split(key, len(batch.images)), batch.images)
        params = self.network.init(key, x[:1])
        mean = x.mean(0)
        logvar = jnp.log(jnp.mean(jnp.square(x - mean)))
        return Variables(with_data_moments(params, self.pixels.bias(mean), logvar), {})

    def posterior(self, params: PyTree, batch: Batch, keys: Key[Array, "batch"]) -> Posterior:
        """Return x, and the mean, the log variance and one sample of q(z|x), for every image."""
        observe_keys, z_keys = split_keys(keys, 2)
        x = jax.vmap(self.pixels.observe)(observe_keys, batch.images)
        moments: PyTree = self.network.apply(params, x, method="encode")
        mean, logvar = moments
        eps = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(z_keys)
        return Posterior(x, mean, logvar, jax.vmap(vae.reparameterize)(mean, logvar, eps))

    def nll(
        self,
        params: PyTree,
        z: Float[Array, "batch latent"],
        x: Float[Array, "batch h w c"],
    ) -> Float[Array, "batch"]:
        """Return -log p(x|z) of every image, in nats."""
        decoded: PyTree = self.network.apply(params, z, method="decode")
        out, logvar = decoded
        nll = self.pixels.nll
        return jax.vmap(lambda out, x: nll((out, logvar), x))(out, x)

    def decode(
        self, params: PyTree, z: Float[Array, "batch latent"]
    ) -> Float[Array, "batch h w c"]:
        """Return the mean image of p(x|z) [B, H, W, C] in [-1, 1]."""
        decoded: PyTree = self.network.apply(params, z, method="decode")
        return self.pixels.mean_image(decoded)

    def loss(
        self,
        variables: Variables,
        batch: Batch,
        keys: Key[Array, "batch"],
        *,
        train: bool,
        all_gather: AllGather,
    ) -> LossOutput:
        """Return the negative ELBO of every image in nats, with the KL weighted by beta.

        Args:
          variables: The parameters of the encoder and the decoder.
          batch: Images, labels and indices of B examples.
          keys: Random keys, one for each example, [B].
          train: Not used, since the networks have no dropout.
          all_gather: Not used.
        """
        del train, all_gather
        posterior = self.posterior(variables.params, batch, keys)
        nll = self.nll(variables.params, posterior.z, posterior.x)
        kl = jax.vmap(vae.kl_to_standard_normal)(posterior.mean, posterior.logvar)
        metrics = {"nll": nll, "kl": kl, "neg_elbo": nll + kl}
        return LossOutput(-vae.elbo(nll, kl, self.beta), metrics, {})

    def evaluations(self) -> "tuple[Evaluate[VAE], ...]":
        """Return the functions that compute the metrics and images of an evaluation."""
        plane = (latent_plane,) if self.network.latents == 2 else ()
        return evaluate_bound, evaluate_importance_weighted, reconstructions, sample_sheet, *plane

    def sample(
        self,
        variables: Variables,
        keys: Key[Array, "batch"],
        request: SampleRequest,
        guidance: PyTree,
        compile: Compile,
    ) -> Float[Array, "batch h w c"]:
        """Sample z from the prior N(0, I), and return the mean image of p(x|z) in [-1, 1].

        Args:
          variables: The parameters and the extra variables (not trained by gradients) of the task.
          keys: Random keys, one for each image.
          request: Not used.
          guidance: Not used.
          compile: Compiles a function as `jax.jit` does, once for all its calls.
        """
        del request, guidance
        return compile(sample_prior, static_argnums=0)(self, variables.params, keys)


def sample_prior(
    task: VAE, params: PyTree, keys: Key[Array, "batch"]
) -> Float[Array, "batch h w c"]:
    """Sample z ~ N(0, I) for each key, and return the mean image of p(x|z) in [-1, 1]."""
    z = jax.vmap(lambda key: jax.random.normal(key, (task.network.latents,)))(keys)
    return task.decode(params, z)


def decode(
    task: VAE, params: PyTree, z: Float[Array, "batch latent"]
) -> Float[Array, "batch h w c"]:
    """Return `task.decode(params, z)`, as a function that `Compile` can cache."""
    return task.decode(params, z)


def bound_terms(
    task: VAE, params: PyTree, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return "nll" and "kl", the terms of the ELBO in nats [B], and "mean" of q(z|x) [B, Z].

    Args:
      task: The task, after `bind` has set the fields that depend on the data set.
      params: The parameters of the encoder and the decoder.
      batch: A batch of images.
      keys: Random keys, one for each image.
    """
    posterior = task.posterior(params, batch, keys)
    nll = task.nll(params, posterior.z, posterior.x)
    kl = jax.vmap(vae.kl_to_standard_normal)(posterior.mean, posterior.logvar)
    return {"nll": nll, "kl": kl, "mean": posterior.mean}


def evaluate_bound(task: VAE, context: Context) -> Evaluation:
    """Return the loss, the negative ELBO, its terms, and the number of active units of z."""
    values = context.per_example(
        bound_terms, context.held_out, task.eval_batch_size, context.variables.params
    )
    nll, kl = values["nll"], values["kl"]
    metrics = averages({"loss": nll + task.beta * kl, "neg_elbo": nll + kl, "nll": nll, "kl": kl})
    if len(nll) > 1:
        metrics["active_units"] = float((values["mean"].var(0) > ACTIVE_VARIANCE).sum())
    else:
        log("metric active_units is left out: it needs at least 2 images, and the split has 1")
    bits_per_dim = task.pixels.bits_per_dim
    if bits_per_dim is not None:
        bits = bits_per_dim(jnp.asarray(nll + kl), int(np.prod(context.data.shape)))
        metrics |= averages({"bits_per_dim": np.asarray(bits)})
    return Evaluation(metrics)


def importance_weights(
    task: VAE, params: PyTree, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return {"log_weights": log p(x, z) - log q(z|x) for 1,000 samples of z, in nats [B, 1000]}.

    The binarised or dequantised x is the same as in `bound_terms`.

    Args:
      task: The task, after `bind` has set the fields that depend on the data set.
      params: The parameters of the encoder and the decoder.
      batch: A batch of images.
      keys: Random keys, one for each image.
    """
    x, mean, logvar, _ = task.posterior(params, batch, keys)

    def weight(carry: None, number: Array) -> tuple[None, Array]:
        sample_keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        eps = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(sample_keys)
        z = jax.vmap(vae.reparameterize)(mean, logvar, eps)
        return carry, jax.vmap(vae.log_weight)(task.nll(params, z, x), z, mean, logvar)

    _, weights = jax.lax.scan(weight, None, 1000 + jnp.arange(max(IWAE_SAMPLES)))
    return {"log_weights": weights.T}


def evaluate_importance_weighted(task: VAE, context: Context) -> Evaluation:
    """In the final evaluation, return the importance-weighted bounds of the first images."""
    if not context.full:
        return Evaluation()
    first, size = context.held_out.first(task.iwae_images), task.eval_batch_size
    size = min(size, task.iwae_images, 100)
    values = context.per_example(importance_weights, first, size, context.variables.params)
    return Evaluation(importance_weighted(values["log_weights"]))


def importance_weighted(log_weights: Float[np.ndarray, "images samples"]) -> dict[str, float]:
    """Return the negative importance-weighted bounds for k = 1, 64 and 1,000 samples, in nats.

    The bound for k samples (Burda et al. 2016, eq. 8) is averaged over all disjoint groups of k
    samples. The metric "gap" is the difference between the bounds for 1 and 1,000 samples.
    """
    metrics: dict[str, float] = {}
    bounds = {}
    for k in IWAE_SAMPLES:
        groups = log_weights.shape[1] // k
        grouped = log_weights[:, : groups * k].reshape(len(log_weights), groups, k)
        maximum = grouped.max(-1)
        log_means = maximum + np.log(np.exp(grouped - maximum[..., None]).mean(-1))
        bounds[k] = -log_means.mean(1)
        metrics |= averages({f"neg_iwae_{k}": bounds[k]})
    metrics |= averages({"gap": bounds[IWAE_SAMPLES[0]] - bounds[IWAE_SAMPLES[-1]]})
    return metrics | {"iwae_images": float(len(log_weights))}


def reconstruct(
    task: VAE, params: PyTree, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return {"x": image, "reconstruction": decoded mean of q(z|x)}, [B, H, W, C] in [-1, 1].

    Args:
      task: The task, after `bind` has set the fields that depend on the data set.
      params: The parameters of the encoder and the decoder.
      batch: A batch of images.
      keys: Random keys, one for each image.
    """
    posterior = task.posterior(params, batch, keys)
    x = task.pixels.to_image(posterior.x)
    return {"x": x, "reconstruction": task.decode(params, posterior.mean)}


def reconstructions(task: VAE, context: Context) -> Evaluation:
    """Return a grid of the first 40 images, with the reconstructions below each row of 10."""
    del task
    values = context.per_example(
        reconstruct, context.held_out.first(40), 40, context.variables.params
    )
    rows = []
    for start in range(0, len(values["x"]), 10):
        rows += [values[name][start : start + 10] for name in ("x", "reconstruction")]
    sheet = plots.image_or_error(plots.grid, np.concatenate(rows), columns=10)
    return Evaluation(images={"reconstructions": sheet})


def sample_sheet(task: VAE, context: Context) -> Evaluation:
    """Return an image grid of 100 samples."""
    del task
    return Evaluation(
        images={"samples": plots.image_or_error(plots.grid, context.samples(100).images)}
    )


def latent_plane(task: VAE, context: Context) -> Evaluation:
    """Return a grid of images that are decoded from a regular grid of two-dimensional z."""
    # The inverse normal CDF maps a regular grid to points of equal prior probability.
    axis = jax.scipy.stats.norm.ppf(jnp.linspace(0.02, 0.98, 20))
    plane = jnp.stack(jnp.meshgrid(axis, -axis), -1).reshape(-1, 2)
    images = np.asarray(
        context.compile(decode, static_argnums=0)(task, context.variables.params, plane)
    )
    return Evaluation(images={"latent_plane": plots.image_or_error(plots.grid, images, columns=20)})
