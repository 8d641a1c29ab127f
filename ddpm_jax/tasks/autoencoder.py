"""The task of an autoencoder whose latents a generation model is trained on.

There are two kinds. Gaussian (Rombach et al. 2022, sec. 3.1): a KL of tiny weight keeps the latents
from growing. Quantised (van den Oord et al. 2017): the latents are codes of a codebook, which
moving averages train. Either way the latents' mean and standard deviation, channel by channel, are
carried beside the parameters, so that a generation model is trained on latents of unit variance.
"""

import dataclasses
from typing import Annotated, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from ddpm_jax import plots
from ddpm_jax.data.types import UNBOUND, Batch, DataInfo
from ddpm_jax.fields import BOUND, AtLeast, EvalBatch, NonNegative, RunPath, section
from ddpm_jax.metrics.averages import averages, with_error
from ddpm_jax.metrics.distances import Grouped, frechet_distance
from ddpm_jax.metrics.networks import image_tower
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.metrics.reconstruction import SIDE, psnr, ssim
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.layers import inner_dtype
from ddpm_jax.progress import log
from ddpm_jax.task import (
    AllGather,
    Context,
    Evaluate,
    Evaluation,
    LossOutput,
    Needs,
    Task,
    Variables,
)
from ddpm_jax.variational import vae, vq

QUICK_IMAGES = 512  # test images of an evaluation that is not full

KEEP = 0.99  # share of the latents' moving moments that a step keeps

Latent = Float[Array, "batch rows columns d"]


@dataclasses.dataclass(frozen=True)
class Latents:
    """What a trained autoencoder does for a model that is trained on its latents.

    The argument `frozen` of its methods is {"params": ..., "extra": ...}, the variables of the
    trained autoencoder.

    Attributes:
      network: The autoencoder.
      codes: Codes of its codebook; 0: its latents are not codes.
    """

    network: Autoencoder
    codes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, columns, channels) of the latents of an image."""
        return self.network.latent_shape

    def encode(self, frozen: PyTree, images: Float[Array, "batch h w c"]) -> Latent:
        """Return latents of unit variance of images in [-1, 1]."""
        if self.codes:
            return self.embed_codes(frozen, self.code_indices(frozen, images))
        return self._standardize(frozen, self._encoded_mean(frozen, images))

    def decode(self, frozen: PyTree, z: Latent) -> Float[Array, "batch h w c"]:
        """Return the images in [-1, 1] of latents; each is first moved to its nearest code."""
        mean, std = latent_moments(frozen["extra"])
        z = z * std + mean
        if self.codes:
            codes = frozen["extra"]["book"].codes
            z = codes[vq.nearest(z, codes)]
        decoded: PyTree = self.network.apply(frozen["params"], z, method="decode")
        return jnp.clip(decoded, -1, 1)

    def code_indices(
        self, frozen: PyTree, images: Float[Array, "batch h w c"]
    ) -> Int[Array, "batch rows columns"]:
        """Return the indices of the codes of images in [-1, 1]."""
        return vq.nearest(self._encoded_mean(frozen, images), frozen["extra"]["book"].codes)

    def embed_codes(
        self, frozen: PyTree, indices: Int[Array, "*places"]
    ) -> Float[Array, "*places d"]:
        """Return the latents of codes."""
        return self._standardize(frozen, frozen["extra"]["book"].codes[indices])

    def _encoded_mean(self, frozen: PyTree, images: Float[Array, "batch h w c"]) -> Latent:
        moments: PyTree = self.network.apply(frozen["params"], images, method="encode")
        mean: Array = moments[0]
        return mean

    def _standardize(
        self, frozen: PyTree, z: Float[Array, "*places d"]
    ) -> Float[Array, "*places d"]:
        mean, std = latent_moments(frozen["extra"])
        return (z - mean) / std


def latent_moments(extra: PyTree) -> tuple[Float[Array, "d"], Float[Array, "d"]]:
    """Return the mean and the standard deviation of the latents, channel by channel."""
    weight = jnp.maximum(extra["weight"], 1e-6)  # of all batches so far
    mean = extra["mean"] / weight
    return mean, jnp.sqrt(jnp.maximum(extra["square"] / weight - jnp.square(mean), 1e-8))


@dataclasses.dataclass(frozen=True)
class LatentAutoencoder(Task):
    """An autoencoder whose latents a generation model is trained on.

    The loss is the mean absolute and squared error of pixels, and a term that bounds the latents.

    Attributes:
      network: Encoder and decoder.
      kl_weight: Weight of KL(q(z|x) || N(0, I)), in nats per pixel and channel; of Gaussian
        latents.
      codes: Codes of the codebook; 0: Gaussian latents.
      commitment_weight: Weight of the commitment loss (`variational.vq`, eq. 3); of codes.
      eval_batch_size: Images of one batch of an evaluation.
      text_encoder: Run directory of a text encoder in whose image tower's features reconstructions
        are compared with images; none: no such metric.
      info: The data set.
    """

    network: Autoencoder = Autoencoder()
    kl_weight: NonNegative = 1e-4
    codes: Annotated[int, AtLeast(0)] = 0
    commitment_weight: NonNegative = 0.25
    eval_batch_size: EvalBatch = 128
    text_encoder: RunPath = "none"
    info: Annotated[DataInfo, BOUND] = UNBOUND

    provides: ClassVar[str] = "autoencoder"

    def needs(self) -> Needs:
        """Return the names of other runs: a text encoder that computes metrics."""
        dual = "" if self.text_encoder == "none" else self.text_encoder
        return Needs(dual_encoder=dual, dual_encoder_field="text_encoder")

    def bind(self, info: DataInfo, precision: str, batch_size: int) -> "LatentAutoencoder":
        """Return the task for a data set and a precision."""
        del batch_size
        network = self.network.clone(shape=info.shape, dtype=inner_dtype(precision), parent=None)
        return dataclasses.replace(self, network=network, info=info)

    def check(self) -> None:
        """Check that the network can be built for images of this size.

        Raises:
          FieldError: it cannot.
        """
        with section("network"):
            self.network.check()

    def init(self, key: Key[Array, ""], batch: Batch) -> Variables:
        """Return the first variables; they do not depend on the batch."""
        del batch
        width = self.network.latent_channels
        net_key, code_key = jax.random.split(key)
        params = self.network.init(net_key, jnp.zeros((1, *self.network.shape)))
        extra: PyTree = {"mean": jnp.zeros(width), "square": jnp.zeros(width)}
        extra["weight"] = jnp.zeros(())
        if self.codes:
            extra["book"] = vq.codebook(jax.random.normal(code_key, (self.codes, width)))
        return Variables(params, extra)

    def latent(
        self, variables: Variables, x: Float[Array, "batch h w c"], keys: Key[Array, "batch"]
    ) -> tuple[Latent, Latent, dict[str, Float[Array, "batch"]]]:
        """Return the latents that are decoded, those that are encoded, and the term of the loss.

        The term is the KL of every image in nats, or the commitment loss, by name.
        """
        moments: PyTree = self.network.apply(variables.params, x, method="encode")
        mean, logvar = moments
        if self.codes:
            codes = variables.extra["book"].codes
            quantised = codes[vq.nearest(mean, codes)]
            commitment = jax.vmap(vq.commitment)(mean, quantised)
            return vq.straight_through(mean, quantised), mean, {"commitment": commitment}
        eps = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        kl = jax.vmap(vae.kl_to_standard_normal)(mean, logvar)
        return jax.vmap(vae.reparameterize)(mean, logvar, eps), mean, {"kl": kl}

    def loss(
        self,
        variables: Variables,
        batch: Batch,
        keys: Key[Array, "batch"],
        *,
        train: bool,
        all_gather: AllGather,
    ) -> LossOutput:
        """Return the error of every reconstruction and what bounds its latents.

        Args:
          variables, batch, keys, train, all_gather: see `Task.loss`.
        """
        del train, all_gather
        x = to_images(batch.images, self.info.levels)
        z, encoded, metrics = self.latent(variables, x, keys)
        decoded: PyTree = self.network.apply(variables.params, z, method="decode")
        error = (decoded - x).reshape(len(x), -1)
        metrics["absolute_error"] = jnp.abs(error).mean(1)
        losses = metrics["absolute_error"] + jnp.square(error).mean(1)
        if self.codes:
            losses += self.commitment_weight * metrics["commitment"]
        else:
            losses += self.kl_weight * metrics["kl"] / np.prod(self.network.shape)
        latents = encoded.reshape(len(x), -1, self.network.latent_channels)
        return LossOutput(losses, metrics, {"z": latents})

    def update_extra(self, extra: PyTree, statistics: PyTree) -> PyTree:
        """Return the moving moments of the latents, and the codebook, after a step."""
        z = statistics["z"].reshape(-1, self.network.latent_channels)
        batch = {"mean": z.mean(0), "square": jnp.square(z).mean(0), "weight": jnp.ones(())}
        moved = {name: KEEP * extra[name] + (1 - KEEP) * value for name, value in batch.items()}
        return {**moved, "book": vq.update(extra["book"], z)} if self.codes else moved

    def evaluations(self) -> "tuple[Evaluate[LatentAutoencoder], ...]":
        """Return the functions that evaluate the task."""
        codes = (evaluate_codes,) if self.codes else ()
        metrics = (evaluate_reconstructions, *codes, evaluate_latents, evaluate_frechet_distance)
        return *metrics, reconstruction_sheet


class Reconstructions(NamedTuple):
    """What the evaluation computes of every image.

    Attributes:
      originals: [N, H, W, C] in [-1, 1].
      images: Their reconstructions.
      values: Losses and latents by name, as `reconstruct` returns them.
    """

    originals: Float[np.ndarray, "n h w c"]
    images: Float[np.ndarray, "n h w c"]
    values: dict[str, np.ndarray]


def reconstruct(
    task: LatentAutoencoder, variables: Variables, batch: Batch, keys: Key[Array, "batch"]
) -> dict[str, Array]:
    """Return the loss, its terms, and the reconstruction and latents of every image.

    The image is that of the latents which a generation model is trained on.

    Args:
      task: the task.
      variables: parameters, and the codebook if there is one.
      batch: images.
      keys: one for every image.
    """
    losses, metrics, _ = task.loss(
        variables, batch, keys, train=False, all_gather=lambda tree: tree
    )
    x = to_images(batch.images, task.info.levels)
    moments: PyTree = task.network.apply(variables.params, x, method="encode")
    z, values = moments[0], {"loss": losses, **metrics}
    if task.codes:
        codes = variables.extra["book"].codes
        indices = vq.nearest(z, codes)
        z = codes[indices]
        values["codes"] = indices.reshape(len(x), -1)
    decoded: PyTree = task.network.apply(variables.params, z, method="decode")
    return {"reconstruction": jnp.clip(decoded, -1, 1), "z": z, **values}


def reconstructed(context: Context) -> Reconstructions:
    """Return what `reconstruct` does of the split that is evaluated, or of its first images."""
    task = context.task
    assert isinstance(task, LatentAutoencoder)
    split = context.examples(QUICK_IMAGES)
    values = context.per_example(reconstruct, split, task.eval_batch_size, context.variables)
    images = values.pop("reconstruction")
    return Reconstructions(to_images(split.images, task.info.levels), images, values)


def evaluate_reconstructions(task: LatentAutoencoder, context: Context) -> Evaluation:
    """Return the loss and its terms, PSNR, and the SSIM of images that are large enough."""
    originals, images, values = context.shared(reconstructed)
    names = ("loss", "absolute_error", "commitment" if task.codes else "kl")
    metrics = {name: values[name] for name in names} | {"psnr": psnr(images, originals)}
    if min(originals.shape[1:3]) >= SIDE:
        metrics["ssim"] = ssim(images, originals)
    return Evaluation(averages(metrics), about={"images": f"{context.split} split"})


def evaluate_codes(task: LatentAutoencoder, context: Context) -> Evaluation:
    """Return the share of the codes that are used, and their perplexity."""
    indices = context.shared(reconstructed).values["codes"].astype(int).ravel()
    used = np.bincount(indices, minlength=task.codes)
    perplexity = float(vq.perplexity(jnp.asarray(used, jnp.float32)))
    return Evaluation({"codes_used": float((used > 0).mean()), "perplexity": perplexity})


def evaluate_latents(task: LatentAutoencoder, context: Context) -> Evaluation:
    """Return the standard deviation of the latents that a generation model is trained on."""
    del task
    z = context.shared(reconstructed).values["z"]
    mean, std = jax.tree.map(np.asarray, context.compile(latent_moments)(context.variables.extra))
    return Evaluation({"latent_std": float(((z - mean) / std).std())})


def evaluate_frechet_distance(task: LatentAutoencoder, context: Context) -> Evaluation:
    """Return the Frechet distance of reconstructions to their originals, in a full evaluation.

    The features are those of the image tower of `Resources.dual_encoder`, if there is one.
    """
    del task
    load = context.resources.dual_encoder
    if not context.full or load is None:
        return Evaluation()
    tower = image_tower("text_encoder", *load())
    name = f"fd_{tower.name}"
    about = {"fd": f"of reconstructions to their originals, in {tower.name}'s features"}
    originals, images, _ = context.shared(reconstructed)
    if len(images) < 2:
        log(f"left out, since it needs at least 2 images: {name}")
        return Evaluation(about=about)
    plots.check_finite(images)
    sets = [Grouped(tower.extract(part)[0]) for part in (images, originals)]
    distance = frechet_distance(sets[0], sets[1], paired=True)
    return Evaluation(with_error(name, (distance.value, distance.error)), about=about)


def reconstruction_sheet(task: LatentAutoencoder, context: Context) -> Evaluation:
    """Return a sheet of the first images, each row above their reconstructions."""
    del task
    pair = context.shared(reconstructed)[:2]
    starts = range(0, min(len(pair[0]), 40), 10)
    rows = [part[start : start + 10] for start in starts for part in pair]
    sheet = plots.attempt(plots.grid, np.concatenate(rows), columns=10)
    return Evaluation(images={"reconstructions": sheet})
